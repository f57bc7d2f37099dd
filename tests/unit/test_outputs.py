"""One rule for the outputs of all verbs: kept, gone on with, refused or replaced; and names that let several lie side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raypar import outputs, prepare, runfile
from raypar.config import RunConfig
from raypar.dataset.manifest import Manifest
from raypar.outputs import Output

VERBS = ("inspect", "evaluate", "predict", "export")
SHA = {"a": "a" * 64, "b": "b" * 64}


def output_of(storage: Path, verb: str, **section: Any) -> Output:
    config = RunConfig.model_validate({"name": "run", "storage": str(storage), verb: section})
    return Output(verb, config, "result.json")


@pytest.mark.parametrize("verb", VERBS)
def test_what_a_verb_does_with_what_is_there(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"split": "val", "sha256": SHA["a"], "names": ["x", "y"]}
    output = output_of(tmp_path, verb)
    assert output.finished(settings) is None, "nothing is there"
    output.begin(settings)
    assert output.finished(settings) is None, "begun: it goes on"
    with pytest.raises(ValueError, match=r"was begun with other settings \(split: 'val' then, 'test' now\)"):
        output.finished({**settings, "split": "test"})
    output.folder.write_json("result.json", {"found": 1})
    assert output.finished(settings) == {"found": 1}
    assert f"{verb}.overwrite=true" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is complete with other settings") as caught:
        output.finished({**settings, "sha256": SHA["b"], "names": ["x", "z"]})
    said = str(caught.value)
    assert f"(sha256: {'a' * 12}... then, {'b' * 12}... now, names: ['x', 'y'] then, ['x', 'z'] now)" in said
    assert f"{verb}.name=" in said
    assert f"{verb}.overwrite=true" in said
    assert "\n" not in said

    other = output_of(tmp_path, verb, name="second")
    assert other.finished({**settings, "split": "test"}) is None, "side by side"
    output.folder.write("left.png", b"of the first")
    replacing = output_of(tmp_path, verb, overwrite=True)
    assert replacing.finished({**settings, "split": "test"}) is None
    assert output.folder.exists("result.json"), "nothing is removed before there is something new"
    replacing.begin({**settings, "split": "test"})
    assert set(output.folder.list()) == {"settings.json", "run.yaml"}
    assert runfile.load(Path(output.folder.uri) / "run.yaml") == replacing.config


def test_a_result_of_before_there_were_settings_is_compared_too(tmp_path: Path) -> None:
    for verb, result in (
        ("evaluate", {"map50": 0.5, "split": "val"}),
        ("export", {"settings": {"split": "val"}}),
    ):
        output = output_of(tmp_path, verb)
        output.folder.write_json("result.json", result)
        assert output.finished({"split": "val", "new_setting": 1}) == result
        with pytest.raises(ValueError, match="split: 'val' then, 'train' now"):
            output.finished({"split": "train"})


def test_the_folder_of_another_is_never_taken(tmp_path: Path) -> None:
    output_of(tmp_path, "predict", name="results").begin({})
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"is an output of predict: choose another evaluate\.name"):
            output_of(tmp_path, "evaluate", name="results", overwrite=overwrite).finished({})
    mine = output_of(tmp_path, "export", name="mine")
    mine.folder.write("weights/a.pt", b"staged by an export that was killed")
    assert mine.finished({}) is None
    (tmp_path / "run" / "mine" / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="holds files that are no output of evaluate"):
            output_of(tmp_path, "evaluate", name="mine", overwrite=overwrite).finished({})


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("train", "taken"),
        ("Dataset", "taken"),
        ("run.yaml", "taken"),
        ("tune", "taken"),
        ("a/b", "letters"),
        ("..", "letters"),
        ("", "letters"),
        (".hidden", "letters"),
    ],
)
def test_names_of_others_are_refused(tmp_path: Path, verb: str, name: str, said: str) -> None:
    (tmp_path / "run.yaml").write_text("name: run\n")
    with pytest.raises(ValueError, match=said) as caught:
        runfile.load(tmp_path / "run.yaml", [f"{verb}.name='{name}'"], verb)
    assert f"{verb}.name" in str(caught.value)
    for other in set(VERBS) - {verb}:
        with pytest.raises(ValueError, match=f"'{other}' is taken by another part of the run"):
            runfile.load(tmp_path / "run.yaml", [f"{verb}.name={other}"], verb)
    assert getattr(runfile.load(tmp_path / "run.yaml", [f"{verb}.name={verb}"]), verb).name == verb


def test_differences_are_short() -> None:
    before = {"names": [f"class {i}" for i in range(80)], "train": {"yolo": {"lr0": 0.1, "box": 7}}}
    now = {"names": [*before["names"][:79], "other"], "train": {"yolo": {"lr0": 0.2, "cls": 1}}, "new": 1}
    assert outputs.differing(before, now) == (
        "names 79: 'class 79' then, 'other' now, train.yolo.lr0: 0.1 then, 0.2 now, "
        "train.yolo.cls: None then, 1 now, train.yolo.box: 7 then, None now"
    )
    assert len(outputs.differing({"a": "x" * 1000}, {"a": "y" * 1000})) < 200


def test_a_finished_dataset_of_another_source_is_not_kept_silently(tmp_path: Path) -> None:
    def config_of(**section: Any) -> RunConfig:
        return RunConfig.model_validate(
            {"name": "run", "storage": str(tmp_path), "prepare": {"format": "shapes", **section}}
        )

    config = config_of()
    dataset = config.folder / "dataset"
    Manifest(task="detect", class_names=("a",), splits={}, source="shapes").save(dataset)
    prepare.run(config)  # one of before there were settings: what is known is compared
    dataset.write_json(outputs.SETTINGS, prepare._made_from(config.prepare))  # type: ignore[arg-type]
    prepare.run(config)
    for section, said in (
        (
            {"format": "voc", "source": "/data"},
            r"source: 'shapes' then, '/data' now.*'shapes' then, 'voc' now",
        ),
        ({"task": "segment"}, "task: 'detect' then, 'segment' now"),
        ({"shapes": {"train": 7}}, "shapes.train: 400 then, 7 now"),
        ({"max_pixels": 1000}, "max_pixels: 178956970 then, 1000 now"),
    ):
        for run in (prepare.run, prepare.check):
            with pytest.raises(ValueError, match=said) as caught:
                run(config_of(**section))
            assert "prepare.overwrite=true" in str(caught.value)
    joined = json.loads(dataset.read("manifest.json")) | {"source": "/one + /two"}
    dataset.write_json("manifest.json", joined)
    prepare.run(config_of(format="voc", source="/two"))  # appended, from another format
