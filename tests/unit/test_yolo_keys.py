"""Every setting of Ultralytics under ``train.yolo``: one that is honoured changes what is computed, one that is refused says why.

No Ray: the parts of a training worker are put together here, around models of a few layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ultralytics.utils import nms

import raypar.detector
import raypar.train
from raypar import runfile
from raypar.config import RunConfig
from raypar.dataset.formats import shapes
from raypar.dataset.ingest import ShardJob, write_shard
from raypar.dataset.manifest import Manifest, Split
from raypar.dataset.stream import render
from raypar.storage import Folder
from raypar.train import loop as loop_module
from raypar.train import worker as worker_module
from raypar.train.loop import Loop, to_tensors
from raypar.train.recipe import Lender, counted_classes, settings, validated_part
from raypar.train.validate import make_validator
from raypar.train.worker import Worker, is_validated, stream_spec
from raypar.tune import space
from raypar.yolo_keys import HONOURED, KEYS, REFUSED, TASKS, Honoured, chosen_classes, with_cfg, yolo_settings

Settings = dict[str, Any]
SIZE, BATCH, NUM_IMAGES = 64, 4, 12
CPU = torch.device("cpu")
HEADS = {
    "detect": ["Detect", ["nc"]], "segment": ["Segment", ["nc", 8, 8]], "pose": ["Pose26", ["nc", "kpt_shape"]],
    "obb": ["OBB", ["nc", 1]], "classify": ["Classify", ["nc"]],
}  # fmt: skip
POSE = {"kpt_shape": [5, 3], "reg_max": 1, "end2end": True}  # Pose26 has all of the losses of pose
# What other settings have when one is tried, so that it shows; mosaics bring in images by chance.
ALL: Settings = {
    "imgsz": SIZE,
    "epochs": 3,
    "close_mosaic": 0,
    "optimizer": "SGD",
    "warmup_epochs": 1.0,
    "nbs": 8,
}
PLAIN: Settings = {
    "mosaic": 0.0,
    "scale": 0.0,
    "translate": 0.0,
    "fliplr": 0.0,
    "hsv_h": 0.0,
    "hsv_s": 0.0,
    "hsv_v": 0.0,
}


def tiny(task: str, **more: Any) -> Settings:
    """A model yaml's content: five convolutions and the task's head."""
    body = [[-1, 1, "Conv", [channels, 3, 2]] for channels in (8, 8, 16, 16, 16)]
    head = [[-1 if task == "classify" else [2, 3, 4], 1, *HEADS[task]]]
    found = {"nc": 4, "backbone": body, "head": head, "yaml_file": "tiny.yaml", "scale": ""}
    return found | (POSE if task == "pose" else {}) | more


@pytest.fixture(scope="module", autouse=True)
def _quiet_torch() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Folder, Manifest]]:
    """For a task generated images, the same ones in train and val, in row groups of 4."""

    @cache
    def prepared(task: str) -> tuple[Folder, Manifest]:
        folder = Folder.at(str(tmp_path_factory.mktemp(task)))
        listing = shapes.scan({"train": NUM_IMAGES}, task)
        job = ShardJob(folder, "train/0.parquet", "train", "shapes", 4, tuple(listing.splits["train"]), 4, 10**7, 0, (72, 96), task,
                       listing.keypoint_shape)  # fmt: skip
        report = write_shard(job)
        assert report.shard is not None
        split = Split(
            shards=(report.shard,),
            num_images=NUM_IMAGES,
            num_boxes=report.num_boxes,
            boxes_per_class=(9, 5, 3, 1),
        )
        manifest = Manifest(task=task, class_names=listing.class_names, splits={"train": split, "val": split}, source="shapes",
                            keypoint_shape=listing.keypoint_shape, flip_idx=listing.flip_idx)  # fmt: skip
        return folder, manifest

    return prepared


class Tried:
    """A training of a task with some settings, as far as no Ray is needed."""

    def __init__(self, task: str, yolo: Settings, dataset: Folder, manifest: Manifest):
        self.task, self.dataset = task, dataset
        self.config = RunConfig.model_validate(
            {
                "name": "x",
                "storage": "/nowhere",
                "train": {"model": "x.yaml", "batch": BATCH, "albumentations": [], "yolo": yolo},
            }
        )
        self.yolo = self.config.train.yolo
        self.args = settings(self.yolo, batch=BATCH, seed=0, task=task)
        self.plan = {
            "row_groups": raypar.train._row_groups(self.config, manifest),
            "seed": 0,
            "global_batch": BATCH,
        }
        self.manifest = validated_part(manifest, self.args)

    def spec(self) -> Any:
        config = {"plan": self.plan, "cache": None, "train": {"albumentations": []}}
        return stream_spec(config, self.args, self.manifest, self.dataset, 1)

    def lender(self, **more: Any) -> Lender:
        model = tiny(self.task, **({"end2end": True} if "nms" in self.yolo else {}))
        return Lender(self.yolo, model=model, manifest=self.manifest, batch=BATCH, seed=0, device=CPU,
                      class_counts=counted_classes(self.spec(), self.manifest, self.args), **more)  # fmt: skip

    def loop(self) -> Loop:
        plan = self.spec().plan
        return Loop(self.lender(), num_images=plan.num_images, steps_per_epoch=plan.steps_per_epoch)


def seen(tried: Tried) -> Any:
    """All that the model gets to see in the first and in the last epoch, byte by byte."""
    spec = tried.spec()
    epochs = {0, min(spec.plan.epochs, 20) - 1}
    found: list[Any] = [spec.plan.num_images, spec.plan.epochs]
    for item in spec.plan.items():
        if item.epoch > max(epochs):
            break
        if item.epoch in epochs:
            for batch in render(spec, item):
                found.append([None if x is None else x.tobytes() for x in (batch.images, batch.class_ids, batch.boxes_xywhn, batch.image_index,
                              batch.masks, batch.keypoints, batch.boxes_xywhr)])  # fmt: skip
    return found


def built(tried: Tried) -> Any:
    """How the loop begins: which weights are trained, how they lie, what the model is called by, when training stops early."""
    loop = tried.loop()
    weights = dict(loop.lender.model.named_parameters())
    # fitness falls from the first epoch on
    stops = [bool(loop.stopper(epoch, 1 / epoch)) for epoch in range(1, 120)]
    convolution = weights["model.1.conv.weight"]
    return [
        {name: (x.requires_grad, list(x.shape)) for name, x in weights.items()},
        convolution.is_contiguous(memory_format=torch.channels_last),
        type(loop.model).__name__,
        stops,
        loop.nominal_accumulate,
        torch.are_deterministic_algorithms_enabled(),
        [m.p for m in loop.lender.model.modules() if isinstance(m, torch.nn.Dropout)],
    ]


def learnt(tried: Tried) -> Any:
    """Losses, learning rates, momenta and weights over two epochs of steps on the same images."""
    loop = tried.loop()
    spec = tried.spec()
    batches = [to_tensors(batch) for batch in render(spec, next(spec.plan.items()))]
    found: list[Any] = []
    for step in range(2 * len(batches)):
        if step % len(batches) == 0:
            loop.start_epoch()
        torch.manual_seed(step)
        batch = {name: value.clone() for name, value in batches[step % len(batches)].items()}
        losses = {name: float(value) for name, value in loop.step(batch, step).items()}
        found.append((losses, [(g["lr"], g.get("momentum")) for g in loop.optimizer.param_groups]))
    found.append(type(loop.optimizer).__name__)
    return [*found, *(float(p.detach().double().sum()) for p in loop.lender.model.parameters())]


def validated(tried: Tried) -> Any:
    """What the validation of a model that is sure of many boxes finds: its boxes after NMS, and the metrics."""
    lender = tried.lender()
    model: Any = lender.model.eval()
    if tried.task != "classify":
        torch.manual_seed(0)
        for branch in ("cv3", "one2one_cv3"):
            for level in getattr(model.model[-1], branch, None) or ():
                torch.nn.init.normal_(level[-1].bias, 0.0, 1.0)
    found: list[Any] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        kept = real(*args, **kwargs)
        found.append([x.detach().numpy().round(3).tolist() for x in kept])
        return kept

    real = nms.non_max_suppression
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "non_max_suppression", watched)
        patch.setattr(raypar.detector, "non_max_suppression", watched)
        metrics = make_validator(lender, tried.dataset, rank=0, world_size=1, batch=4)(model, model, CPU)
    return [found, {key: value for key, value in metrics.items() if not key.startswith("val/")}]


def remapped(tried: Tried) -> Any:
    """The class outputs of a model that takes over weights whose classes stand in another order."""
    names = tried.manifest.class_names
    source = Tried(
        tried.task, ALL, tried.dataset, tried.manifest.model_copy(update={"class_names": names[::-1]})
    )
    lender = tried.lender(weights=source.lender().model)
    return [
        level[-1].bias.tolist() + level[-1].weight.flatten().tolist() for level in lender.model.model[-1].cv3
    ]


# For each honoured setting: a value, where it shows, and what else is set (in addition to ALL).
CHANGES: dict[str, tuple[Any, Callable[[Tried], Any], Settings]] = {
    "epochs": (5, seen, {}),
    "time": (1.0, seen, {}),
    "patience": (2, built, {}),
    "imgsz": (96, seen, {}),
    "cls_remap": (False, remapped, {}),
    "optimizer": ("AdamW", learnt, {}),
    "deterministic": (False, built, {}),
    "single_cls": (True, validated, {}),
    "cos_lr": (True, learnt, {}),
    "close_mosaic": (1, seen, {}),
    "fraction": (8, seen, {}),
    "freeze": (2, built, {}),
    "multi_scale": (0.5, learnt, {}),
    "compile": (True, built, {}),
    "channels_last": (True, built, {}),
    "mask_ratio": (2, seen, {}),
    "dropout": (0.5, built, {}),
    "conf": (0.6, validated, {}),
    "iou": (0.1, validated, {}),
    "max_det": (2, validated, {}),
    "nms": (False, validated, {}),
    "agnostic_nms": (True, validated, {}),
    "classes": ([0, 2], seen, {}),
    "lr0": (0.1, learnt, {}),
    "lrf": (0.5, learnt, {}),
    "momentum": (0.5, learnt, {}),
    "weight_decay": (0.5, learnt, {}),
    "warmup_epochs": (0.0, learnt, {}),
    "warmup_momentum": (0.1, learnt, {}),
    "warmup_bias_lr": (0.5, learnt, {}),
    "box": (1.0, learnt, {}),
    "cls": (5.0, learnt, {}),
    "cls_pw": (1.0, learnt, {}),
    "dfl": (9.0, learnt, {}),
    "pose": (1.0, learnt, {}),
    "kobj": (9.0, learnt, {}),
    "rle": (9.0, learnt, {}),
    "angle": (9.0, learnt, {}),
    "nbs": (64, built, {}),
    "hsv_h": (0.5, seen, PLAIN),
    "hsv_s": (0.9, seen, PLAIN),
    "hsv_v": (0.9, seen, PLAIN),
    "degrees": (45.0, seen, PLAIN),
    "translate": (0.4, seen, PLAIN),
    "scale": (0.9, seen, PLAIN),
    "shear": (20.0, seen, PLAIN),
    "perspective": (0.001, seen, PLAIN),
    "flipud": (1.0, seen, PLAIN),
    "fliplr": (1.0, seen, PLAIN),
    "bgr": (1.0, seen, PLAIN),
    "mosaic": (0.9, seen, PLAIN),
    "mixup": (1.0, seen, PLAIN),
    "cutmix": (1.0, seen, PLAIN),
    "auto_augment": ("autoaugment", seen, {}),
    "erasing": (1.0, seen, {}),
}
# Settings whose effect has a test of its own, below or elsewhere.
OTHERWISE = {
    "val": "test_an_epoch_is_validated_unless_told_otherwise",
    "plots": "test_plots_are_drawn_unless_told_otherwise",
    "cfg": "test_cfg_is_merged",
    "copy_paste": "test_copy_paste",
    "copy_paste_mode": "test_copy_paste",
}


KNOWN: dict[str, list[Any]] = {}  # what was observed without the setting that is tried


def test_every_setting_of_the_installed_ultralytics_is_in_the_table() -> None:
    assert set(KEYS) - set(yolo_settings()) == {"save_dir", "augmentations"}, "which Ultralytics accepts too"
    assert set(yolo_settings()) <= set(KEYS), "say of each new setting whether it is honoured"
    assert set(CHANGES) | set(OTHERWISE) == set(HONOURED)
    assert {name for name in OTHERWISE.values() if name not in globals()} == set()


@pytest.mark.parametrize(("key", "task"), [(key, task) for key in CHANGES for task in HONOURED[key].tasks])
def test_an_honoured_setting_changes_what_is_computed(
    key: str, task: str, datasets: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        loop_module.parallel, "compiled", lambda model, *_, **__: SimpleNamespace(plain=model)
    )
    value, observe, others = CHANGES[key]
    base = ALL | {name: x for name, x in others.items() if task in HONOURED[name].tasks}
    if key == "nms":  # of models with two heads
        base |= {"nms": None}
    if task == "classify" and key.startswith("hsv_"):  # which an automatic augmentation takes the place of
        base |= {"auto_augment": ""}
    if task == "classify":
        base |= {"erasing": 0.0}
        base.pop("close_mosaic")
    dataset, manifest = datasets(task)
    known = KNOWN.setdefault(f"{observe.__name__} {task} {sorted(base.items())}", [])
    while len(known) < 2:
        known.append(observe(Tried(task, base, dataset, manifest)))
    assert known[0] == known[1], "otherwise nothing could be said"
    assert observe(Tried(task, base | {key: value}, dataset, manifest)) != known[0]


@pytest.mark.parametrize(("key", "found"), REFUSED.items())
@pytest.mark.parametrize("is_default", [True, False])
def test_a_refused_setting_says_why_and_what_to_write(
    key: str, found: Any, is_default: bool, tmp_path: Path
) -> None:
    value = yolo_settings().get(key) if is_default else 1
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"name": "x", "train": {"yolo": {key: value}}})
    said = str(caught.value)
    assert f"'{key}' is refused: {found.reason}" in said
    assert (f"write {found.instead} instead" if found.instead else "leave it out") in said
    (tmp_path / "run.yaml").write_text("name: x\n")
    with pytest.raises(
        ValueError, match=rf"train\.yolo\.{key}=1: train\.yolo: '{key}' is refused"
    ) as caught_line:
        runfile.load(tmp_path / "run.yaml", [f"train.yolo.{key}=1"])
    assert "\n" not in str(caught_line.value)
    assert space._refusal(f"train.yolo.{key}").startswith(f"'{key}' is refused: ")


@pytest.mark.parametrize("task", TASKS)
def test_a_setting_of_other_tasks_is_refused(task: str) -> None:
    for key, found in HONOURED.items():
        if task in found.tasks:
            continue
        value = (
            CHANGES[key][0] if key in CHANGES else {"copy_paste": 0.5, "copy_paste_mode": "mixup"}[key]
        ) or 7
        with pytest.raises(ValueError, match=rf"train\.yolo\.{key}=.* has no effect for task '{task}'"):
            settings({key: value}, task=task)
        settings({key: yolo_settings()[key]}, task=task)


def test_tune_searches_honoured_settings_only() -> None:
    free = {key for key in yolo_settings() if not space._refusal(f"train.yolo.{key}")}
    assert free == set(HONOURED) - set(space.FIXED)
    assert not space._nearest("train.yolo.sav").endswith("save'?")


@pytest.mark.parametrize(("task", "has_effect"), [("detect", False), ("segment", True), ("obb", True)])
def test_copy_paste(task: str, has_effect: bool, datasets: Any) -> None:
    """Objects are pasted by their polygons, which the generated images of detect have none of."""
    dataset, manifest = datasets(task)
    base = ALL | PLAIN
    if has_effect:
        assert seen(Tried(task, base | {"copy_paste": 1.0}, dataset, manifest)) != seen(
            Tried(task, base, dataset, manifest)
        )
        with pytest.raises(ValueError, match=r"copy_paste_mode='mixup' is not supported: write flip"):
            Tried(task, base | {"copy_paste": 1.0, "copy_paste_mode": "mixup"}, dataset, manifest).spec()
        return
    with pytest.raises(ValueError, match=r"copy_paste=1\.0: the dataset has boxes without polygons"):
        Tried(task, base | {"copy_paste": 1.0}, dataset, manifest).spec()


def test_an_epoch_is_validated_unless_told_otherwise() -> None:
    for val, time, is_last, may_stop in np.ndindex(2, 2, 2, 2):
        args = SimpleNamespace(val=bool(val), time=1.0 if time else None)
        found = is_validated(args, is_last=bool(is_last), may_stop=bool(may_stop))
        assert found == bool(val or time or is_last or may_stop)


@pytest.mark.parametrize("plots", [True, False])
def test_plots_are_drawn_unless_told_otherwise(
    plots: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    worker, drawn = object.__new__(Worker), list[str]()
    worker.rank, worker.cursor = 0, 0
    worker.args = settings({"plots": plots})
    worker.plan, worker.spec = SimpleNamespace(global_batch=1), SimpleNamespace(mosaic_epochs=0)  # type: ignore[assignment]
    worker.class_names, worker.pulse, worker.out = [], SimpleNamespace(cursor=0), Folder.at(tmp_path)  # type: ignore[assignment]
    worker.watch = SimpleNamespace(aside=SimpleNamespace(submit=lambda name, _: drawn.append(name)))  # type: ignore[assignment]
    worker.epoch = SimpleNamespace(stepped=lambda *_: None)  # type: ignore[assignment]
    worker.loop = SimpleNamespace(step=lambda *_: {}, last_optimizer_step=-1)  # type: ignore[assignment]
    worker.world_size = 1
    monkeypatch.setattr(worker_module.pictures, "wants", lambda *_: True)
    monkeypatch.setattr(worker_module.pictures, "training_batch", lambda *_: b"")
    worker._step(SimpleNamespace(images=np.zeros(1)), {}, 0)  # type: ignore[arg-type]
    assert drawn == (["batch_0.png"] if plots else [])

    line = '{"epoch": 1, "images_seen": 4, "world_size": 1, "compute_dtype": "float32", "wait_s": 0, "step_s": 1, "validate_s": 1}'
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    (tmp_path / "results.csv").write_text("epoch,time,train/box_loss,metrics/mAP50(B)\n1,2,1,0\n")
    raypar.train._finish(Folder.at(tmp_path), "train", has_plots=plots)
    assert (tmp_path / "results.png").exists() == plots
    assert ("results.png" in capsys.readouterr().out) == plots


def test_cfg_is_merged(tmp_path: Path) -> None:
    (tmp_path / "hyp.yaml").write_text("lr0: 1e-3\nmosaic: 0.5\nepochs: 7\n")
    (tmp_path / "run.yaml").write_text(f"name: x\ntrain: {{yolo: {{cfg: {tmp_path}/hyp.yaml, epochs: 5}}}}\n")
    config = runfile.load(tmp_path / "run.yaml", ["train.yolo.mosaic=0.25"])
    assert config.train.yolo == {"lr0": 0.001, "epochs": 5, "mosaic": 0.25}, "what is written next to it wins"
    (tmp_path / "again.yaml").write_text(runfile.dump(config))
    assert runfile.load(tmp_path / "again.yaml") == config
    assert settings(config.train.yolo).lr0 == 0.001


def test_a_copy_of_all_defaults_is_a_cfg(tmp_path: Path) -> None:
    import ultralytics

    whole = Path(ultralytics.__file__).parent / "cfg" / "default.yaml"
    (tmp_path / "mine.yaml").write_text(whole.read_text().replace("fliplr: 0.5", "fliplr: 0.1"))
    assert with_cfg({"cfg": str(tmp_path / "mine.yaml")}) == {"fliplr": 0.1, "imgsz": 640}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimiser: SGD", "cfg FILE: 'optimiser' is no setting of Ultralytics; did you mean 'optimizer'?"),
        ("batch: 32\nlr0: 0.1", "cfg FILE: 'batch' is refused: raypar shares a step's images out to its workers; write train.batch instead"),
        ("cfg: other.yaml", "cfg FILE: it names another file, other.yaml"),
        ("[1, 2]", "cfg FILE: it holds list, not settings"),
        ("lr0: [1", "cfg FILE: no YAML: "),
        (None, "cfg FILE: cannot be read: No such file"),
    ],
)  # fmt: skip
def test_a_wrong_cfg_is_one_line(tmp_path: Path, text: str | None, said: str) -> None:
    path = tmp_path / "hyp.yaml"
    if text is not None:
        path.write_text(text)
    (tmp_path / "run.yaml").write_text(f"name: x\ntrain:\n  yolo:\n    cfg: {path}\n")
    with pytest.raises(ValueError) as caught:
        runfile.load(tmp_path / "run.yaml")
    assert f"run.yaml:3: train.yolo: {said.replace('FILE', str(path))}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("yolo", "said"),
    [
        ({"nms": True}, "embeds NMS in an exported model"),
        ({"fraction": [0.5, 1.0, 0.5]}, "training reads no test images"),
        ({"fraction": 0}, "fraction"),
        ({"fraction": [0.5, 0]}, "fraction"),
        ({"classes": "cat"}, "classes='cat': write class ids"),
        ({"classes": []}, "classes=[]: write class ids"),
        ({"classes": [True]}, "write class ids"),
        ({"classes": [-1]}, "write class ids"),
    ],
)
def test_a_value_without_meaning_is_refused(yolo: Settings, said: str) -> None:
    with pytest.raises(ValueError, match=r"train\.yolo") as caught:
        settings(yolo)
    assert said in str(caught.value)


@pytest.mark.parametrize("fraction", [0.5, 8, 1, 1.0, [0.5, 1.0], [8, 4], [1, 0.25, 1]])
def test_fraction_is_that_of_ultralytics(fraction: Any, datasets: Any) -> None:
    from ultralytics.data.utils import get_split_fraction

    dataset, manifest = datasets("detect")
    tried = Tried("detect", ALL | {"fraction": fraction}, dataset, manifest)
    expected = []
    for split in ("train", "val"):
        part = get_split_fraction(tried.args.fraction, split)
        expected.append(part if isinstance(part, int) else max(1, round(NUM_IMAGES * part)))
    assert [tried.spec().plan.num_images, tried.manifest.split("val").num_images] == expected
    metrics = make_validator(tried.lender(), dataset, rank=0, world_size=1, batch=4)(
        tried.lender().model.eval(), tried.lender().model, CPU
    )
    assert metrics["num_images"] == expected[1]


@pytest.mark.parametrize("task", HONOURED["classes"].tasks)
@pytest.mark.parametrize("is_single", [False, True])
def test_classes_are_those_of_ultralytics(task: str, is_single: bool, datasets: Any, tmp_path: Path) -> None:
    """The labels of YOLODataset with ``classes``, in training and in validation; class ids are kept."""
    dataset, manifest = datasets(task)
    kept = Tried(task, ALL | PLAIN | {"classes": [2, 0]}, dataset, manifest)
    whole = Tried(task, ALL | PLAIN, dataset, manifest)

    def labels(tried: Tried) -> list[tuple[int, ...]]:
        spec = tried.spec()
        return [
            (int(batch.rows[i]), int(c), *(round(float(x), 5) for x in box))
            for item in spec.plan.items() for batch in render(spec, item)
            for i, c, box in zip(batch.image_index, batch.class_ids, batch.boxes_xywhn, strict=True)
        ]  # fmt: skip

    assert labels(kept) == [label for label in labels(whole) if label[1] in (0, 2)] != labels(whole)
    yolo = ALL | {"classes": [0, 2], "single_cls": is_single}
    tried = Tried(task, yolo, dataset, manifest)
    found = [row for row in validated(tried)[1]["per_class"] if row["num_boxes"]]
    names = [row["class_name"] for row in found]
    assert names == (["item"] if is_single else ["circle", "triangle"])
    every = {row["class_name"]: row["num_boxes"] for row in validated(whole)[1]["per_class"]}
    assert sum(row["num_boxes"] for row in found) == every["circle"] + every["triangle"]


def test_class_weights_follow_the_labels_that_are_trained_on(datasets: Any) -> None:
    dataset, manifest = datasets("detect")
    part = Tried("detect", ALL | {"cls_pw": 1.0, "fraction": 4}, dataset, manifest)
    counts = part.lender().get_class_counts()
    spec = Tried("detect", ALL | PLAIN | {"fraction": 4, "epochs": 1}, dataset, manifest).spec()
    shown = np.concatenate([batch.class_ids for item in spec.plan.items() for batch in render(spec, item)])
    assert counts.tolist() == np.bincount(shown, minlength=4).tolist()
    some = Tried("detect", ALL | {"cls_pw": 1.0, "classes": [1, 3]}, dataset, manifest).lender()
    assert some.get_class_counts().tolist() == [0, 5, 0, 1]


def test_weights_are_taken_over_by_name_or_in_their_order(datasets: Any) -> None:
    dataset, manifest = datasets("detect")
    other = manifest.model_copy(update={"class_names": manifest.class_names[::-1]})
    source = Tried("detect", ALL, dataset, other).lender().model
    bias = source.model[-1].cv3[0][-1].bias
    with torch.no_grad():
        bias.copy_(torch.arange(4.0))
    for cls_remap, expected in ((True, [3.0, 2.0, 1.0, 0.0]), (False, [0.0, 1.0, 2.0, 3.0])):
        lender = Tried("detect", ALL | {"cls_remap": cls_remap}, dataset, manifest).lender(weights=source)
        assert lender.model.model[-1].cv3[0][-1].bias.tolist() == expected
        assert list(lender.model.names.values()) == list(manifest.class_names)


def test_chosen_classes() -> None:
    assert [chosen_classes(value) for value in (None, 3, [2, 0, 2])] == [None, (3,), (0, 2)]
    assert all(isinstance(KEYS[key], Honoured) for key in CHANGES)
