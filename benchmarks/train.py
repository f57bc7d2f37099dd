"""Training on a CPU: raypar against ``yolo train``, and against its own parts.

    python benchmarks/train.py [--voc ../shared/data/bccd] [--epochs 4] [--pairs 3] [--imgsz 320] [--full [--seeds 2]] [--as-it-comes]

Both sides train yolov8n from scratch on the same images, batch 16, in processes of their own, in turn. The rival at its best: on a CPU Ultralytics
trains with a thread less than there are cores, whatever OMP_NUM_THREADS says; here it gets every core (--as-it-comes: not). Rates are of whole epochs (data, steps, validation, saving), the first one
left out on both sides; wall times are of the whole command, start included. The guard: --full trains 40 epochs with each seed and compares mAP.

Beside it: our loop on one cached batch in bf16 against fp32, which is all that this chip can give; one worker with its stream against that
loop; two workers with one thread against one; and two ranks that Ray Train starts against the same function under torchrun. Epochs count only while the stream still makes images for later ones.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.update(YOLO_OFFLINE="1", YOLO_AUTOINSTALL="0", YOLO_VERBOSE="false", NO_ALBUMENTATIONS_UPDATE="1")
os.environ.update(RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", RAY_DATA_DISABLE_PROGRESS_BARS="1")
REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
sys.path.insert(0, str(REPOSITORY))

import _data
import _measure

from raypar.dataset.stream import LOOK_AHEAD_IMAGES

CORES = len(os.sched_getaffinity(0))
BATCH = 16
WARM_STEPS, STEPS = 4, 16
BESIDE_EPOCHS = 10  # of the runs that compare raypar with itself


@dataclass(frozen=True)
class Trained:
    """One training: seconds of the whole command, of an epoch after the first, and of its data and steps alone; metrics."""

    wall_s: float
    epoch_s: float
    step_s: float  # of epochs during which the stream still makes images
    map50: float
    map50_95: float
    images_per_s: float = 0.0  # of data and steps of an epoch after the first; of raypar


def ours(base: Path, imgsz: int, epochs: int, seed: int = 0, **train: Any) -> Trained:
    """``raypar train`` on a copy of the prepared run."""
    folder = Path(tempfile.mkdtemp(dir=base))
    run = {"name": "run", "storage": str(folder), "seed": seed,
           "train": {"use_gpu": False, "batch": BATCH, "yolo": {"epochs": epochs, "imgsz": imgsz}, **train}}  # fmt: skip
    (folder / "run").mkdir()
    (folder / "run/dataset").symlink_to(base / "prepared/run/dataset")
    (folder / "run.json").write_text(json.dumps(run))  # JSON is YAML
    wall_s = _call([sys.executable, "-m", "raypar", "train", str(folder / "run.json")], folder / "log.txt")
    lines = [json.loads(line) for line in (folder / "run/train/metrics.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line.get("fitness", 0.0))
    rest = lines[1:] or lines
    steps = [line["wait_s"] + line["step_s"] for line in rest]
    whole = [line["epoch_s"] for line in rest]
    # the last epochs' images are ready long before
    made_ahead = -(-LOOK_AHEAD_IMAGES * epochs // lines[-1]["images_seen"])
    busy = steps[:-made_ahead] or steps
    return Trained(wall_s, sum(whole) / len(whole), sum(busy) / len(busy), best["map50"], best["map50_95"],
                   median(line["images_per_s"] for line in rest))  # fmt: skip


def theirs(base: Path, data_yaml: Path, imgsz: int, epochs: int, seed: int = 0, *, threads: int | None = None, patch: str = "",
           **overrides: Any) -> Trained:  # fmt: skip
    """``yolo train device=cpu`` with so many threads, or as many as it takes by itself; ``patch`` is Python that runs before it."""
    folder = Path(tempfile.mkdtemp(dir=base))
    if threads:  # select_device sets it
        patch += f"import ultralytics.utils.torch_utils as u; u.NUM_THREADS = {threads}\n"
    told = {"model": "yolov8n.yaml", "data": data_yaml, "imgsz": imgsz, "batch": BATCH, "epochs": epochs, "seed": seed, "device": "cpu",
            "plots": False, "project": folder, "name": "run", **overrides}  # fmt: skip
    command = [sys.executable, "-c", f"{patch}from ultralytics.cfg import entrypoint\nentrypoint()", "detect", "train",
               *(f"{key}={value}" for key, value in told.items())]  # fmt: skip
    wall_s = _call(command, folder / "log.txt", OMP_NUM_THREADS=str(CORES))
    with (folder / "run/results.csv").open() as file:
        rows = [{key.strip(): float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    times = [row["time"] for row in rows]
    best = max(rows, key=lambda row: row["metrics/mAP50-95(B)"])
    epoch_s = (times[-1] - times[0]) / max(1, len(times) - 1)
    return Trained(wall_s, epoch_s, epoch_s, best["metrics/mAP50(B)"], best["metrics/mAP50-95(B)"])


def _call(command: list[str], log: Path, **environment: str) -> float:
    began = time.perf_counter()
    with log.open("w") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment}, check=False
        ).returncode
    if code:
        raise SystemExit(f"{' '.join(command)[:200]} ended with {code}:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - began


def steps_per_s(prepared: str, imgsz: int, rank: int, world_size: int, threads: int, global_batch: int = BATCH, *,
                model: str = "yolov8n.yaml", on: str = "cpu", yolo: dict[str, Any] | None = None, precision: str = "auto") -> float:  # fmt: skip
    """Our loop on one batch that stays on the device: global steps a second, on any process group that is up."""
    import torch

    from raypar.augment.geometry import Recipe
    from raypar.dataset.manifest import Manifest
    from raypar.dataset.plan import Plan
    from raypar.dataset.stream import StreamSpec, render
    from raypar.precision import pick_precision
    from raypar.storage import Folder
    from raypar.train.loop import Loop, to_tensors
    from raypar.train.recipe import Lender

    dataset = Folder.at(prepared) / "dataset"
    manifest = Manifest.load(dataset)
    device = torch.device(on)
    settings = {"epochs": 100, "imgsz": imgsz, **(yolo or {})}
    lender = Lender(settings, model=model, manifest=manifest, batch=global_batch, seed=0, device=device)
    torch.set_num_threads(threads)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    split = manifest.split("train")
    plan = Plan(
        tuple(n for shard in split.shards for n in shard.row_groups),
        seed=0,
        global_batch=global_batch,
        epochs=100,
    )
    spec = StreamSpec.of(dataset, split, plan, Recipe.from_yolo(vars(lender.args)), mosaic_epochs=90, albumentations=None,
                         world_size=world_size)  # fmt: skip
    batch = to_tensors(next(b for b in render(spec, next(plan.items())) if b.rank == rank))
    batch = {name: value.to(device) for name, value in batch.items()}
    loop = Loop(lender, num_images=plan.num_images, steps_per_epoch=plan.steps_per_epoch, world_size=world_size,
                precision=pick_precision(precision, device))  # fmt: skip
    loop.start_epoch()
    for step in range(WARM_STEPS + STEPS):
        if step == WARM_STEPS:
            wait()
            began = time.perf_counter()
        loop.step({name: value.clone() for name, value in batch.items()}, step)
    wait()
    return STEPS / (time.perf_counter() - began)


def alone(base: Path, imgsz: int, threads: int, precision: str = "auto") -> float:
    """The cached loop in a process of its own: images a second."""
    return BATCH * _asked(
        [sys.executable, __file__, "--rank", str(base / "prepared/run"), str(imgsz), str(threads), precision],
        threads,
    )


def under_torchrun(base: Path, imgsz: int) -> float:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return BATCH * _asked(
        [*launcher, __file__, "--rank", str(base / "prepared/run"), str(imgsz), "1", "auto"], 1
    )


def under_ray_train(base: Path, imgsz: int) -> float:
    return BATCH * _asked([sys.executable, __file__, "--ray", str(base / "prepared/run"), str(imgsz), "1"], 1)


def _asked(command: list[str], threads: int) -> float:
    found = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    if found.returncode:
        raise SystemExit(f"{' '.join(command)[:200]} ended with {found.returncode}:\n{found.stderr[-2000:]}")
    return float(next(line for line in found.stdout.splitlines() if line.startswith("rate ")).split()[1])


def as_rank(prepared: str, imgsz: int, threads: int, precision: str) -> None:
    """What torchrun starts, or one process alone."""
    import torch.distributed as dist

    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        dist.init_process_group("gloo")
    rate = steps_per_s(prepared, imgsz, rank, world_size, threads, precision=precision)
    if rank == 0:
        print("rate", rate, flush=True)
    if world_size > 1:
        dist.destroy_process_group()


def as_ray_driver(prepared: str, imgsz: int, threads: int) -> None:
    """Ray Train as ``raypar train`` starts it."""
    import ray.train

    from raypar.cluster import connect
    from raypar.train.launch import Trainer

    def train_loop(config: dict[str, Any]) -> float:
        import train  # this file

        context = ray.train.get_context()
        return train.steps_per_s(
            config["prepared"],
            config["imgsz"],
            context.get_world_rank(),
            context.get_world_size(),
            config["threads"],
        )

    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ["PYTHONPATH"]])
    connect()
    with tempfile.TemporaryDirectory() as folder:
        found = Trainer(
            run_id="benchmark", world_sizes=[2], placement_timeout_s=60,
            train_loop_per_worker=train_loop, train_loop_config={"prepared": prepared, "imgsz": imgsz, "threads": threads},
            scaling_config=ray.train.ScalingConfig(num_workers=2), run_config=ray.train.RunConfig(storage_path=folder)).fit()  # fmt: skip
    print("rate", found.return_value, flush=True)


def prepare(base: Path, section: dict[str, Any]) -> None:
    """``raypar prepare`` with a section, into ``base/prepared/run``."""
    run = base / "prepare.json"
    run.write_text(json.dumps({"name": "run", "storage": str(base / "prepared"), "prepare": section}))
    _call([sys.executable, "-m", "raypar", "prepare", str(run)], base / "prepare.log")


def prepared(base: Path, voc: Path | None) -> tuple[Path, int]:
    """Shards, and the same images and labels as a folder for Ultralytics: its data.yaml, and how many are trained on."""
    prepare(
        base,
        {"format": "voc", "source": str(voc)}
        if voc
        else {"format": "shapes", "shapes": {"train": 208, "val": 80}},
    )
    return _data.as_yolo(base / "prepared/run/dataset", base / "yolo")


def row(
    claim: str, pairs: list[tuple[float, float]], goal: float, names: tuple[str, str], unit: str
) -> dict[str, Any]:
    """Prints one claim: first over second, of pairs."""
    ratios = [a / b for a, b in pairs]
    sides = {name: round(median(pair[i] for pair in pairs), 2) for i, name in enumerate(names)}
    print(f"{claim}: {median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), goal {goal}; "
          + ", ".join(f"{name} {value} {unit}" for name, value in sides.items()), flush=True)  # fmt: skip
    return {"claim": claim, "ratio": round(median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3),
            "pairs": len(pairs), "goal": goal, "unit": unit, **sides}  # fmt: skip


def against_yolo(
    base: Path, data_yaml: Path, num_images: int, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[Trained]]:
    """Whole trainings, in turn."""
    pairs: list[tuple[Trained, Trained]] = []
    epochs, num_pairs = (40, options.seeds) if options.full else (options.epochs, options.pairs)
    threads = None if options.as_it_comes else CORES
    for i in range(num_pairs):
        seed = i if options.full else 0
        if i % 2:
            rival = theirs(base, data_yaml, options.imgsz, epochs, seed, threads=threads)
            mine = ours(base, options.imgsz, epochs, seed)
        else:
            mine = ours(base, options.imgsz, epochs, seed)
            rival = theirs(base, data_yaml, options.imgsz, epochs, seed, threads=threads)
        print(f"  {epochs} epochs, seed {seed}: raypar {mine.wall_s:.0f} s, mAP50 {mine.map50:.3f} mAP50-95 {mine.map50_95:.3f}; "
              f"yolo train {rival.wall_s:.0f} s, mAP50 {rival.map50:.3f} mAP50-95 {rival.map50_95:.3f}", flush=True)  # fmt: skip
        pairs.append((mine, rival))
    names = ("raypar", "yolo train" if threads else "yolo train as it comes")
    rates = [(num_images / a.epoch_s, num_images / b.epoch_s) for a, b in pairs]
    rows = [
        row("images/s of whole epochs, raypar / yolo train", rates, 2.0, names, "images/s"),
        row(
            f"seconds of the whole command, {epochs} epochs, raypar / yolo train",
            [(a.wall_s, b.wall_s) for a, b in pairs],
            0.7,
            names,
            "s",
        ),
    ]
    if options.full:
        gap = abs(median(a.map50 for a, _ in pairs) - median(b.map50 for _, b in pairs))
        print(f"guard: mAP50 differs by {gap:.3f} (0.03 allowed)")
        assert gap <= 0.03, gap
        rows[0]["map50_gap"] = round(gap, 4)
    return rows, [mine for mine, _ in pairs]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--voc", type=Path, help="a Pascal VOC folder; without it generated shapes")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--full", action="store_true", help="40 epochs a training, mAP compared")
    parser.add_argument(
        "--as-it-comes", action="store_true", help="Ultralytics with the threads that it takes by itself"
    )
    parser.add_argument("--seeds", type=int, default=2, help="pairs with --full, each with a seed of its own")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="raypar-train-") as name:
        base = Path(name)
        data_yaml, num_images = prepared(base, options.voc.absolute() if options.voc else None)
        print(f"{num_images} images, imgsz {options.imgsz}, batch {BATCH}, {CORES} cores", flush=True)
        rows, mine = against_yolo(base, data_yaml, num_images, options)
        beside: dict[str, list[tuple[float, float]]] = {
            "chip": [],
            "stream": [],
            "workers": [],
            "torchrun": [],
        }
        per_epoch = -(-num_images // BATCH) * BATCH  # an epoch: its last step is topped up
        for one in mine:
            if not options.full:  # a few epochs are all made ahead: the stream would cost nothing
                one = ours(base, options.imgsz, BESIDE_EPOCHS)
            cached = alone(base, options.imgsz, CORES)
            beside["chip"].append((cached, alone(base, options.imgsz, CORES, "fp32")))
            beside["stream"].append((per_epoch / one.step_s, cached))
            two, single = (
                ours(base, options.imgsz, BESIDE_EPOCHS, num_workers=n, threads_per_worker=1) for n in (2, 1)
            )
            beside["workers"].append((per_epoch / two.step_s, per_epoch / single.step_s))
            beside["torchrun"].append(
                (under_ray_train(base, options.imgsz), under_torchrun(base, options.imgsz))
            )
        rows.append(
            row(
                "images/s on one cached batch, bf16 / fp32", beside["chip"], 2.3, ("bf16", "fp32"), "images/s"
            )
        )
        rows.append(
            row(
                "images/s, with the stream / on one cached batch",
                beside["stream"],
                0.95,
                ("stream", "cached"),
                "images/s",
            )
        )
        rows.append(
            row(
                "images/s, 2 workers x 1 thread / 1 worker x 1 thread",
                beside["workers"],
                1.8,
                ("two", "one"),
                "images/s",
            )
        )
        rows.append(
            row(
                "images/s of 2 ranks, Ray Train / torchrun",
                beside["torchrun"],
                0.97,
                ("Ray Train", "torchrun"),
                "images/s",
            )
        )
    _measure.finish("train", rows, cores=CORES, images=num_images, imgsz=options.imgsz)


if __name__ == "__main__":
    if sys.argv[1:2] in (["--rank"], ["--ray"]):
        (as_rank if sys.argv[1] == "--rank" else as_ray_driver)(
            sys.argv[2], *map(int, sys.argv[3:5]), *sys.argv[5:]
        )
    else:
        main()
