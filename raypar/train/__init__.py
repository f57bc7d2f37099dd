"""``raypar train``: a prepared dataset and a model -> trained weights, on any number of workers.

Runs in: the driver. The work is in :mod:`raypar.train.worker`, one process a rank; checkpoints, metrics and weights lie in
``{storage}/{name}/train``. A run that was killed goes on from its newest checkpoint when it is started again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import uuid
from typing import TYPE_CHECKING, Any, Literal

from raypar.config import RunConfig
from raypar.dataset import verify
from raypar.dataset.cache import CacheSpec, drop_everywhere
from raypar.dataset.manifest import Manifest
from raypar.dataset.plan import first_images
from raypar.scores import SCORES, scores_of
from raypar.storage import Folder
from raypar.train import initial

if TYPE_CHECKING:
    from raypar.train import launch

SUMMARY = "summary.json"  # written last: where it is, the training is complete
SETTINGS = "settings.json"  # what a run must keep to be resumed
GROW_EVERY_S = 30.0  # how often an elastic run looks for more room
SPLITS = ("train", "val")  # that training reads
IGNORED_BY_AUTO = ("lr0", "momentum", "warmup_bias_lr")  # Ultralytics' optimizer=auto chooses them itself


def check(config: RunConfig) -> None:
    """All checks that need no cluster: settings, model, dataset.

    Raises:
        ValueError: with what is wrong and how to mend it.
    """
    # first: what follows imports torch and Ultralytics, which takes seconds
    manifest = Manifest.load(config.dataset_folder)
    verify.check_sizes(config.dataset_folder, manifest, SPLITS)
    from raypar.augment import albu
    from raypar.dataset.stream import recipe_of
    from raypar.train.recipe import settings

    args = settings(config.train.yolo, batch=config.train.batch, seed=config.seed, task=manifest.task)
    recipe_of(vars(args), manifest)
    _check_optimizer(config, manifest)
    albu.make(config.train.albumentations, manifest.task)
    if config.train.augment == "gpu":
        _refuse_on_device(config, manifest)
    initial.find(config.train.model, manifest.task, trusted=config.weights_trusted)
    if config.train.init_from is not None:
        initial.find(config.train.init_from, manifest.task, "train.init_from", trusted=config.weights_trusted)
    if not config.train.overwrite and (config.folder / "train").exists(SETTINGS):
        _check_begun(config, fingerprint(_placed(config, manifest)))
    _note_what_is_otherwise(config.train.yolo, args)


def needs(config: RunConfig, *, use_gpu: bool) -> tuple[float, float]:
    """CPUs and GPUs that the fewest workers and at least one Ray Data task take together."""
    workers = config.train.min_workers
    return workers * (config.train.cpus_per_worker or 1) + 1, float(workers if use_gpu else 0)


def uses_gpu(config: RunConfig, num_gpus: float) -> bool:
    """Whether workers take GPUs, on a cluster that has so many of them."""
    train = config.train
    return num_gpus >= train.min_workers if train.use_gpu == "auto" else train.use_gpu


def run(config: RunConfig, *, run_id: str | None = None, label: str = "train") -> dict[str, Any]:  # noqa: PLR0915
    """Trains to the end and returns the summary: the best epoch's metrics, epochs, images, seconds.

    Args:
        config: of the run.
        run_id: of this start, for whoever wants to ask it to stop (:func:`raypar.train.launch.ask_to_stop`); nothing: a new one.
        label: what its lines begin with.

    Raises:
        KeyboardInterrupt: it was asked to stop, and all is saved.
        ValueError: the run's settings differ from those it was begun with.
        RuntimeError: training failed more often than ``train.max_failures``.
    """
    import ray.train

    from raypar.train import chronicle, launch
    from raypar.train.watch import Bar

    out = config.folder / "train"
    if config.train.overwrite:
        out.delete()
    manifest = Manifest.load(config.dataset_folder)
    config = _placed(config, manifest)
    train, settings, is_begun = config.train, fingerprint(config), out.exists(SETTINGS)
    if is_begun:
        _check_begun(config, settings)
    if out.exists(SUMMARY):
        print(f"{label}: {out.uri} is complete; train.overwrite=true trains anew", flush=True)
        summary: dict[str, Any] = out.read_json(SUMMARY)
        return summary
    verify.check_sums(config.dataset_folder, manifest, SPLITS)
    _check_optimizer(config, manifest)  # here too: not everybody has called check
    trusted = config.weights_trusted
    model = initial.stage(initial.find(train.model, manifest.task, trusted=trusted), out, is_begun=is_begun)
    if train.init_from is not None:
        init_from = initial.find(train.init_from, manifest.task, "train.init_from", trusted=trusted)
        initial.stage(init_from, out, is_begun=is_begun)
    out.write_json(SETTINGS, settings)
    cache = _cache(config, manifest)
    trainer = _trainer(config, model, manifest, cache, run_id or uuid.uuid4().hex[:12], label)
    try:
        with Bar(trainer.run_id):
            result = trainer.fit()
    except (
        ray.train.TrainingFailedError,
        ray.exceptions.RayActorError,
        ray.exceptions.OutOfMemoryError,
    ) as error:  # two are the controller's
        # what the controller has told, before its words are taken away
        chronicle.happened(out, trainer.run_id)
        cause = launch.cause(trainer.run_id, error)
        chronicle.close(out, trainer.run_id, config.name, "failed", f"failed: {cause}")
        raise RuntimeError(
            f"training failed: {cause}; what was saved is in {out.uri}, and the same command goes on from there"
        ) from error
    finally:
        if cache is not None:
            drop_everywhere(cache)
    if (stopped := (result.return_value or {}).get("stopped")) is not None:
        chronicle.close(
            out,
            trainer.run_id,
            config.name,
            "stopped",
            f"stopped on demand after {stopped:,} images, all of it saved",
        )
        print(
            f"{label}: stopped after {stopped} images, all of it saved; the same command goes on from there",
            flush=True,
        )
        raise KeyboardInterrupt
    summary = _finish(out, label)
    chronicle.close(
        out,
        trainer.run_id,
        config.name,
        "finished",
        f"finished: best epoch {summary['best_epoch']} of {summary['num_epochs']}",
    )
    print(f"{label}: everything on one page: {out.uri}/report.html", flush=True)
    return summary


def _check_begun(config: RunConfig, settings: dict[str, Any]) -> None:
    """Whether a run goes on as it was begun, with settings of :func:`fingerprint`.

    Raises:
        ValueError: with what is otherwise.
    """
    out = config.folder / "train"
    if others := differing(out.read_json(SETTINGS), settings):
        raise ValueError(f"{out.uri} was begun with other settings ({others}): set them back, add train.overwrite=true, "
                         f"or choose another name, with dataset={config.dataset_folder.uri}")  # fmt: skip


def _note_what_is_otherwise(yolo: dict[str, Any], args: Any) -> None:
    """Says which of the user's settings do not act as they are written."""
    ignored = [f"train.yolo.{name}" for name in IGNORED_BY_AUTO if name in yolo]
    if ignored and str(args.optimizer).lower() == "auto":
        _note(
            f"{', '.join(ignored)} without effect: optimizer=auto, Ultralytics' default, chooses for itself; add e.g. train.yolo.optimizer=SGD"
        )
    if yolo.get("imgsz", args.imgsz) != args.imgsz:
        _note(f"train.yolo.imgsz={yolo['imgsz']} becomes {args.imgsz}, a multiple of the model's stride")


@functools.cache
def _note(text: str) -> None:
    """Once, however often a run is checked."""
    print(f"train: note: {text}", flush=True)


def _placed(config: RunConfig, manifest: Manifest) -> RunConfig:
    """The same with a place to augment."""
    return config.model_copy(
        update={"train": config.train.model_copy(update={"augment": where_to_augment(config, manifest)})}
    )


def where_to_augment(config: RunConfig, manifest: Manifest) -> Literal["cpu", "gpu"]:
    """What ``train.augment`` means: auto is what the run was begun with, or on a cluster that was joined the GPUs if workers have them."""
    out = config.folder / "train"
    if config.train.augment != "auto":
        return config.train.augment
    if out.exists(SETTINGS):
        return "gpu" if out.read_json(SETTINGS)["augment"] == "gpu" else "cpu"
    import ray

    if not uses_gpu(config, ray.cluster_resources().get("GPU", 0)):
        return "cpu"
    try:
        _refuse_on_device(config, manifest)
    except ValueError:
        return "cpu"
    return "gpu"


def _refuse_on_device(config: RunConfig, manifest: Manifest) -> None:
    """Says what workers' devices cannot augment.

    Raises:
        ValueError: it is asked for.
    """
    from raypar.augment import albu
    from raypar.dataset.encoded import refuse
    from raypar.train.recipe import settings

    args = settings(config.train.yolo, batch=config.train.batch, seed=config.seed, task=manifest.task)
    moves_pixels = albu.make(config.train.albumentations, manifest.task).move_pixels
    refuse(
        task=manifest.task, cache=config.train.cache, copy_paste=args.copy_paste, moves_pixels=moves_pixels
    )


def _trainer(
    config: RunConfig,
    model: str | dict[str, Any],
    manifest: Manifest,
    cache: CacheSpec | None,
    run_id: str,
    label: str,
) -> launch.Trainer:
    """Ray Train's trainer for the run; the workers get plain values only."""
    import ray.train

    from raypar.train import entry, launch, network

    train = config.train
    use_gpu = uses_gpu(config, ray.cluster_resources().get("GPU", 0))
    os.environ["RAY_TRAIN_COLLECTIVE_TIMEOUT_S"] = str(train.collective_timeout_s)
    return launch.Trainer(
        run_id=run_id,
        world_sizes=train.world_sizes,
        placement_timeout_s=train.placement_timeout_s,
        train_loop_per_worker=entry.train_loop,
        train_loop_config={
            "run_id": run_id,
            "label": label,
            "folder": config.folder.uri,
            "dataset": config.dataset_folder.uri,
            "seed": config.seed,
            "weights_trusted": config.weights_trusted,
            "model": model,
            "init_from": None if train.init_from is None else initial.INITIAL,
            "train": train.model_dump(mode="json"),
            "plan": {
                "row_groups": _row_groups(config, manifest),
                "seed": config.seed,
                "global_batch": train.batch,
            },
            "cache": None if cache is None else dataclasses.asdict(cache),
        },
        torch_config=network.Network(timeout_s=int(train.collective_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=train.num_workers
            if isinstance(train.num_workers, int)
            else (train.min_workers, train.max_workers),
            elastic_resize_monitor_interval_s=GROW_EVERY_S,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": train.cpus_per_worker or 1, **({"GPU": 1} if use_gpu else {})},
        ),
        run_config=ray.train.RunConfig(
            name="train",
            storage_path=config.folder.path,
            storage_filesystem=None if config.folder.is_local else config.folder.fs,
            logging_config=ray.train.LoggingConfig(log_level="WARNING"),
            failure_config=ray.train.FailureConfig(max_failures=train.max_failures),
        ),
    )


def _row_groups(config: RunConfig, manifest: Manifest) -> tuple[int, ...]:
    """Images in each row group that is trained on."""
    groups = [n for shard in manifest.split("train").shards for n in shard.row_groups]
    return first_images(groups, config.train.yolo.get("fraction", 1.0))


def _check_optimizer(config: RunConfig, manifest: Manifest) -> None:
    """Whether there is such an optimizer, and the way that workers share the model leaves it what it needs.

    Raises:
        ValueError: there is none, or it needs whole matrices.
    """
    from raypar.train.recipe import optimizer_of, refuse_for_fsdp, settings

    train = config.train
    args = settings(train.yolo, batch=train.batch, seed=config.seed, task=manifest.task)
    is_sharded = train.parallel == "fsdp" and train.max_workers > 1
    (refuse_for_fsdp if is_sharded else optimizer_of)(args, sum(_row_groups(config, manifest)))


def _cache(config: RunConfig, manifest: Manifest) -> CacheSpec | None:
    """The cache of decoded images that the run asks for: another dataset or image size is another cache."""
    train = config.train
    if train.cache == "none":
        return None
    sums = "".join(shard.sha256 for shard in manifest.split("train").shards)
    key = hashlib.sha256(f"{config.folder.uri} {train.yolo.get('imgsz')} {sums}".encode()).hexdigest()[:16]
    return CacheSpec(train.cache, key, None if train.cache_gb is None else int(train.cache_gb * 1e9))


def _finish(out: Folder, label: str) -> dict[str, Any]:
    """Draws the curves, writes the summary and says where everything is."""
    from raypar.train import pictures

    pictures.curves(out)
    history = [json.loads(line) for line in out.read("metrics.jsonl").splitlines()]
    best = max(history, key=lambda line: line.get("fitness", -1.0))
    summary = {
        "best_epoch": best["epoch"], **{key: best[key] for key in SCORES if key in best}, "num_epochs": len(history),
        "images_seen": history[-1]["images_seen"], "world_size": history[-1]["world_size"], "compute_dtype": history[-1]["compute_dtype"],
        "seconds": sum(x["wait_s"] + x["step_s"] + x["validate_s"] for x in history),
    }  # fmt: skip
    out.write_json(SUMMARY, summary)
    print(f"{label}: best epoch {summary['best_epoch']} of {summary['num_epochs']}: {scores_of(summary)}\n"
          f"{label}: weights {out.uri}/best.pt, curves results.png, what the model saw batch_*.png", flush=True)  # fmt: skip
    return summary


def fingerprint(config: RunConfig) -> dict[str, Any]:
    """The settings that decide what is computed, and the dataset's checksum."""
    manifest = config.dataset_folder.read("manifest.json")
    train = config.train
    return {"model": train.model, "batch": train.batch, "seed": config.seed, "precision": train.precision, "yolo": train.yolo,
            "albumentations": train.albumentations, "dataset": hashlib.sha256(manifest).hexdigest(),
            "parallel": "fsdp" if train.parallel == "fsdp" else None, "sync_bn": train.sync_bn or None,
            "init_from": train.init_from, "augment": "gpu" if train.augment == "gpu" else None}  # fmt: skip


def differing(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Which settings of a run are not those that it was begun with, in words; nothing when all are."""
    then, today = ({**{k: v for k, v in side.items() if k != "yolo"}, **{f"yolo.{k}": v for k, v in side.get("yolo", {}).items()}}
                   for side in (before, now))  # fmt: skip
    names = [*today, *(name for name in then if name.startswith("yolo.") and name not in today)]
    return ", ".join(
        f"{n}: {then.get(n)!r} then, {today.get(n)!r} now" for n in names if then.get(n) != today.get(n)
    )
