"""Weights -> a detector that is warmed up; and first, where a service has something to lose, in a process of its own.

Runs in: Serve replicas, and a child process of them (``python -m raypar.serve.loading``).
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from raypar.config import ServeConfig

if TYPE_CHECKING:
    from raypar.detector import Detector

GREY = 114
ASPECTS = ((3, 4), (2, 3), (9, 16))  # of the pictures that cameras and screens make
RAISED = 3  # exit code of the child: loading raised an exception, which harms nobody
TRIAL_S = 300
WARM_UP_S = 5  # after which no further shape is warmed up


def load(local: Path, config: ServeConfig, device: str, *, trusted: bool) -> Detector:
    """A detector that has run once with each shape that most requests have.

    Args:
        local: the weights.
        config: how they are used.
        device: where.
        trusted: whether code that they hold may run.

    Raises:
        ValueError: the weights cannot be read, or do not fit the settings.
    """
    from raypar.detector import Detector

    detector = Detector.load(local, device=device, precision=config.precision, imgsz=config.imgsz,
                             conf=config.conf, iou=config.iou, max_det=config.max_det, trusted=trusted)  # fmt: skip
    warm_up(detector)
    if device != "cpu" and not detector.square:
        # the largest batch finds out now whether it fits the memory
        detector.warm_up(config.max_batch_size)
    return detector


def warm_up(detector: Detector) -> None:
    """Detects in grey images, so that no request pays for what the first one of a process, or of a shape, has to set up.

    Most of that is NMS, whose library takes a second to import: the threshold lets every box through, so that it runs. On a CPU each further
    shape costs some 20 ms at 640 px, in some exports more.
    """
    side = detector.imgsz
    shapes = [(side, side)]
    if not detector.square:
        shorter = [(round(side * a / b), side) for a, b in ASPECTS]
        shapes += [*shorter, *((width, height) for height, width in shorter)]
    end = time.monotonic() + WARM_UP_S
    for i, (height, width) in enumerate(shapes):
        if i > 0 and time.monotonic() > end:
            break
        detector([np.full((height, width, 3), GREY, np.uint8)], conf=0.0)


def try_in_child(local: Path, config: ServeConfig, device: str, *, trusted: bool) -> None:
    """Loads weights in a child process, which may die of them.

    An exception there is none here: whoever loads them next gets it too.

    Raises:
        ValueError: the weights ended the process that loaded them.
    """
    settings = {
        "weights": str(local),
        "config": config.model_dump(mode="json"),
        "device": device,
        "trusted": trusted,
    }
    done = subprocess.run(
        [sys.executable, "-m", "raypar.serve.loading"],
        input=json.dumps(settings).encode(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    if done.returncode in (0, RAISED):
        return
    if done.returncode == -signal.SIGALRM:
        how = f"takes more than {TRIAL_S} s"
    elif done.returncode < 0:
        how = f"is killed by {signal.Signals(-done.returncode).name}"
    else:
        how = f"ends with code {done.returncode}"
    raise ValueError(f"a process that loads these weights {how}")


def main() -> int:
    """The child: exits with 0, or ``RAISED``, or dies."""
    settings: dict[str, Any] = json.load(sys.stdin)
    signal.alarm(TRIAL_S)
    with contextlib.suppress(OSError):  # if memory runs out, this process goes and not the replica
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        config = ServeConfig.model_validate(settings["config"])
        load(Path(settings["weights"]), config, settings["device"], trusted=settings["trusted"])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return RAISED
    return 0


if __name__ == "__main__":
    sys.exit(main())
