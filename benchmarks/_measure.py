"""Paired measurements: two sides in one process tree, in turn, CPU time of everything that works for a side."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import psutil

IDLE_S, IDLE_CPU_S = 0.2, 0.04


@dataclass(frozen=True)
class Run:
    """One side, once: seconds of CPU and of the clock, for so many images."""

    cpu_s: float
    wall_s: float
    images: int


def cpu_s(pids: Sequence[int] = ()) -> float:
    """User and system seconds of this process and of some others, what their ended children took included."""
    total = 0.0
    for pid in (os.getpid(), *pids):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = psutil.Process(pid).cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def timed(work: Callable[[], int], pids: Callable[[], Sequence[int]]) -> Run:
    """Runs one side until its other processes, too, have next to nothing left to do (a loader fills its queue again)."""
    began, cpu_before = time.perf_counter(), cpu_s(pids())
    images = work()
    wall_s = time.perf_counter() - began
    before = -1.0
    while (now := cpu_s(pids())) - before > IDLE_CPU_S:
        before = now
        time.sleep(IDLE_S)
    return Run(now - cpu_before, wall_s, images)


def timed_tree(work: Callable[[], int]) -> Run:
    """Runs one side, counting this process and all that it started, those that end meanwhile too."""
    began, before = time.perf_counter(), cpu_s(tree())
    images = work()
    return Run(cpu_s(tree()) - before, time.perf_counter() - began, images)


def tree() -> list[int]:
    """Process ids of all living descendants of this process."""
    return [p.pid for p in psutil.Process().children(recursive=True)]


def warm(side: Callable[[], Run], images: int) -> float:
    """Runs a side that goes through Ray until it has made so many images; returns CPU milliseconds an image of its first run.

    Each of Ray's processes takes a page fault for each page of the object store that it meets for the first time, until it has met those
    that are used in turn: a cost of the first thousands of images, and none of an image.
    """
    runs = [side()]
    while sum(run.images for run in runs) < images:
        runs.append(side())
    print(
        f"  start: {', '.join(f'{1000 * run.cpu_s / run.images:.2f}' for run in runs)} ms CPU an image in the first runs, not measured below"
    )
    return round(1000 * runs[0].cpu_s / runs[0].images, 3)


def paired(first: Callable[[], Run], second: Callable[[], Run], pairs: int) -> list[tuple[Run, Run]]:
    """Both sides in turn, first, second, second, first ...; one unmeasured round of each before."""
    first(), second()
    found = []
    for i in range(pairs):
        if i % 2:
            b, a = second(), first()
        else:
            a, b = first(), second()
        found.append((a, b))
    return found


def report(
    claim: str, pairs: list[tuple[Run, Run]], names: tuple[str, str], **facts: object
) -> dict[str, object]:
    """Prints a table of one claim and returns its row: how many images the first side makes for one of the second."""
    ratios = [(a.images / a.cpu_s) / (b.images / b.cpu_s) for a, b in pairs]
    walls = [(a.images / a.wall_s) / (b.images / b.wall_s) for a, b in pairs]
    row: dict[str, object] = {"claim": claim, "ratio": round(median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3),
                              "pairs": len(pairs), "wall_ratio": round(median(walls), 3)}  # fmt: skip
    for side, name in enumerate(names):
        cpu_ms = [1000 * pair[side].cpu_s / pair[side].images for pair in pairs]
        per_s = [pair[side].images / pair[side].wall_s for pair in pairs]
        row[name] = {"cpu_ms_per_image": round(median(cpu_ms), 3), "images_per_s": round(median(per_s), 1)}
        print(
            f"  {name:<14} {median(cpu_ms):7.2f} ms CPU an image ({min(cpu_ms):.2f} to {max(cpu_ms):.2f}), {median(per_s):7.1f} images/s"
        )
    print(
        f"  ratio {row['ratio']} ({row['min']} to {row['max']}) by CPU time, {row['wall_ratio']} by the clock\n",
        flush=True,
    )
    return {**row, **facts}


def finish(name: str, rows: Sequence[dict[str, object]], **facts: object) -> None:
    """The last line: everything, as JSON."""
    print(json.dumps({"benchmark": name, **facts, "rows": list(rows)}))
