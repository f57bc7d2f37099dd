"""Watching without Ray: events files read back, loggers that fail, the report's page, the dashboard, the bar."""

from __future__ import annotations

import io
import json
import re
import struct
import threading
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raypar import progress
from raypar.progress import Progress
from raypar.storage import Folder
from raypar.train import charts, failure, pulse, report, worker
from raypar.train.loggers import Aside, Loggers, TensorBoard, values
from raypar.train.watch import COUNTERS, GAUGES, PREFIX, TAGS, Bar, Figures, Watch

REPOSITORY = Path(__file__).resolve().parents[2]


def line(epoch: int, **more: Any) -> dict[str, Any]:
    return {"epoch": epoch, "train/box_loss": 2.0 / epoch, "val/box_loss": 3.0 / epoch, "lr/pg0": 0.01 / epoch, "lr/pg1": 0.01 / epoch,
            "map50": 0.1 * epoch, "map50_95": 0.05 * epoch, "precision": 0.5, "recall": 0.5, "fitness": 0.05 * epoch, "images_per_s": 90.0,
            "wait_s": 1.0, "step_s": 8.0, "validate_s": 2.0, "checkpoint_s": 0.5, "world_size": 2, "images_seen": 48 * epoch,
            "compute_dtype": "float32", **more}  # fmt: skip


def crc32c(data: bytes) -> int:
    """Castagnoli's, bit by bit: as the format's description has it, and by nobody's code that wrote the file."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """(step, name, value) of all events files of a folder, in the order of their names: records are length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            body = data[12 : 12 + length]
            assert struct.unpack("<I", data[8:12]) == (masked(data[:8]),)
            assert struct.unpack("<I", data[12 + length : 16 + length]) == (masked(body),)
            event = Event.FromString(body)
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + length :]
    return found


def test_tensorboard_files_hold_each_epoch_once_over_a_resume(tmp_path: Path) -> None:
    history = [line(1), line(2), line(3)]
    first = TensorBoard(Folder.at(tmp_path))
    first(history[:1])
    first(history[:2])
    first(history)
    stale = (tmp_path / "tensorboard/events.out.tfevents.0000000003.raypar").stat().st_mtime_ns
    # its start ended before that was written
    (tmp_path / "tensorboard/events.out.tfevents.0000000002.raypar").unlink()
    again = TensorBoard(Folder.at(tmp_path), num_logged=2)  # goes back to the end of epoch 2
    again([*history[:2], line(3, map50=0.7)])
    found = scalars(tmp_path / "tensorboard")
    assert [step for step, name, _ in found if name == "metrics/map50"] == [1, 2, 3]
    assert {(s, n): v for s, n, v in found}[3, "metrics/map50"] == pytest.approx(0.7)
    assert {(s, n) for s, n, _ in found} == {(e, n) for e in (1, 2, 3) for n in values(line(1))}
    assert (tmp_path / "tensorboard/events.out.tfevents.0000000003.raypar").stat().st_mtime_ns != stale


def test_tensorboard_itself_reads_them(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    TensorBoard(Folder.at(tmp_path))([line(1), line(2)])
    seen = loader.EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(e.step, e.value) for e in seen.Scalars("train/box_loss")] == [(1, 2.0), (2, 1.0)]


def runs_of(mlflow: Any) -> list[Any]:
    client = mlflow.MlflowClient()
    return list(client.search_runs([client.get_experiment_by_name("raypar").experiment_id]))


def test_mlflow_gets_each_epoch_once_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    out, history = Folder.at(tmp_path / "train"), [line(1), line(2), line(3)]
    for epochs in ((1, 2), (2, 3)):  # killed after epoch 2, and again from epoch 1's checkpoint on
        loggers = Loggers(out, "x", {"batch": 16, "yolo": {"lr0": 0.01}}, num_logged=epochs[0] - 1)
        for epoch in epochs:
            loggers.named["mlflow"](history[:epoch])
        aside = Aside()
        loggers.submit_end(aside, "finished" if epochs == (2, 3) else "stopped")
        aside.end()
        if epochs == (1, 2):
            assert [r.info.status for r in runs_of(mlflow)] == ["KILLED"]
    client = mlflow.MlflowClient()
    (run,) = runs_of(mlflow)
    assert [m.step for m in client.get_metric_history(run.info.run_id, "metrics/map50")] == [1, 2, 3]
    assert run.data.params == {"batch": "16", "yolo.lr0": "0.01"}
    assert run.info.status == "FINISHED"


def test_wandb_gets_each_epoch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = Folder.at(tmp_path / "train")
    logger = Loggers(out, "x", {"batch": 16}).named["wandb"]
    logger([line(1)])
    logger([line(1), line(2)])
    ids = out.read_json("loggers.json")
    logger.end("stopped")
    assert ids["wandb_epoch"] == 2
    assert len(ids["wandb"]) == 12


def test_loggers_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    assert set(Loggers(Folder.at(tmp_path), "x", {}).named) == {"tensorboard"}


def test_what_fails_aside_is_told_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    aside, done = Aside(), list[str]()

    def fail() -> None:
        done.append("tried")
        raise RuntimeError("no server\nat all")

    for _ in range(3):
        aside.submit("mlflow", fail)
        aside.submit("tensorboard", lambda: done.append("logged"))
    aside.end()
    assert done == ["tried", "logged", "logged", "logged"]
    assert (
        capsys.readouterr().out.count(
            "mlflow is given up, metrics.jsonl has all metrics: RuntimeError: no server\n"
        )
        == 1
    )


def test_a_store_that_is_away_for_a_while_costs_no_logger(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raypar.storage.FIRST_PAUSE_S", 0.0)
    aside, left = Aside(), [2]

    def write() -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError("curlCode: 7, Couldn't connect to server")

    aside.submit("tensorboard", write)
    aside.end()
    said = capsys.readouterr().out
    assert said.count("storage: cannot bring tensorboard up to date (attempt") == 2
    assert "given up, metrics.jsonl" not in said
    assert not aside.failed


def test_a_logger_that_hangs_holds_the_end_up_no_longer_than_is_allowed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    aside, let_go = Aside(), threading.Event()
    aside.submit("mlflow", let_go.wait)
    aside.end(patience_s=0.1)
    assert "not everything could be logged" in capsys.readouterr().out
    let_go.set()


class Leaving:
    """A worker that is about to leave, and what it does then, in order."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        *,
        rank: int = 0,
        asked: str = "",
        error: Exception | None = None,
    ):
        self.done: list[str] = []
        self.worker = worker.Worker.__new__(worker.Worker)
        told = {name: lambda *_, name=name: self.done.append(name) for name in ("flush", "end")}
        vars(self.worker).update(
            rank=rank, cursor=8, saved_cursor=8, asked={asked}, history=[line(1)], pulse=SimpleNamespace(run_id="id"),
            agreement=SimpleNamespace(any=lambda _: self.done.append("others told")), saver=SimpleNamespace(**told) if rank == 0 else None)  # fmt: skip
        watch = Watch.__new__(Watch)
        vars(watch).update(worker=self.worker, aside=Aside(), is_ended=False, loggers=SimpleNamespace(
            submit_end=lambda aside, how: aside.submit("x", lambda: self.done.append(how))))  # fmt: skip

        def train() -> bool:
            if error is not None:
                raise error
            return self.worker._must_leave()

        monkeypatch.setattr(worker.say, "introduce", lambda _: None)
        monkeypatch.setattr(worker, "Watch", lambda *_: watch)
        monkeypatch.setattr(self.worker, "_train", train)


@pytest.mark.parametrize(
    ("asked", "result", "done"),
    [
        ("", line(1), ["flush", "end", "finished"]),
        ("stop", {"stopped": 8}, ["flush", "stopped", "others told", "flush", "end"]),
    ],
)
def test_loggers_are_closed_after_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch, asked: str, result: dict[str, Any], done: list[str]
) -> None:
    leaving = Leaving(monkeypatch, asked=asked)
    assert leaving.worker.run() == result
    assert leaving.done == done
    assert Leaving(monkeypatch, rank=1, asked=asked).worker.run() is None


@pytest.mark.parametrize("reason", ["preempted", "grow"])
def test_loggers_are_closed_before_workers_are_placed_anew(
    monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    leaving = Leaving(monkeypatch, asked=reason)
    with pytest.raises(failure.Restart):
        leaving.worker.run()
    assert leaving.done == ["flush", "stopped", "others told", "end"]


def test_loggers_are_closed_when_training_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    leaving = Leaving(monkeypatch, error=RuntimeError("all is lost"))
    with pytest.raises(RuntimeError, match="all is lost"):
        leaving.worker.run()
    assert leaving.done == ["end", "failed"]


class Page(HTMLParser):
    """Tags that are closed in order, sources, and text."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def a_page(history: list[dict[str, Any]], **more: Any) -> str:
    told: dict[str, Any] = {
        "settings": {"batch": 16, "yolo": {"epochs": 3}}, "environment": {"raypar": "0", "workers": ["rank 0: a", "rank 1: b"]},
        "events": [{"time": 0.0, "what": "worker 1 is lost & gone"}], "pictures": {"batch_0.png": b"\x89PNG"},
        "per_class": [{"class_name": "<b>", "num_boxes": 3, "precision": 0.5, "recall": 0.5, "map50": 0.5, "map50_95": 0.25},
                      {"class_name": "rare", "num_boxes": 0, "precision": None, "recall": None, "map50": None, "map50_95": None}],
    }  # fmt: skip
    return report.page("run <1>", "finished", history, **(told | more))


def test_page_is_whole_and_needs_nothing_else() -> None:
    text = a_page([line(1), line(2), line(3)])
    page = Page(text)
    assert not page.open
    assert page.sources == ["data:image/png;base64,iVBORw=="]
    assert "://" not in text
    assert "@import" not in text
    assert "<script" not in text
    assert "<td>&lt;b&gt;</td>" in text
    said = " ".join(page.words)
    for words in (
        "run <1>",
        "<b>",
        "worker 1 is lost & gone",
        "rank 0: a; rank 1: b",
        "yolo.epochs",
        "box loss",
        "wait for data",
        "1970-01-01",
    ):
        assert words in said, words
    # mAP, precision and recall, box loss, images/s, learning rate, seconds of epochs, seconds by stage
    assert page.tags.count("svg") == 7


@pytest.mark.parametrize(("prefix", "kind"), [("mask_", "mask"), ("pose_", "pose")])
def test_page_shows_the_scores_of_masks_and_keypoints(prefix: str, kind: str) -> None:
    keys = ("precision", "recall", "map50", "map50_95")
    scores = {f"{prefix}{key}": 0.111 * (i + 1) for i, key in enumerate(keys)}
    row = {"class_name": "a", "num_boxes": 3, **dict.fromkeys(keys, 0.9), **scores}
    text = a_page([line(1, **scores), line(2, **scores)], per_class=[row])
    assert f"<b>0.444</b><span>{kind} mAP 50-95, then</span>" in text
    assert f"<b>0.333</b><span>{kind} mAP 50, then</span>" in text
    for name in ("mAP 50-95", "mAP 50", "precision", "recall"):
        assert f"<title>{kind} {name}</title></polyline>" in text  # a curve
        assert f'<th class="n">{kind} {name}</th>' in text  # a column of the classes
    assert text.count("0.222") >= 2
    assert kind not in a_page([line(1)])


@pytest.mark.parametrize(
    "history",
    [[], [line(1)], [line(1, map50=float("nan"))], [{**line(i), "train/box_loss": float("inf")} for i in (1, 2)], [line(i) for i in range(1, 1001)],
     [{k: v for k, v in line(1).items() if "map" not in k and k != "fitness"}, line(2)], [line(1, world_size=1), line(2)],
     [{**{k: v for k, v in line(1).items() if "map" not in k}, "top1": 0.8, "top5": 0.9}]],
    ids=["none", "one", "nan", "inf", "many", "late", "elastic", "classify"],
)  # fmt: skip
def test_page_of_any_history(history: list[dict[str, Any]]) -> None:
    text = a_page(history, settings={}, environment={}, events=[], pictures={}, per_class=[])
    assert not Page(text).open
    assert len(text) < 300_000
    assert not re.search(r'points="[^"]*(nan|inf)', text)


def test_report_is_drawn_from_a_folder(tmp_path: Path) -> None:
    out = Folder.at(tmp_path)
    report.write(out, "x")
    assert "No epoch has ended yet" in out.read("report.html").decode()
    out.write("metrics.jsonl", "".join(json.dumps(line(i)) + "\n" for i in (1, 2)))
    out.write("batch_10.png", b"ten")
    out.write("batch_2.png", b"two")
    report.write(out, "x", "failed")
    text = out.read("report.html").decode()
    assert text.index("dHdv") < text.index("dGVu"), "steps in their order"
    assert ">failed<" in text


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 1.0), (0.013, 0.99), (-3.0, 7.0), (5.0, 5.0), (0.0, 0.0), (1e-6, 3e-6), (1, 123456)],
)
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert found == sorted(found)
    assert 2 <= len(found) <= 8
    assert found[0] <= low
    assert found[-1] >= high


def test_ticks_of_epochs_have_no_fractions() -> None:
    assert charts.ticks(1, 10, whole=True) == [0, 5, 10]
    assert charts.ticks(1, 2, whole=True) == [1, 2]
    assert charts.ticks(1, 40, whole=True) == [0, 10, 20, 30, 40]


def test_nothing_learnt_yet_is_drawn_at_the_foot() -> None:
    assert ">-0" not in charts.curves([1, 2], {"mAP": [0.0, 0.0]}, from_zero=True), "no axis below 0"


def a_figures(monkeypatch: pytest.MonkeyPatch, rank: int = 0) -> tuple[Figures, dict[str, float]]:
    """Figures whose metrics are written to a dict."""
    import ray.util.metrics

    told: dict[str, float] = {}

    class Metric:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            self.name, self.tag_keys = name, tag_keys

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert set(tags) <= set(self.tag_keys)

        def set(self, value: float) -> None:
            told[self.name] = value

        def inc(self, value: float, tags: dict[str, str]) -> None:
            assert value > 0
            name = f"{self.name} {tags['stage']}"
            told[name] = told.get(name, 0.0) + value

    monkeypatch.setattr(ray.util.metrics, "Gauge", Metric)
    monkeypatch.setattr(ray.util.metrics, "Counter", Metric)
    model = SimpleNamespace(_get_ddp_logging_data=lambda: {"avg_backward_comm_time": 2_500_000})
    return Figures("x", rank, model), told


def test_figures_say_what_the_pulse_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    figures, told = a_figures(monkeypatch)
    life: Any = SimpleNamespace(
        seconds=lambda: {"wait": 1.0}, memory_gb=lambda: 2.0, cursor=100, total=1000, world_size=2
    )
    now = [50.0]
    monkeypatch.setattr("raypar.train.watch.time", SimpleNamespace(monotonic=lambda: now[0]))
    figures.on_beat(life)
    now[0] += 2.0
    life.cursor, life.seconds = 180, lambda: {"wait": 1.5, "step": 3.0}
    figures.on_beat(life)
    assert told == {
        PREFIX + "stage_seconds wait": 1.5, PREFIX + "stage_seconds step": 3.0, PREFIX + "all_reduce_seconds": 0.0025,
        PREFIX + "memory_gigabytes": 2.0, PREFIX + "images_per_second": 40.0, PREFIX + "images_seen": 180, PREFIX + "images_total": 1000,
        PREFIX + "world_size": 2}  # fmt: skip
    figures.on_epoch(line(2))
    assert (told[PREFIX + "epoch"], told[PREFIX + "map50"], told[PREFIX + "loss"]) == (2, 0.2, 1.0)


def test_dashboard_asks_for_what_is_exported() -> None:
    board = json.loads((REPOSITORY / "docs/grafana.json").read_text())
    worker = (REPOSITORY / "raypar/train/worker.py").read_text()
    expressions = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    asked = {name for expression in expressions for name in re.findall(r"\bray_raypar_\w+", expression)}
    exported = {f"ray_{PREFIX}{name}" for name in GAUGES} | {f"ray_{PREFIX}{name}_total" for name in COUNTERS}
    assert asked == exported, "each figure is shown, and no other is asked for"
    variables = [v["definition"] for v in board["templating"]["list"] if "definition" in v]
    assert {v["query"]["query"] for v in board["templating"]["list"] if "definition" in v} == set(variables)
    for name, label in (
        re.fullmatch(r"label_values\((\w+), (\w+)\)", variable).groups() for variable in variables
    ):  # type: ignore[union-attr]
        assert name in exported
        assert label in TAGS
    for expression in expressions:
        labels = {"run", "rank", "stage"} if "stage_seconds" in expression else set(TAGS)
        named = {
            label for group in re.findall(r"(?:by|on) \(([^)]*)\)", expression) for label in group.split(", ")
        }
        matched = dict(re.findall(r'(\w+)=~?"([^"]*)"', expression))
        assert named | set(matched) <= labels, expression
        if "stage" in matched:
            assert f'pulse.stage = "{matched["stage"]}' in worker, "a stage that workers are in"
        assert expression.count("(") == expression.count(")"), expression
        assert 'run=~"$run"' in expression, expression
    for panel in board["panels"]:
        shown = {
            label for target in panel["targets"] for label in re.findall(r"{{(\w+)}}", target["legendFormat"])
        }
        for target in panel["targets"]:
            assert shown <= set(re.search(r"by \(([^)]*)\)", target["expr"])[1].split(", ")), panel["title"]  # type: ignore[index]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def beat(cursor: int) -> pulse.Beat:
    return pulse.Beat(0, 1, "a", 1, "step", 0.0, cursor, 1, 0.1, total=100)


def test_bar_follows_the_signs_of_life_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, now = Terminal(), [0.0]
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    bar = Bar("run")
    for seconds, cursor in ((0, 20), (10, 40), (20, 30), (30, 50)):  # resumed at 20, then gone back to 30
        now[0] = float(seconds)
        bar.show(beat(cursor))
    drawn = [text.strip() for text in screen.getvalue().split("\r") if text.strip()]
    assert drawn == [
        "train [########            ] 40/100 images, 2.0/s, 0:30 left",
        "train [##########          ] 50/100 images, 2.0/s, 0:25 left",
    ]
    assert all(len(text) <= 79 for text in screen.getvalue().split("\r"))


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr("sys.stderr", log)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    work = Progress(10_000, "images", "predict")
    for second in range(1, 21):
        now[0] = float(second)
        work.update(100)
    assert log.getvalue().splitlines() == [
        "predict: 1000/10000 images, 100.0/s, 1:30 left",
        "predict: 2000/10000 images, 100.0/s, 1:20 left",
    ]
