"""What a training leaves for people: contact sheets of what the model sees, curves, tables.

Runs in: training worker rank 0.
"""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

from raypar.dataset.batch import Batch
from raypar.dataset.plan import Plan
from raypar.dataset.show import batch_image
from raypar.draw import contact_sheet
from raypar.images import encode_png
from raypar.scores import ULTRALYTICS_NAMES
from raypar.storage import Folder

SHEETS = 3  # steps shown at the start and after mosaic closes


def wants(batch: Batch, plan: Plan, mosaic_epochs: int) -> bool:
    """Whether a contact sheet is made of this batch: the first steps of the run, and the first ones without mosaic."""
    return batch.step < min(SHEETS, plan.steps_per_epoch) and batch.epoch in {0, mosaic_epochs}


def training_batch(batch: Batch, class_names: list[str]) -> bytes:
    """A PNG of up to 16 images exactly as the model gets them, labels drawn."""
    sheet = []
    for i in range(min(16, len(batch.images))):
        sheet.append(batch_image(batch, i, class_names, with_class=True))
    return encode_png(contact_sheet(sheet))


def tables(out: Folder, history: list[dict[str, Any]]) -> None:
    """Writes ``metrics.jsonl`` and ``results.csv`` anew, so that a resumed run has no line twice."""
    out.write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))
    rows = [_row(history, i) for i in range(len(history))]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(k for row in rows for k in row)), restval="0")
    writer.writeheader()
    writer.writerows(rows)
    out.write("results.csv", text.getvalue())


def curves(out: Folder) -> None:
    """Writes ``results.png``, Ultralytics' own plot of ``results.csv``; a training does not fail for want of a picture."""
    from ultralytics.utils.plotting import plot_results

    with tempfile.TemporaryDirectory() as folder:
        out.download("results.csv", Path(folder) / "results.csv")
        try:
            plot_results(file=str(Path(folder) / "results.csv"))
        except Exception as error:  # of polars, matplotlib, fonts ...
            print(f"train: results.png cannot be drawn (report.html has the curves too): {error}", flush=True)
        if (Path(folder) / "results.png").exists():
            out.upload(Path(folder) / "results.png", "results.png")


def _row(history: list[dict[str, Any]], i: int) -> dict[str, Any]:
    line = history[i]
    seconds = sum(x["wait_s"] + x["step_s"] + x["validate_s"] for x in history[: i + 1])
    picked = {k: line[k] for k in line if k.startswith("train/")}
    picked |= {name: line[k] for k, name in ULTRALYTICS_NAMES.items() if k in line}
    picked |= {k: line[k] for k in line if k.startswith(("val/", "lr/"))}
    return {"epoch": line["epoch"], "time": round(seconds, 3), **{k: round(v, 5) for k, v in picked.items()}}
