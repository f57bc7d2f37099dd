"""What ``inspect`` draws: histograms of the statistics, and samples with their boxes, raw and as the model gets them.

Runs in: the driver. Matplotlib draws without a display and without its global state.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from raypar.boxes import xywhn_to_xyxy
from raypar.dataset.show import batch_image
from raypar.dataset.stream import StreamSpec, render
from raypar.draw import boxes_on, contact_sheet, outlines_on, points_on
from raypar.images import Image, decode, encode_png
from raypar.inspect import statistics
from raypar.inspect.speed import STAGES
from raypar.inspect.statistics import Statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_CLASSES = 30  # shown; the most frequent ones
BLUE, ORANGE, INK = "#0072B2", "#D55E00", "#555555"  # told apart by colour-blind eyes (Okabe and Ito, 2008)
STAGE_COLOURS = ("#999999", "#56B4E9", "#CC79A7", "#0072B2", "#E69F00")


def samples(spec: StreamSpec, class_names: Sequence[str], num_samples: int) -> tuple[bytes, bytes]:
    """Two contact sheets as PNG: the images that training shows first, as they lie in the shards and as the model gets them."""
    augmented: list[Image] = []
    rows: list[int] = []
    for item in spec.plan.items():
        for batch in render(spec, item):
            for i, row in enumerate(batch.rows[: num_samples - len(rows)]):
                augmented.append(batch_image(batch, i, class_names))
                rows.append(int(row))
        if len(rows) >= num_samples or item.epoch:
            break
    titles, raw = zip(*(_raw(spec, row, class_names) for row in rows), strict=True)
    sheets = [
        encode_png(contact_sheet(images, titles, columns=_columns(rows))) for images in (raw, augmented)
    ]
    return sheets[0], sheets[1]


def _columns(rows: Sequence[int]) -> int:
    return max(1, min(4, round(len(rows) ** 0.5)))


def _raw(spec: StreamSpec, row: int, class_names: Sequence[str]) -> tuple[str, Image]:
    """The id of a row of the split (with its class, when it has but one), and its image with its labels."""
    group = int(np.searchsorted(spec.first_rows, row, side="right")) - 1
    path, index = spec.groups[group]
    with spec.dataset.open(path) as file:
        found = (
            pq.ParquetFile(file)
            .read_row_group(index)
            .slice(row - int(spec.first_rows[group]), 1)
            .to_pylist()[0]
        )
    try:
        image = decode(found["image"])
    except ValueError:  # training shows another one in its place
        return f"cannot be decoded: {found['image_id']}", np.full(
            (found["height"], found["width"], 3), 255, np.uint8
        )
    if "class_id" in found:
        return f"{class_names[found['class_id']]}: {found['image_id']}", image
    image_hw, class_ids = (found["height"], found["width"]), np.asarray(found["class_ids"], np.int32)
    wh = np.array(image_hw[::-1])
    image = boxes_on(
        image, xywhn_to_xyxy(np.asarray(found["boxes_xywhn"], np.float32), image_hw), class_ids, class_names
    )
    if found.get("segments_xyn"):  # detect: a source may have only boxes
        image = outlines_on(
            image, [np.reshape(outline, (-1, 2)) * wh for outline in found["segments_xyn"]], class_ids
        )
    if len(class_ids) and "keypoints" in found:
        image = points_on(
            image, np.reshape(found["keypoints"], (len(class_ids), -1, 3)).astype(np.float32) * [*wh, 1]
        )
    return found["image_id"], image


def histograms(
    found: Statistics, class_names: Sequence[str], imgsz: int, title: str, speed: dict[str, Any] | None
) -> bytes:
    """Eight panels as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(20, 10.5), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=15)
    axes: Any = figure.subplots(2, 4)
    has_boxes = found.num_boxes > 0
    _classes(axes[0, 0], found, class_names)
    for axis, draw in (
        (axes[0, 1], _sides),
        (axes[0, 2], _shapes),
        (axes[0, 3], _centres),
        (axes[1, 0], _per_image),
    ):
        if has_boxes:
            draw(axis, found, imgsz)
        else:
            _empty(axis, "no boxes")
    _image_sizes(axes[1, 1], found)
    _aspects(axes[1, 2], found)
    if speed:
        _stages(axes[1, 3], speed["stages_cpu_ms_per_image"])
    else:
        _empty(axes[1, 3], "speed: not measured (inspect.seconds=0)")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _classes(axis: Axes, found: Statistics, class_names: Sequence[str]) -> None:
    counts = found.boxes_per_class if found.num_boxes else found.sums["images_per_class"]
    order = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    places = np.arange(len(order))
    axis.barh(places, counts[order], color=BLUE)
    axis.set_yticks(places, [_short(class_names[i]) for i in order], fontsize=9 if len(order) > 15 else 10)
    axis.invert_yaxis()
    for place, i in zip(places, order, strict=True):
        axis.text(
            float(counts[i]),
            float(place),
            f" {counts[i]:,}",
            va="center",
            fontsize=9,
            color=ORANGE if counts[i] == 0 else INK,
        )
    axis.margins(x=0.18)
    what = "boxes" if found.num_boxes else "images"
    axis.set_title(
        f"{what} of each class"
        + (f" (the {MAX_CLASSES} largest of {len(counts)})" if len(counts) > MAX_CLASSES else "")
    )


def _sides(axis: Axes, found: Statistics, imgsz: int) -> None:
    counts = found.sums["sides_per_class"].sum(0)
    edges = imgsz * 2.0 ** (np.arange(statistics.SIDE_BINS + 1) / statistics.FINE - statistics.OCTAVES)
    axis.stairs(counts, edges, fill=True, color=BLUE)
    seen = np.flatnonzero(counts)
    low, high = min(float(edges[seen[0]]), 1.0), max(float(edges[seen[-1] + 1]), 192.0)
    axis.set_xscale("log", base=2)
    axis.set_xlim(low, high)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    shares = found.sums["sizes"] / found.num_boxes
    limits = [low, *statistics.SIZES_PX, high]
    for edge in statistics.SIZES_PX:
        axis.axvline(edge, color=ORANGE, linewidth=1, linestyle="--")
    for name, share, left, right in zip(statistics.SIZE_NAMES, shares, limits[:-1], limits[1:], strict=True):
        if right > left:
            percent = "<1%" if 0 < share < 0.005 else f"{share:.0%}"
            place = (left * right) ** 0.5, 0.99
            axis.text(
                *place,
                f"{name}\n{percent}",
                transform=axis.get_xaxis_transform(),
                ha="center",
                va="top",
                fontsize=9,
            )
    axis.set_ylim(top=max(1, counts.max()) * 1.18)
    axis.set_title(f"box size when trained at {imgsz} px")
    axis.set_xlabel("square root of the area, px")


def _shapes(axis: Axes, found: Statistics, imgsz: int) -> None:
    edges = 2.0 ** (np.arange(statistics.SHAPE_BINS + 1) / statistics.COARSE - statistics.OCTAVES)
    counts = found.sums["box_shapes"].T  # rows: heights
    seen = np.flatnonzero(counts.any(0) | counts.any(1))
    axis.pcolormesh(edges, edges, _shown(counts), cmap="viridis")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set(
        xlim=(edges[seen[0]], 1),
        ylim=(edges[seen[0]], 1),
        xlabel="width / image width",
        ylabel="height / image height",
    )
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_formatter(lambda value, _: f"1/{1 / value:g}" if value < 1 else "1")
    axis.set_title("box width and height")


def _centres(axis: Axes, found: Statistics, imgsz: int) -> None:
    counts = found.sums["centres"]
    while counts.mean() < 5 and len(counts) > 12:  # few boxes: larger cells, less noise
        counts = counts.reshape(len(counts) // 2, 2, len(counts) // 2, 2).sum((1, 3))
    axis.imshow(counts, extent=(0, 1, 1, 0), cmap="viridis", interpolation="nearest", aspect="auto")
    axis.set(xlabel="x / image width", ylabel="y / image height", title="where the boxes' centres are")


def _per_image(axis: Axes, found: Statistics, imgsz: int) -> None:
    counts = found.sums["boxes_per_image"]
    last = int(np.flatnonzero(counts)[-1])
    width = max(1, -(-(last + 1) // 60))
    joined = np.add.reduceat(counts[: last + 1], np.arange(0, last + 1, width))
    axis.bar(np.arange(len(joined)) * width + (width - 1) / 2, joined, width=0.9 * width, color=BLUE)
    mean = found.num_boxes / found.num_images
    axis.axvline(mean, color=ORANGE, linewidth=1, linestyle="--")
    axis.set(title=f"boxes an image: {mean:.1f} in the mean, {found.highs[2]:,} at most", xlabel="boxes",
             ylabel="images")  # fmt: skip
    axis.locator_params("x", integer=True)


def _image_sizes(axis: Axes, found: Statistics) -> None:
    low, high = found.lows, found.highs
    if (low == high[:2]).all():
        _empty(axis, f"all images are\n{high[1]} x {high[0]} px")
    else:
        counts = found.sums["image_sizes"].T  # rows: heights
        edges = 2.0 ** (np.arange(statistics.IMAGE_BINS + 1) / statistics.COARSE)
        axis.pcolormesh(edges, edges, _shown(counts), cmap="viridis")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        limits = edges[
            [
                np.flatnonzero(counts.any(0) | counts.any(1))[0],
                np.flatnonzero(counts.any(0) | counts.any(1))[-1] + 1,
            ]
        ]
        axis.set(
            xlim=limits,
            ylim=limits,
            xlabel=f"width, px ({low[1]} to {high[1]})",
            ylabel=f"height, px ({low[0]} to {high[0]})",
        )
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_title("image sizes")


def _aspects(axis: Axes, found: Statistics) -> None:
    counts = found.sums["aspects"]
    seen = np.flatnonzero(counts)
    centre = statistics.ASPECT_BINS // 2
    low, high = min(seen[0], centre - 8) - 1, max(seen[-1], centre + 8) + 1
    places = np.arange(low, high + 1)
    axis.bar(places, np.pad(counts, 16)[places + 16], width=0.9, color=BLUE)
    ratios = {
        "1:4": 0.25,
        "1:2": 0.5,
        "3:4": 0.75,
        "1:1": 1.0,
        "4:3": 4 / 3,
        "16:9": 16 / 9,
        "5:2": 2.5,
        "4:1": 4.0,
    }
    ticks = {name: centre + statistics.FINE * np.log2(ratio) for name, ratio in ratios.items()}
    ticks = {name: place for name, place in ticks.items() if low <= place <= high}
    axis.set_xticks(list(ticks.values()), list(ticks))
    axis.set(title="images' aspect ratios", xlabel="width : height", ylabel="images")


def _stages(axis: Axes, stages: dict[str, float]) -> None:
    for place, (stage, colour) in enumerate(zip(STAGES, STAGE_COLOURS, strict=True)):
        axis.barh(place, stages[stage], color=colour)
        axis.text(stages[stage], place, f" {stages[stage]:.2f} ms", va="center", color=INK)
    axis.set_yticks(range(len(STAGES)), STAGES)
    axis.invert_yaxis()
    axis.margins(x=0.2)
    axis.set_title(f"CPU time an image, by stage: {sum(stages.values()):.2f} ms")


def _empty(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, ha="center", va="center", transform=axis.transAxes, fontsize=14, color=INK)
    axis.set_axis_off()


def _shown(counts: Any) -> Any:
    """Logarithms of counts, and nothing where there are none."""
    return np.ma.masked_equal(np.log1p(counts) * (counts > 0), 0)


def _short(name: str) -> str:
    return name if len(name) <= 22 else name[:21] + "..."
