"""``raypar VERB RUN_FILE [key=value ...] [--dry-run]``: the verb's checks, then its ``run(config)``.

Runs in: the driver. Nothing heavy is imported until it is needed: ``raypar --help`` must answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from raypar import __version__

if TYPE_CHECKING:
    from raypar.config import RunConfig

VERBS = {
    "prepare": "images and labels (YOLO, COCO, VOC, folders of classes, built-in shapes) -> checked Parquet shards",
    "inspect": "shards -> statistics, pictures of raw and augmented samples, the pipeline's speed",
    "train": "shards and a model -> trained weights, on any number of workers",
    "evaluate": "weights and a split -> mAP, curves, pictures",
    "predict": "weights and images -> detections in Parquet",
    "export": "weights -> ONNX and other formats, verified",
    "serve": "weights -> an HTTP service with a web page",
    "tune": "shards and a search space -> the settings that train best",
}
USER_ERROR, BUG, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 0 done, 1 failed, 2 something to mend in the run file or its surroundings."""
    options = _parser().parse_intermixed_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # what workers say appears at once, in files and pipes too
        sys.stdout.reconfigure(line_buffering=True)
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
        if isinstance(error, RuntimeError) and str(error).startswith(
            ("training failed", "no trial finished")
        ):
            _say_error(error)
            return BUG
        traceback.print_exc()
        return BUG


class _Parser(argparse.ArgumentParser):
    """Says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        if "unrecognized arguments" in message:
            message += " (settings are written without dashes, as train.batch=32)"
        super().error(message)


def _verb(text: str) -> str:
    if text not in VERBS:
        close = difflib.get_close_matches(text, VERBS, n=1)
        raise argparse.ArgumentTypeError(
            f"there is no '{text}'; "
            + (f"did you mean '{close[0]}'?" if close else f"there are {', '.join(VERBS)}")
        )
    return text


def _parser() -> argparse.ArgumentParser:
    verbs = "\n".join(f"  {verb:<9} {text}" for verb, text in VERBS.items())
    parser = _Parser(
        prog="raypar", formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"Train, evaluate, run and serve Ultralytics YOLO on a Ray cluster of any size.\n\nverbs:\n{verbs}",
        epilog="example:\n  raypar train jobs/demo.yaml train.num_workers=2 train.yolo.epochs=20\n\nEvery setting: docs/run_file.md",
    )  # fmt: skip
    parser.add_argument("verb", type=_verb, metavar="VERB", help="one of the verbs above")
    parser.add_argument("run_file", metavar="RUN_FILE", help="YAML file with a section for each verb")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        default=[],  # without a default, it is named among what is missing
        help="settings that replace the run file's, as train.batch=32, or @FILE with such",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the resolved run file and make every check; start nothing",
    )
    parser.add_argument("--version", action="version", version=f"raypar {__version__}")
    return parser


def _run(options: argparse.Namespace) -> int:
    from raypar import runfile

    config = _at_home(runfile.load(options.run_file, options.overrides, options.verb))
    verb = importlib.import_module(f"raypar.{options.verb}")
    if options.dry_run:
        return _dry_run(options.verb, verb, config)
    _check_storage(config)
    _check_inputs(verb, config)
    config.folder.check_writable()

    from raypar import cluster, outputs

    _check_cluster(options.verb, config)
    cluster.connect(with_dashboard=options.verb == "tune")  # Ray Train asks it about trials
    cluster.require(*cluster.needs(options.verb, config, cluster.num_gpus()))
    # A training keeps the run file that it was run with, and each output has its own.
    if not (config.folder / "train").exists(outputs.SETTINGS):
        outputs.write_run_file(config.folder, config)
    if options.verb == "serve":
        outputs.write_run_file(config.folder / "serve", config)
    verb.run(config)
    return 0


def _dry_run(name: str, verb: Any, config: RunConfig) -> int:
    """Prints the resolved run file, makes every check that starts nothing, and prints what came of each."""
    from raypar import runfile

    print(runfile.dump(config))
    inputs = f"{name}'s settings and inputs"
    checks: dict[str, Callable[[], object]] = {
        "storage": lambda: _check_storage(config),
        inputs: lambda: _check_inputs(verb, config),
        "CPUs and GPUs": lambda: _check_cluster(name, config),
    }
    failed: list[str] = []
    for what, check in checks.items():
        if what == inputs and "storage" in failed:
            print(f"skipped {what}: they need the storage")
            continue
        try:
            note = check()
            print(f"ok      {what}" + (f": {note}" if note else ""))
        except ValueError as error:
            failed.append(what)
            print(f"failed  {what}")
            sys.stdout.flush()
            _say_error(error)
    print("nothing was started" + ("" if failed else "; all checks passed"))
    return USER_ERROR if failed else 0


def _at_home(config: RunConfig) -> RunConfig:
    """The run with an absolute storage. A Ray job's working folder goes with the job, so there a relative one starts at the home folder."""
    if config.dataset is not None:
        config = type(config).model_validate(
            {**config.model_dump(mode="json"), "dataset": config.dataset_folder.uri}
        )
    if "://" in config.storage or Path(config.storage).expanduser().is_absolute():
        return config
    is_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    storage = str((Path.home() if is_job else Path.cwd()) / config.storage)
    if is_job:
        print(
            f"storage: '{config.storage}' is {storage} on this node; with more nodes, name a place that all of them reach",
            flush=True,
        )
    return type(config).model_validate({**config.model_dump(mode="json"), "storage": storage})


def _check_storage(config: RunConfig) -> str:
    """Whether the storage can be reached, without leaving anything there; returns where it is."""
    try:
        folder = config.folder
        if folder.is_local:
            there = next(p for p in (Path(folder.path), *Path(folder.path).parents) if p.exists())
            if not there.is_dir() or not os.access(there, os.W_OK):
                raise ValueError(f"storage {config.storage}: {there} is no folder that can be written")
        else:
            folder.check_reachable()
    except (OSError, NotImplementedError, ValueError) as error:  # pyarrow's errors are among them
        raise ValueError(
            f"storage {config.storage} cannot be reached: {' '.join(str(error).split())}"
        ) from error
    return folder.uri


def _check_inputs(verb: Any, config: RunConfig) -> None:
    """The verb's own checks; a store that holds its inputs may be another than the run's, and not answer."""
    try:
        verb.check(config)
    except OSError as error:
        raise ValueError(f"the inputs cannot be read: {' '.join(str(error).split())}") from error


def _check_cluster(verb: str, config: RunConfig) -> str:
    """Whether there will be enough CPUs and GPUs; joins the cluster that RAY_ADDRESS names, if it does."""
    from raypar import cluster

    try:
        return cluster.check_without_starting(verb, config)
    except ConnectionError as error:
        address = os.environ.get("RAY_ADDRESS")
        raise ValueError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there: correct it, or unset it to start Ray on this machine"
        ) from error


def _user_error(error: BaseException) -> BaseException | None:
    """The ValueError that a Ray task died of, if that is what happened."""
    from raypar.cluster import task_cause

    cause = task_cause(error)
    return cause if isinstance(cause, ValueError) else None


def _say_error(error: BaseException) -> None:
    for line in str(error).strip().splitlines():
        print(f"error: {line}", file=sys.stderr)
