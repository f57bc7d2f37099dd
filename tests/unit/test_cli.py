"""The command line without Ray: parsing, exit codes, one clear line an error, dry runs, and nothing heavy imported for --help."""

from __future__ import annotations

import subprocess
import sys
import types
from pathlib import Path

import pytest

from raypar import cli, config
from raypar.cli import main

REPOSITORY = Path(__file__).resolve().parents[2]
HEAVY = ("ray", "torch", "ultralytics", "pyarrow", "pydantic", "numpy", "yaml", "cv2")


@pytest.fixture
def run_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"name: test\nstorage: {tmp_path / 'runs'}\nprepare: {{format: shapes}}\ntrain: {{use_gpu: false}}\n"
    )
    return str(path)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """`prepare` replaced by a module that notes its calls, with Ray left out."""
    module = types.SimpleNamespace(calls=[])
    module.check = lambda c: module.calls.append("check")
    module.run = lambda c: module.calls.append("run")
    monkeypatch.setitem(sys.modules, "raypar.prepare", module)
    fake_cluster = types.SimpleNamespace(
        connect=lambda **_: module.calls.append("connect"), num_gpus=lambda: 0.0, needs=lambda verb, config, gpus: (1.0, 0.0),
        require=lambda cpus, gpus: module.calls.append("require"), task_cause=lambda error: error,
        check_without_starting=lambda verb, config: "enough",
    )  # fmt: skip
    import raypar

    monkeypatch.setitem(sys.modules, "raypar.cluster", fake_cluster)  # type: ignore[arg-type]
    monkeypatch.setattr(raypar, "cluster", fake_cluster, raising=False)
    return module


def test_help_imports_nothing_heavy_and_is_quick() -> None:
    code = f"""
import sys, time
started = time.process_time()
from raypar.cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
seconds = time.process_time() - started
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
assert seconds < 0.3, seconds
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in config.VERBS:
        assert name in done.stdout
    assert "folders of classes" in done.stdout


def test_config_and_runfile_import_no_ray_and_no_torch() -> None:
    code = "import sys, raypar.config, raypar.runfile; assert not {'ray', 'torch', 'ultralytics'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0


def test_verbs_are_the_configs() -> None:
    assert tuple(cli.VERBS) == config.VERBS
    assert set(config.VERBS) < set(config.RunConfig.model_fields), "each has its section"


@pytest.mark.parametrize(("arguments", "said"), [
    (["trian", "run.yaml"], "there is no 'trian'; did you mean 'train'?"), (["train"], "required: RUN_FILE\n"),
    (["train", "run.yaml", "--batch", "8"], "settings are written without dashes, as train.batch=32"),
])  # fmt: skip
def test_usage_errors_say_what_was_meant(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_python_m_raypar() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raypar", "--version"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        check=True,
    )
    assert done.stdout.startswith("raypar 0.")


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["teach", "run.yaml"], ["train", "run.yaml", "--nosuch"]]
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2


def test_order_of_a_run(run_file: str, verb: types.SimpleNamespace, tmp_path: Path) -> None:
    assert main(["prepare", run_file, "seed=7"]) == 0
    assert verb.calls == ["check", "connect", "require", "run"]
    written = (tmp_path / "runs/test/run.yaml").read_text()
    assert "seed: 7" in written
    for package in ("raypar", "ray", "ultralytics", "torch", "Python"):
        assert package in written.splitlines()[-1]


def test_a_trainings_run_file_is_not_rewritten_by_other_verbs(
    run_file: str, verb: types.SimpleNamespace, tmp_path: Path
) -> None:
    main(["prepare", run_file, "seed=7"])
    (tmp_path / "runs/test/train").mkdir()
    (tmp_path / "runs/test/train/settings.json").write_text("{}")
    assert main(["prepare", run_file, "seed=8"]) == 0
    assert "seed: 7" in (tmp_path / "runs/test/run.yaml").read_text()


def test_written_run_file_can_be_run_again(
    run_file: str, verb: types.SimpleNamespace, tmp_path: Path
) -> None:
    main(["prepare", run_file, "seed=7"])
    from raypar import runfile

    assert runfile.load(tmp_path / "runs/test/run.yaml") == runfile.load(run_file, ["seed=7"])


def test_dry_run_starts_and_writes_nothing(
    run_file: str, verb: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", run_file, "--dry-run", "train.yolo.lr0=1e-3"]) == 0, (
        "overrides may follow options"
    )
    assert verb.calls == ["check"]
    assert not (tmp_path / "runs").exists()
    printed = capsys.readouterr().out
    assert "lr0: 0.001" in printed
    assert printed.count("\nok ") == 3


def test_dry_run_goes_through_all_checks(
    run_file: str, verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise ValueError("no images there: name another source")

    verb.check = fail
    assert main(["prepare", run_file, "--dry-run"]) == 2
    printed = capsys.readouterr()
    assert "ok      storage" in printed.out
    assert "failed  prepare's settings" in printed.out
    assert "ok      CPUs and GPUs: enough" in printed.out
    assert "error: no images there: name another source" in printed.err


def test_dry_run_asks_an_unreachable_store_once(
    run_file: str, verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", run_file, "--dry-run", "storage=foo://x"]) == 2
    printed = capsys.readouterr()
    assert verb.calls == [], "what lies in the storage cannot be checked"
    assert "failed  storage\n" in printed.out
    assert "skipped prepare's settings and inputs" in printed.out
    assert "ok      CPUs and GPUs: enough" in printed.out
    assert printed.err.startswith("error: storage foo://x cannot be reached")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_inputs_that_cannot_be_read_are_one_line(
    run_file: str, verb: types.SimpleNamespace, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """They may lie in another store than the run does: ``dataset=s3://...``."""

    def fail(config: object) -> None:
        raise OSError("When resolving region for bucket 'nope':\nAWS Error NETWORK_CONNECTION")

    verb.check = fail
    assert main(["prepare", run_file, *options]) == 2
    said = capsys.readouterr().err
    assert (
        said
        == "error: the inputs cannot be read: When resolving region for bucket 'nope': AWS Error NETWORK_CONNECTION\n"
    )
    assert "connect" not in verb.calls


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_no_cluster_at_ray_address_is_one_line(
    run_file: str,
    verb: types.SimpleNamespace,
    options: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(verb: str, config: object) -> str:
        raise ConnectionError("Failed to connect to Ray cluster at 1.2.3.4:6379") from RuntimeError("404")

    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:6379")
    monkeypatch.setattr(sys.modules["raypar.cluster"], "check_without_starting", fail)
    assert main(["prepare", run_file, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        "error: RAY_ADDRESS=1.2.3.4:6379: no Ray cluster answers there: correct it, or unset it"
    )
    assert said.count("\n") == 1


def test_unknown_settings_were_meant_for_the_verb(run_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", run_file, "imgsz=640"]) == 2
    assert (
        capsys.readouterr().err
        == "error: imgsz=640: imgsz: no such setting; did you mean 'evaluate.imgsz'?\n"
    )


def test_user_errors_are_one_line_without_traceback(
    run_file: str, verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise ValueError("the source is not there")

    verb.check = fail
    assert main(["prepare", run_file]) == 2
    assert capsys.readouterr().err == "error: the source is not there\n"
    assert "connect" not in verb.calls, "before Ray starts"


def test_user_errors_out_of_ray_tasks(
    run_file: str,
    verb: types.SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from ray.exceptions import RayTaskError

    monkeypatch.delitem(sys.modules, "raypar.cluster")
    from raypar import cluster

    wrapped = RayTaskError("f", "Traceback ...", ValueError("class 7 is out of range"))
    assert isinstance(cluster.task_cause(wrapped.as_instanceof_cause()), ValueError)

    def fail(config: object) -> None:
        raise RuntimeError("the stream failed") from wrapped

    monkeypatch.setattr(cluster, "connect", lambda **_: None)
    monkeypatch.setattr(cluster, "num_gpus", lambda: 0.0)
    monkeypatch.setattr(cluster, "require", lambda cpus, gpus: None)
    verb.run = fail
    assert main(["prepare", run_file]) == 2
    assert capsys.readouterr().err == "error: class 7 is out of range\n"


def test_bugs_show_their_traceback(
    run_file: str, verb: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(config: object) -> None:
        raise KeyError("oops")

    verb.run = fail
    assert main(["prepare", run_file]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130(run_file: str, verb: types.SimpleNamespace) -> None:
    def interrupt(config: object) -> None:
        raise KeyboardInterrupt

    verb.run = interrupt
    assert main(["prepare", run_file]) == 130


def test_relative_storage_starts_here(
    run_file: str, verb: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", run_file, "storage=elsewhere"]) == 0
    assert (tmp_path / "elsewhere/test/run.yaml").exists()


def test_relative_storage_of_a_job_starts_at_home(
    run_file: str,
    verb: types.SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A job's working folder is removed after it: what it wrote there would be lost."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "job").mkdir()
    monkeypatch.chdir(tmp_path / "job")
    assert main(["prepare", run_file, "storage=kept"]) == 0
    assert (tmp_path / "home/kept/test/run.yaml").exists()
    assert list((tmp_path / "job").iterdir()) == []
    assert "storage: 'kept' is " in capsys.readouterr().out


@pytest.mark.parametrize("storage", ["foo://x", "/etc/passwd/x"])
def test_unreachable_storage(
    run_file: str, verb: types.SimpleNamespace, storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prepare", run_file, f"storage={storage}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: storage {storage}")
    assert said.count("\n") == 1
    assert not verb.calls


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "train.num_worker=2"], "did you mean 'num_workers'?"),
        (["train", "train.yolo.epoch=2"], "did you mean 'epochs'?"),
        (["train"], "run `raypar prepare`"),
        (["evaluate"], "run `raypar prepare`"),
        (["serve"], "there are no weights"),
        (["export"], "there are no weights"),
        (["predict", "predict.source=/no/such/folder"], "error: "),
        (["prepare", "prepare.format=voc", "prepare.source=/no/such/folder"], "/no/such/folder"),
    ],
)
def test_mistakes_of_real_verbs(
    run_file: str, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([arguments[0], run_file, *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error
    assert error.count("\n") == 1


def test_more_than_this_machine_has(run_file: str) -> None:
    """The numbers behind `error: 400 GPUs are needed ...`; the line itself is in the integration tests."""
    from raypar import cluster, runfile

    many = runfile.load(run_file, ["train.num_workers=400", "train.batch=400", "train.use_gpu=true"])
    assert cluster.needs("train", many, 0.0) == (401.0, 400.0)
    with pytest.raises(ValueError, match="400 GPUs are needed, a Ray on this machine has"):
        cluster.check_without_starting("train", many)
    serve = runfile.load(
        run_file,
        ["serve.num_replicas.min=3", "serve.num_replicas.max=9", "serve.use_gpu=true", "serve.num_gpus=0.5"],
    )
    assert cluster.needs("serve", serve, 4.0) == (3.0, 1.5)
    assert cluster.needs("evaluate", runfile.load(run_file, ["evaluate.num_workers=5"]), 0.0) == (5.0, 0.0)


@pytest.mark.parametrize(
    ("status", "does"),
    [
        (None, False),
        (b'{"monitor_pid": 7}', False),
        (
            b'{"monitor_pid": 7, "autoscaler_report": {"active_nodes": {"node_a1b2c3": 1}, "idle_nodes": null}}',
            False,
        ),
        (b'{"monitor_pid": 7, "autoscaler_report": {"active_nodes": {"head": 1}, "idle_nodes": {}}}', True),
        (b'{"autoscaler_report": {"active_nodes": {}, "idle_nodes": {"local.cluster.node": 2}}}', True),
    ],
)
def test_only_a_cluster_with_node_types_can_grow(status: bytes | None, does: bool) -> None:
    """A plain `ray start --head` runs a monitor as well: what it lacks will never come."""
    from raypar import cluster

    assert cluster.grows(status) is does
