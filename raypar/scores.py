"""What the scores of an epoch are called: in ``metrics.jsonl``, for people, and in Ultralytics' ``results.csv``. Pure."""

from __future__ import annotations

from typing import Any

SCORES = {
    "map50": "mAP50", "map50_95": "mAP50-95", "mask_map50": "mask mAP50", "mask_map50_95": "mask mAP50-95",
    "pose_map50": "pose mAP50", "pose_map50_95": "pose mAP50-95", "top1": "top-1", "top5": "top-5",
}  # fmt: skip
KINDS = {
    "": "",
    "mask_": "mask ",
    "pose_": "pose ",
}  # of boxes, masks and keypoints: how the names of their scores begin
# Columns of results.csv as Ultralytics names them, so that its plots and its users' scripts read ours.
ULTRALYTICS_NAMES = {
    **{f"{prefix}{ours}": f"metrics/{theirs}({of})" for prefix, of in (("", "B"), ("mask_", "M"), ("pose_", "P"))
       for ours, theirs in (("precision", "precision"), ("recall", "recall"), ("map50", "mAP50"), ("map50_95", "mAP50-95"))},
    "top1": "metrics/accuracy_top1", "top5": "metrics/accuracy_top5",
}  # fmt: skip


def scores_of(line: dict[str, Any]) -> str:
    """The scores in an epoch's line, as people name them; nothing when it was not validated."""
    return " ".join(f"{name} {line[key]:.3f}" for key, name in SCORES.items() if key in line)
