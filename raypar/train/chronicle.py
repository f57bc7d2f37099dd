"""Where a training runs and what happens to it: ``train/environment.json`` and ``train/events.jsonl``, for people and for the report.

Runs in: rank 0 of the training workers, and the driver. Nothing here raises: training matters more.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from typing import Any

from raypar.storage import Folder
from raypar.train import pulse, report
from raypar.versions import versions

EVENTS, ENVIRONMENT = report.EVENTS, report.ENVIRONMENT
USED = "used.json"  # the settings as rank 0 has them


def environment(device: str, precision: str, threads: int, hosts: list[str]) -> dict[str, Any]:
    """Where and with what a training runs, for its report."""
    found = versions("ray", "torch", "ultralytics", "albumentations", "pyarrow", "numpy")
    return {**found, "python": sys.version.split()[0], "system": f"{platform.system()} {platform.release()}", "processor": _processor(),
            "cores of rank 0's host": os.cpu_count(), "device": device, "precision": precision, "torch threads a worker": threads,
            "workers": hosts}  # fmt: skip


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.machine()


def happened(out: Folder, run_id: str, what: str = "", **more: Any) -> None:
    """Adds to ``events.jsonl``: the failures that Ray Train's controller has told of, then ``what``. It never raises.

    Args:
        out: the run's ``train`` folder.
        run_id: of this start of the run.
        what: in words.
        more: plain values.
    """
    try:
        before = out.read(EVENTS).decode().splitlines() if out.exists(EVENTS) else []
        failures = [json.loads(text) for text in pulse.words(run_id, "failure:")]
        new = [*failures, *([{"time": time.time(), "what": what, **more}] if what else [])]
        if new:
            out.write(EVENTS, "".join(line + "\n" for line in [*before, *map(json.dumps, new)]))
        pulse.clear(run_id, "failure:")
    except Exception as error:
        print(f"train: {EVENTS} cannot be written: {error}", flush=True)


def close(out: Folder, run_id: str, name: str, state: str, what: str) -> None:
    """The driver's last word on a start of a run: what happened, and the report drawn anew.

    Args:
        out: the run's ``train`` folder.
        run_id: of this start.
        name: of the run.
        state: ``finished``, ``stopped`` or ``failed``.
        what: in words; nothing when the controller has told it.
    """
    happened(out, run_id, what)
    try:
        report.write(out, name, state)
    except Exception as error:
        print(f"train: {report.REPORT} cannot be written: {error}", flush=True)
