"""``train/report.html``: one page on a training that needs nothing but itself. Drawn from what lies in the run's folder.

Runs in: rank 0 of the training workers, beside the training; the driver at the end and after a failure. :func:`page` is pure.
"""

from __future__ import annotations

import base64
import html
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from raypar.scores import KINDS
from raypar.storage import Folder
from raypar.train import charts

REPORT, EVENTS, ENVIRONMENT, PER_CLASS = "report.html", "events.jsonl", "environment.json", "per_class.json"
MAX_PICTURE_BYTES = 4 << 20  # of one contact sheet: larger ones stay beside the page
STAGES = {
    "wait_s": "wait for data",
    "step_s": "steps",
    "validate_s": "validation",
    "checkpoint_s": "checkpoints",
    "other_s": "start and reports",
}
STATES = {"finished": "good", "running": "going", "stopped": "going", "failed": "bad"}
STYLE = """
:root{--ink:#1d2733;--muted:#66727f;--grid:#e3e8ed;--page:#f4f6f8;--card:#fff;--good:#00795a;--going:#0072B2;--bad:#b3460a}
@media (prefers-color-scheme:dark){:root{--ink:#e6eaee;--muted:#98a4b0;--grid:#303942;--page:#14181c;--card:#1d2329;
--good:#3fc79f;--going:#56B4E9;--bad:#ff9257}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1240px;margin:0 auto;padding:32px 20px 64px}h1{font-size:26px;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:36px 0 12px}
h3{font-size:13px;font-weight:600;margin:0 0 8px}.muted{color:var(--muted);font-weight:400}.top{display:flex;gap:14px;align-items:center;flex-wrap:wrap}
.state{border-radius:99px;padding:2px 12px;color:var(--card);font-size:13px;font-weight:600}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(320px,1fr));gap:14px}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px;min-width:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:14px;margin-top:20px}
.tiles .card{padding:12px 14px}.tiles b{display:block;font-size:22px;white-space:nowrap;line-height:1.2;font-variant-numeric:tabular-nums}.tiles span{color:var(--muted);font-size:12.5px}
svg{width:100%;height:auto;display:block}svg.bar{height:28px;border-radius:6px}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:12.5px;color:var(--muted);margin-top:8px}.legend b{color:var(--ink)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{font-weight:600;color:var(--muted);text-align:left}td,th{padding:5px 14px 5px 0;border-bottom:1px solid var(--grid);vertical-align:top}
tr:last-child td{border-bottom:0}td.n,th.n{text-align:right}td.wide{overflow-wrap:anywhere}
.meter{display:inline-block;width:90px;height:8px;border-radius:4px;background:var(--grid);overflow:hidden;vertical-align:1px;margin-left:10px}
.meter i{display:block;height:100%}.pictures{display:grid;grid-template-columns:repeat(auto-fill,minmax(360px,1fr));gap:14px}
figure{margin:0}figure img{width:100%;border-radius:6px;display:block}figcaption{color:var(--muted);font-size:12.5px;margin-top:6px}
"""
LEGEND_COLOURS = (
    ".legend .f0{background:#0072B2}.legend .f1{background:#D55E00}.legend .f2{background:#009E73}"
    ".legend .f3{background:#CC79A7}.legend .f4{background:#E69F00}.meter .f0{background:#0072B2}"
)


def write(out: Folder, name: str, state: str = "running") -> None:
    """Draws the page anew from the files of a run's ``train`` folder.

    Args:
        out: that folder.
        name: of the run.
        state: ``running``, ``finished``, ``stopped`` or ``failed``.
    """
    history = _lines(out, "metrics.jsonl")
    pictures = {n: out.read(n) for n in _sheets(out)}
    out.write(REPORT, page(
        name, state, history, settings=_json(out, "settings.json"), environment=_json(out, ENVIRONMENT), events=_lines(out, EVENTS),
        per_class=_json(out, PER_CLASS).get("classes", []), pictures=pictures))  # fmt: skip


def page(name: str, state: str, history: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], environment: Mapping[str, Any],
         events: Sequence[Mapping[str, Any]], per_class: Sequence[Mapping[str, Any]], pictures: Mapping[str, bytes]) -> str:  # fmt: skip
    """The whole page.

    Args:
        name, state: see :func:`write`.
        history: lines of ``metrics.jsonl``.
        settings: what the run was begun with, nested.
        environment: values by name.
        events: ``time`` (s since 1970), ``what`` and more.
        per_class: ``class_name, num_boxes, precision, recall, map50, map50_95``, of masks and keypoints too, of the best epoch.
        pictures: PNG files by name.
    """
    best = max(history, key=lambda line: line.get("fitness", -1.0)) if history else {}
    sections = {
        "": _tiles(history, best),
        "Curves": _curves(history, best),
        "Where the time went": _times(history),
        "Classes"
        + (f' <span class="muted">at epoch {best["epoch"]}, the best one</span>' if best else ""): _classes(
            per_class
        ),
        "What the model saw": _pictures(pictures),
        "What happened": _events(events),
        "Settings": _table(_flat(settings)),
        "Environment": _table(environment),
    }
    body = "".join(
        (f"<h2>{title}</h2>\n" if title else "") + f"{text}\n" for title, text in sections.items() if text
    )
    title = html.escape(f"{name}: training")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
            f"<title>{title}</title><style>{STYLE}{charts.STYLE}{LEGEND_COLOURS}</style></head>\n<body><main>"
            f'<div class="top"><h1>{html.escape(name)}</h1><span class="state" style="background:var(--{STATES[state]})">{state}</span>'
            f'<span class="muted">written {_time(time.time())}</span></div>\n{body}</main></body></html>\n')  # fmt: skip


def _tiles(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    if not history:
        return '<p class="muted">No epoch has ended yet.</p>'
    last = history[-1]
    seconds = sum(float(line.get(key, 0.0)) for line in history for key in STAGES)
    rates = sorted(float(line["images_per_s"]) for line in history)
    shown = {
        **_best_scores(best), "best epoch": str(best["epoch"]), "epochs": str(len(history)),
        "images/s, median": charts.number(round(rates[len(rates) // 2], 1)), "in training": _short(seconds),
        "workers": str(last["world_size"]), "images seen": f"{last['images_seen']:,}",
    }  # fmt: skip
    return (
        '<div class="tiles">'
        + "".join(f'<div class="card"><b>{v}</b><span>{k}</span></div>' for k, v in shown.items())
        + "</div>"
    )


def _best_scores(best: Mapping[str, Any]) -> dict[str, str]:
    """Scores of the best epoch, as its tiles name them."""
    if "map50_95" not in best and "top1" in best:
        return {"top-1, best": _score(best["top1"]), "top-5, then": _score(best.get("top5"))}
    found = {"mAP 50-95, best": _score(best.get("map50_95")), "mAP 50, then": _score(best.get("map50"))}
    for prefix, kind in KINDS.items():
        if prefix and f"{prefix}map50_95" in best:
            found[f"{kind}mAP 50-95, then"] = _score(best[f"{prefix}map50_95"])
            found[f"{kind}mAP 50, then"] = _score(best.get(f"{prefix}map50"))
    return found


def _named(keys: Mapping[str, str]) -> dict[str, str]:
    """Keys of scores by what they are called, those of boxes, of masks and of keypoints."""
    return {
        f"{kind}{label}": f"{prefix}{key}" for prefix, kind in KINDS.items() for label, key in keys.items()
    }


def _curves(history: Sequence[Mapping[str, Any]], best: Mapping[str, Any]) -> str:
    if not history:
        return ""
    epochs = [float(line["epoch"]) for line in history]
    names = list(dict.fromkeys(key for line in history for key in line))

    def of(**named: str) -> dict[str, list[float | None]]:
        return {label: [line.get(key) for line in history] for label, key in named.items() if key in names}

    plots: list[tuple[str, dict[str, list[float | None]], bool]] = [
        ("mAP", of(**_named({"mAP 50-95": "map50_95", "mAP 50": "map50"})), True),
        ("Accuracy", of(**{"top-1": "top1", "top-5": "top5"}), True),
        ("Precision and recall", of(**_named({"precision": "precision", "recall": "recall"})), True),
    ]
    losses = [name.removeprefix("train/") for name in names if name.startswith("train/")]
    plots += [
        (f"{loss.removesuffix('_loss')} loss", of(training=f"train/{loss}", validation=f"val/{loss}"), False)
        for loss in losses
    ]
    plots.append(("Images per second", of(**{"images/s": "images_per_s"}), True))
    groups = of(**{name.removeprefix("lr/"): name for name in names if name.startswith("lr/")})
    # equal ones are one curve
    different = {values: label for label, values in ((label, tuple(v)) for label, v in groups.items())}
    rates = {
        label if len(different) > 1 else "all parameters": list(values) for values, label in different.items()
    }
    plots.append(("Learning rate", rates, True))
    if len({line["world_size"] for line in history}) > 1:
        plots.append(("Workers", of(workers="world_size"), True))
    cards = (
        f'<div class="card"><h3>{html.escape(title)}</h3>{charts.curves(epochs, series, mark=best.get("epoch"), from_zero=from_zero)}</div>'
        for title, series, from_zero in plots
        if series
    )
    each: dict[str, list[float | None]] = {
        label: [line.get(key, 0.0) for line in history] for key, label in STAGES.items()
    }
    seconds = f'<div class="card"><h3>Seconds of each epoch</h3>{charts.stacked_columns(epochs, each)}</div>'
    return f'<div class="grid">{"".join(cards)}{seconds}</div><p class="muted">Over epochs; the dotted line is the best one.</p>'


def _times(history: Sequence[Mapping[str, Any]]) -> str:
    if not history:
        return ""
    seconds = {label: sum(float(line.get(key, 0.0)) for line in history) for key, label in STAGES.items()}
    total = sum(seconds.values()) or 1.0
    labels = {label: f"{_clock(amount)} ({amount / total:.0%})" for label, amount in seconds.items()}
    reduced = [float(line["all_reduce_ms"]) for line in history if line.get("all_reduce_ms")]
    note = (
        f'<p class="muted">Gradients travel {reduced[-1]:.1f} ms a backward pass, as DDP samples it.</p>'
        if reduced
        else ""
    )
    return f'<div class="card"><h3>Rank 0, all epochs</h3>{charts.stacked_bar(seconds, labels)}{note}</div>'


def _classes(per_class: Sequence[Mapping[str, Any]]) -> str:
    if not per_class:
        return ""
    labels = {"mAP 50-95": "map50_95", "mAP 50": "map50", "precision": "precision", "recall": "recall"}
    # masks and keypoints have theirs too
    columns = {key: label for label, key in _named(labels).items() if any(key in row for row in per_class)}
    head = '<th>class</th><th class="n">boxes</th>' + "".join(
        f'<th class="n">{label}</th>' for label in columns.values()
    )
    rows = []
    for row in sorted(per_class, key=lambda row: -(row.get("map50_95") or -1.0)):
        share = 100 * float(row.get("map50_95") or 0.0)
        meter = f'<span class="meter"><i class="f0" style="width:{share:.1f}%"></i></span>'
        cells = "".join(
            f'<td class="n">{_score(row.get(key))}{meter if key == "map50_95" else ""}</td>'
            for key in columns
        )
        rows.append(
            f'<tr><td>{html.escape(str(row["class_name"]))}</td><td class="n">{row["num_boxes"]:,}</td>{cells}</tr>'
        )
    return f'<div class="card scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _pictures(pictures: Mapping[str, bytes]) -> str:
    figures = "".join(
        f'<figure class="card"><img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        f"<figcaption>step {html.escape(name.removeprefix('batch_').removesuffix('.png'))}, as the model got it</figcaption></figure>"
        for name, png in pictures.items()
    )
    return f'<div class="pictures">{figures}</div>' if figures else ""


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    if not events:
        return ""
    rows = "".join(
        f'<tr><td style="white-space:nowrap;width:1%">{_time(float(event["time"]))}</td><td class="wide">{html.escape(str(event["what"]))}</td></tr>'
        for event in events
    )
    return f'<div class="card scroll"><table>{rows}</table></div>'


def _table(values: Mapping[str, Any]) -> str:
    if not values:
        return ""
    rows = "".join(
        f'<tr><th>{html.escape(key)}</th><td class="wide">{html.escape(_text(value))}</td></tr>'
        for key, value in values.items()
    )
    return f'<div class="card scroll"><table>{rows}</table></div>'


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(map(_text, value))
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _score(value: Any) -> str:
    return "-" if value is None else f"{value:.3f}"


def _clock(seconds: float) -> str:
    minutes, left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes:02d} min"
        if hours
        else f"{minutes} min {left:02d} s"
        if minutes
        else f"{seconds:.1f} s"
    )


def _short(seconds: float) -> str:
    """For a tile, which has room for few characters."""
    return (
        f"{seconds:.0f} s"
        if seconds < 100
        else f"{seconds / 60:.0f} min"
        if seconds < 6000
        else f"{seconds / 3600:.1f} h"
    )


def _time(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _sheets(out: Folder) -> list[str]:
    sizes = {
        name: size
        for name, size in out.sizes().items()
        if name.startswith("batch_") and name.endswith(".png")
    }
    small = [name for name, size in sizes.items() if size <= MAX_PICTURE_BYTES]
    return sorted(small, key=lambda name: (len(name), name))


def _json(out: Folder, name: str) -> dict[str, Any]:
    found: dict[str, Any] = out.read_json(name) if out.exists(name) else {}
    return found


def _lines(out: Folder, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read(name).decode().splitlines()] if out.exists(name) else []
