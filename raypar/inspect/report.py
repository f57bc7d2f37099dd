"""What the numbers say: notes on the dataset, a verdict on the speed, and both as text and as one HTML page. Pure."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from raypar.inspect.statistics import SIZE_NAMES, SIZES_PX, Statistics

GPU_RATES = (500, 1000, 2000)  # images/s; small YOLOs on one fast GPU train at about these
FEW_BOXES, UNEVEN, MANY_BACKGROUNDS, MANY_TINY, LARGE_IMAGES = 50, 100, 0.3, 0.1, 2.0
# share of the cores with other work, of the CPU time spent waiting: worth a word
BUSY, SLOW_STORAGE = 0.2, 0.5
MAX_LINES = 12  # classes in the summary


def describe(found: Statistics, class_names: Sequence[str], imgsz: int) -> dict[str, Any]:
    """The statistics as plain values, for ``report.json``."""
    sums, has_images = found.sums, found.num_images > 0
    per_class = [
        {
            "class_name": name,
            "num_boxes": int(boxes),
            "num_images": int(images),
            "median_box_px": _px(found.median_side(i), imgsz),
        }
        for i, (name, boxes, images) in enumerate(
            zip(class_names, found.boxes_per_class, sums["images_per_class"], strict=True)
        )
    ]
    return {
        "num_images": found.num_images, "num_boxes": found.num_boxes, "num_backgrounds": found.num_backgrounds,
        "boxes_per_image": float(found.num_boxes / max(1, found.num_images)), "max_boxes_per_image": int(found.highs[2]),
        "median_box_px": _px(found.median_side(), imgsz),
        "box_sizes": dict(zip(SIZE_NAMES, sums["sizes"].tolist(), strict=True)),
        "box_size_limits_px": list(SIZES_PX),
        "height": [int(found.lows[0]), int(found.highs[0])] if has_images else None,
        "width": [int(found.lows[1]), int(found.highs[1])] if has_images else None,
        "mean_megapixels": float(sums["pixels"] / max(1, found.num_images) / 1e6),
        "per_class": per_class,
        "boxes_per_image_counts": sums["boxes_per_image"][: int(found.highs[2]) + 1].tolist(),
        "box_centres": sums["centres"].tolist(),
    }  # fmt: skip


def notes(found: Statistics, class_names: Sequence[str], imgsz: int, task: str) -> list[str]:
    """What a person should look at before training; one sentence each."""
    sums, said = found.sums, []
    counts, what = (
        (sums["images_per_class"], "images") if task == "classify" else (found.boxes_per_class, "boxes")
    )
    empty = [class_names[int(i)] for i in np.flatnonzero(counts == 0)]
    few = [
        f"{class_names[int(i)]} ({counts[i]})" for i in np.flatnonzero((counts > 0) & (counts < FEW_BOXES))
    ]
    if empty:
        said.append(
            f"no {what} of {_listed(empty)}: nothing can be learnt of {'it' if len(empty) == 1 else 'them'}"
        )
    if few:
        said.append(f"fewer than {FEW_BOXES} {what} of {_listed(few)}")
    if counts.any() and counts.max() > UNEVEN * counts[counts > 0].min():
        said.append(
            f"the most frequent class has {counts.max() / counts[counts > 0].min():.0f} times the {what} of the rarest one"
        )
    if task == "classify" or not found.num_images:
        return said
    if found.num_backgrounds > MANY_BACKGROUNDS * found.num_images:
        said.append(f"{found.num_backgrounds / found.num_images:.0%} of the images have no box")
    if specks := int(sums["sizes"][0]):
        said.append(
            f"{specks} box(es) under {SIZES_PX[0]} px at imgsz {imgsz}: training drops them; mistakes of the labels?"
        )
    if found.num_boxes and (tiny := sums["sizes"][:2].sum() / found.num_boxes) > MANY_TINY:
        said.append(f"{tiny:.0%} of the boxes are under {SIZES_PX[1]} px at imgsz {imgsz}, less than a "
                    "cell of the model's finest level: raise train.yolo.imgsz, or cut the images into tiles")  # fmt: skip
    if (mean := math.sqrt(sums["pixels"] / found.num_images)) > LARGE_IMAGES * imgsz:
        said.append(f"images are {mean / imgsz:.1f} times larger than they are trained at (imgsz {imgsz}), and decoding them takes "
                    "the time of the whole: smaller copies would train as well, faster")  # fmt: skip
    return said


def speed(
    measured: Mapping[str, Any], model: Mapping[str, Any], cluster_cpus: float, cluster_gpus: float
) -> dict[str, Any]:
    """What was timed, and what follows from it; for ``report.json``.

    Args:
        measured: of ``measure_pipeline``.
        model: of ``measure_model``.
        cluster_cpus, cluster_gpus: that Ray has.
    """
    one, together, stages = measured["one"], measured["all"], measured["stages"]
    per_core = together.images_per_s / together.num_cores  # with all of them busy: less than one alone
    wall, total_ms = stages["wall"], sum(stages["cpu"].values())
    with_cache = total_ms / max(1e-9, total_ms - stages["cpu"]["read"] - stages["cpu"]["decode"])
    return {
        "images_per_s_1_core": one.images_per_s, "images_per_s": together.images_per_s, "num_cores": together.num_cores,
        "num_cores_of_node": measured["num_cores"], "busy_with_other_work": measured["busy"], "cpu_ms_per_image": together.cpu_ms_per_image,
        "stages_cpu_ms_per_image": stages["cpu"], "stages_wall_ms_per_image": wall, "slowest_stage": max(stages["cpu"], key=stages["cpu"].__getitem__),
        "waits_for_storage_ms_per_image": max(0.0, wall["read"] - stages["cpu"]["read"]),
        "images_per_s_cached_estimate": together.images_per_s * with_cache,
        "cluster_cpus": cluster_cpus, "cluster_gpus": cluster_gpus,
        "cpus_for_images_per_s": {str(rate): math.ceil(rate / per_core) for rate in GPU_RATES},
        "model": dict(model), "verdict": verdict(together.images_per_s, together.num_cores, model),
    }  # fmt: skip


def verdict(images_per_s: float, num_cores: int, model: Mapping[str, Any]) -> str:
    """Whether data or model limits, in a sentence or two.

    Args:
        images_per_s: that the cores make together.
        num_cores: that made them.
        model: of ``measure_model``.
    """
    if "error" in model:
        return f"the model was not timed ({model['error']})"
    rate = model["images_per_s"]
    if model["is_gpu"]:
        cpus = math.ceil(rate * num_cores / images_per_s)
        needs = f"one {model['device']} takes {rate:.0f} images/s and needs {cpus} CPU(s) to feed it"
        if images_per_s < rate:
            return f"the data limits: {needs}, this machine's {num_cores} make {images_per_s:.0f} images/s: add CPU nodes"
        return f"the model limits: {needs}, this machine's {num_cores} make {images_per_s:.0f} images/s"
    together = 1 / (1 / rate + 1 / images_per_s)  # they share the cores
    share = together / images_per_s
    side = "model" if share < 0.5 else "data"
    return (f"the {side} limits: on this CPU the model trains {rate:.3g} images/s and the data could come at {images_per_s:.0f}; sharing the "
            f"cores, about {together:.3g} images/s, {_percent(share)} of the time for the data")  # fmt: skip


def data_lines(report: Mapping[str, Any]) -> list[str]:
    """What is in the dataset; with :func:`speed_lines` one screen of text."""
    data, lines = report["statistics"], []
    backgrounds = f", {data['num_backgrounds']:,} images without a box" if data["num_backgrounds"] else ""
    boxes = (f", {data['num_boxes']:,} boxes ({data['boxes_per_image']:.1f} an image, at most {data['max_boxes_per_image']:,}){backgrounds}"
             if report["task"] != "classify" else "")  # fmt: skip
    lines.append(
        f"'{report['split']}': {data['num_images']:,} images, {len(data['per_class'])} classes{boxes}"
    )
    if data["width"]:
        sizes = [
            f"{low} to {high}" if low != high else f"{low}" for low, high in (data["width"], data["height"])
        ]
        lines.append(f"images are {sizes[0]} px wide and {sizes[1]} px high, trained at {report['imgsz']} px")
    lines += _table(data, report["task"], report["imgsz"])
    return [*lines, *(f"note: {note}" for note in report["notes"])]


def _table(data: Mapping[str, Any], task: str, imgsz: int) -> list[str]:
    key = "num_images" if task == "classify" else "num_boxes"
    rows = sorted(data["per_class"], key=lambda row: -row[key])
    shown = rows if len(rows) <= MAX_LINES else [*rows[: MAX_LINES - 2], rows[-1]]
    width = max(5, *(len(row["class_name"]) for row in shown))
    lines = [
        f"{'class':<{width}}   images"
        + ("" if task == "classify" else f"    boxes  median size at {imgsz} px")
    ]
    for i, row in enumerate(shown):
        if row is rows[-1] and len(rows) > len(shown):
            lines.append(f"{'...':<{width}}   ({len(rows) - len(shown)} more classes)")
        size = "-" if row["median_box_px"] is None else f"{row['median_box_px']:.0f} px"
        lines.append(
            f"{row['class_name']:<{width}} {row['num_images']:8,}"
            + ("" if task == "classify" else f" {row['num_boxes']:8,}  {size:>8}")
        )
        assert i < MAX_LINES
    return lines


def speed_lines(found: Mapping[str, Any]) -> list[str]:
    """How fast it comes: of :func:`speed`."""
    stages = ", ".join(f"{name} {ms:.2f}" for name, ms in found["stages_cpu_ms_per_image"].items())
    rates = ", ".join(f"{cpus} for {rate}" for rate, cpus in found["cpus_for_images_per_s"].items())
    used = (
        f"all {found['num_cores']} cores"
        if found["num_cores"] == found["num_cores_of_node"]
        else f"{found['num_cores']} of {found['num_cores_of_node']} cores"
    )
    busy = [
        f"speed: the machine was {found['busy_with_other_work']:.0%} busy with other work: these figures are low"
    ]
    is_busy, wait_ms = found["busy_with_other_work"] > BUSY, found["waits_for_storage_ms_per_image"]
    slow = [
        f"speed: {wait_ms:.2f} ms an image are spent waiting for the storage: more tasks at once, or a nearer copy, would help"
    ]
    return [
        *(busy if is_busy else []),
        *(slow if not is_busy and wait_ms > SLOW_STORAGE * sum(found["stages_cpu_ms_per_image"].values()) else []),
        f"speed: 1 core makes {found['images_per_s_1_core']:.0f} augmented images/s, {used} {found['images_per_s']:.0f}; most time goes into: "
        f"{found['slowest_stage']}",
        f"speed: CPU ms an image on 1 core: {stages}",
        f"speed: from the second epoch on with train.cache=ram, nothing decoded: about {found['images_per_s_cached_estimate']:.0f} images/s",
        f"speed: CPUs that one GPU needs: {rates} images/s",
        f"verdict: {found['verdict']}",
    ]  # fmt: skip


def page(report: Mapping[str, Any], lines: Sequence[str], pictures: Mapping[str, bytes]) -> str:
    """One self-contained HTML page: the summary, and the pictures by title."""
    images = "".join(
        f'<h2>{html.escape(title)}</h2>\n<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">\n'
        for title, png in pictures.items()
    )
    title = html.escape(f"{report['name']}: the images of '{report['split']}'")
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>\n<style>body {{ font: 16px/1.5 system-ui, sans-serif; '
            f"margin: 2rem auto; max-width: 1600px; padding: 0 1rem }} img {{ max-width: 100% }} pre {{ white-space: pre-wrap }}</style></head>\n"
            f"<body><h1>{title}</h1>\n<pre>{html.escape(chr(10).join(lines))}</pre>\n{images}</body></html>\n")  # fmt: skip


def _px(share: float | None, imgsz: int) -> float | None:
    return None if share is None else share * imgsz


def _percent(share: float) -> str:
    return f"{share:.0%}" if share >= 0.01 else f"{share:.1%}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
