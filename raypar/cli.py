"""``raypar VERB RUN_FILE [key=value ...] [--dry-run]``: the verb's checks, then its ``run(config)``.

Runs in: the driver. Nothing heavy is imported until it is needed: ``raypar --help`` must answer at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raypar import __version__

if TYPE_CHECKING:
    from raypar.config import RunConfig

VERBS = {
    "prepare": "images and labels (YOLO, COCO, VOC, built-in shapes) -> checked Parquet shards",
    "train": "shards and a model -> trained weights, on any number of workers",
    "evaluate": "weights and a split -> mAP, curves, pictures",
    "predict": "weights and images -> detections in Parquet",
    "export": "weights -> ONNX and other formats, verified",
    "serve": "weights -> an HTTP service with a web page",
}
USER_ERROR, BUG, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 something to mend in the run file or its surroundings."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except ValueError as error:
        _say_error(error)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from what is saved", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        if (cause := _user_error(error)) is not None:
            _say_error(cause)
            return USER_ERROR
        if isinstance(error, RuntimeError) and str(error).startswith("training failed"):
            _say_error(error)
            return BUG
        traceback.print_exc()
        return BUG


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    parser = argparse.ArgumentParser(
        prog="raypar", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Train, evaluate, run and serve Ultralytics YOLO on a Ray cluster of any size.\n\nverbs:\n{verbs}",
        epilog="example:\n  raypar train jobs/demo.yaml train.num_workers=2 train.yolo.epochs=20\n\nEvery setting: docs/run_file.md",
    )  # fmt: skip
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help="one of the verbs above")
    parser.add_argument("run_file", metavar="RUN_FILE", help="YAML file with a section for each verb")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings that replace the run file's, as train.batch=32")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved run file and make every check; start nothing")
    parser.add_argument("--version", action="version", version=f"raypar {__version__}")
    return parser


def _run(options: argparse.Namespace) -> int:
    from raypar import runfile

    config = runfile.load(options.run_file, options.overrides)
    if options.dry_run:
        print(runfile.dump(config))
    verb = importlib.import_module(f"raypar.{options.verb}")
    verb.check(config)
    if not options.dry_run or config.folder.exists():
        config.folder.check_writable()
    if options.dry_run:
        _check_resources(verb, config)
        print("all checks passed; nothing was started")
        return 0
    from raypar import cluster

    cluster.connect()
    import ray

    if hasattr(verb, "needs"):
        use_gpu = verb.uses_gpu(config, ray.cluster_resources().get("GPU", 0))
        cluster.require(*verb.needs(config, use_gpu=use_gpu))
    config.folder.write("run.yaml", runfile.dump(config) + _versions())
    verb.run(config)
    return 0


def _check_resources(verb: Any, config: RunConfig) -> None:
    """Compares what is asked for with this machine, or with the cluster that RAY_ADDRESS names."""
    import os

    from raypar import cluster

    if not hasattr(verb, "needs"):
        return
    if os.environ.get("RAY_ADDRESS"):
        import ray

        cluster.connect()
        cluster.require(*verb.needs(config, use_gpu=verb.uses_gpu(config, ray.cluster_resources().get("GPU", 0))))
        return
    cpus, gpus = cluster.local_resources()
    need_cpus, need_gpus = verb.needs(config, use_gpu=verb.uses_gpu(config, gpus))
    for name, wanted, have in (("GPU", need_gpus, gpus), ("CPU", need_cpus, cpus)):
        if wanted > have:
            raise ValueError(
                f"{wanted:g} {name}s are needed, a Ray on this machine has {have:g}: ask for fewer, or set RAY_ADDRESS to a cluster that has them"
            )


def _versions() -> str:
    from importlib.metadata import version

    names = ("ray", "ultralytics", "torch", "albumentations", "pyarrow")
    return (
        "# written by raypar " + __version__ + "; " + ", ".join(f"{n} {version(n)}" for n in names) + f"; Python {sys.version.split()[0]}\n"
    )


def _user_error(error: BaseException) -> BaseException | None:
    """The ValueError that a Ray task died of, if that is what happened."""
    from raypar.cluster import task_cause

    cause = task_cause(error)
    return cause if isinstance(cause, ValueError) else None


def _say_error(error: BaseException) -> None:
    for line in str(error).strip().splitlines():
        print(f"error: {line}", file=sys.stderr)
