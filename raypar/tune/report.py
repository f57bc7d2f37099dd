"""What a study leaves for people: ``best.yaml``, ``trials.csv``, ``trials.png``, and a screen of text. Runs in: the driver."""

from __future__ import annotations

import csv
import io
from typing import Any

import yaml

from raypar.config import RunConfig
from raypar.runfile import put
from raypar.strict_yaml import Dumper

BEST, TABLE, PICTURE = "best.yaml", "trials.csv", "trials.png"
# told apart by colour-blind eyes (Okabe and Ito, 2008)
COLOURS = {"finished": "#0072B2", "stopped": "#999999", "failed": "#D55E00"}
MAX_SHOWN, COLUMNS = 8, 3
Record = dict[str, Any]


def write(config: RunConfig, records: list[Record], best: Record) -> dict[str, Any]:
    """Writes all of them, and returns the summary."""
    out, metric = config.folder / "tune", config.tune.metric
    counts = {state: sum(r["state"] == state for r in records) for state in COLOURS}
    out.write(BEST, best_yaml(best, metric, len(records)))
    out.write(TABLE, table(records, metric))
    out.write(PICTURE, picture(config, records, best))
    for line in screen(records, best, metric):
        print(f"tune: {line}", flush=True)
    print(f"tune: its weights: {out.uri}/{best['trial']}/train/best.pt; all trials: {TABLE}, {PICTURE} in {out.uri}\n"
          f"tune: to train with its settings: raypar train RUN_FILE @{out.uri}/{BEST}", flush=True)  # fmt: skip
    return {"trial": best["trial"], "metric": metric, "score": best["score"], "best_epoch": best["best_epoch"], "params": best["params"],
            "num_trials": len(records), **counts}  # fmt: skip


def best_yaml(best: Record, metric: str, num_trials: int) -> str:
    """The best trial's settings, laid out as in a run file, to be given as ``@best.yaml``."""
    settings: dict[str, Any] = {}
    for key, value in best["params"].items():
        put(settings, tuple(key.split(".")), value)
    head = f"# {best['trial']}, the best of {num_trials}: {metric} {best['score']:.4f} after epoch {best['best_epoch']}.   raypar train RUN_FILE @best.yaml\n"
    return head + str(yaml.dump(settings, Dumper=Dumper, sort_keys=False, allow_unicode=True))


def table(records: list[Record], metric: str) -> str:
    """A line a trial, as CSV."""
    keys = list(records[0]["params"])
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(
        ["trial", "state", metric, "best_epoch", "epochs", "seconds", "own_settings", *keys, "error"]
    )
    for r in records:
        rows.writerow([r["trial"], r["state"], r["score"], r["best_epoch"], r["epochs"], r["seconds"] and round(r["seconds"], 1),
                       r["own_settings"], *(r["params"][key] for key in keys), r["error"]])  # fmt: skip
    return text.getvalue()


def screen(records: list[Record], best: Record, metric: str) -> list[str]:
    """The study on one screen: how many trials, the best of them, and why others failed."""
    counts = ", ".join(
        f"{n} {state}" for state in COLOURS if (n := sum(r["state"] == state for r in records))
    )
    unproven = sum(r["own_settings"] is None and r["state"] != "failed" for r in records)
    proof = (
        f"; {unproven} did not say which settings they used" if unproven else "; each used its own settings"
    )
    keys = list(best["params"])
    scored = sorted(
        (r for r in records if r["score"] is not None), key=lambda r: (r["state"] != "finished", -r["score"])
    )
    rows = [
        [
            "trial",
            metric,
            "epochs",
            "state",
            *(key.removeprefix("train.").removeprefix("yolo.") for key in keys),
        ]
    ]
    rows += [[r["trial"], f"{r['score']:.4f}", str(r["epochs"]), r["state"], *(_short(r["params"][key]) for key in keys)]
             for r in scored[:MAX_SHOWN]]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        f"{len(records)} trials: {counts}{proof}",
        *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows),
    ]
    failed = [f"{r['trial']} failed: {r['error']}" for r in records if r["state"] == "failed"]
    return [*lines, *failed[:3], *([f"... and {len(failed) - 3} more failed"] if len(failed) > 3 else [])]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def picture(config: RunConfig, records: list[Record], best: Record) -> bytes:
    """The metric by trial, with the best so far, and by each setting, as PNG."""
    from matplotlib.figure import Figure

    space, metric = config.tune.space, config.tune.metric
    shown = [(i, r) for i, r in enumerate(records) if r["score"] is not None]
    rows = -(-(1 + len(space)) // COLUMNS)
    figure = Figure(figsize=(4 * COLUMNS, 3 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    so_far, top = [], float("-inf")
    for i, r in shown:
        top = max(top, r["score"])
        so_far.append((i, top))
    axes[0].step([i for i, _ in so_far], [s for _, s in so_far], where="post", color="#555555", linewidth=1)
    for axis, key in zip(axes, [None, *space], strict=False):
        for state, colour in COLOURS.items():
            points = [
                (i if key is None else r["params"][key], r["score"]) for i, r in shown if r["state"] == state
            ]
            if key is not None and space[key].kind == "choice":
                points = [(str(x), y) for x, y in points]
            axis.scatter(
                [x for x, _ in points],
                [y for _, y in points],
                s=22,
                color=colour,
                label=state if points else None,
            )
        x_best = records.index(best) if key is None else best["params"][key]
        axis.scatter([str(x_best) if key is not None and space[key].kind == "choice" else x_best], [best["score"]],
                     s=110, facecolors="none", edgecolors="#009E73", linewidths=2)  # fmt: skip
        if key is not None and space[key].kind == "loguniform":
            axis.set_xscale("log")
        axis.set_xlabel("trial" if key is None else key)
        axis.set_ylabel(metric)
        axis.grid(alpha=0.3)
    for axis in axes[1 + len(space) :]:
        axis.remove()
    axes[0].legend(fontsize=8)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    return data.getvalue()
