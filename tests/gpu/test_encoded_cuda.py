"""`augment: gpu` on a GPU: the stream rendered there is the one rendered on CPU tensors, prepared beside the training's stream."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from raypar.augment import ring
from raypar.augment.geometry import Recipe
from raypar.dataset.batch import Batch
from raypar.dataset.encoded import encoded_blocks, pack, unpack
from raypar.dataset.rendered import Feed, Rendered, rendered
from raypar.dataset.stream import StreamSpec

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_stream_properties import folder, spec_of

__all__ = ["folder"]  # a fixture
EVERYTHING = {"mosaic": 0.7, "mixup": 0.5, "cutmix": 0.7, "scale": 0.5, "translate": 0.2, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
              "fliplr": 0.5, "flipud": 0.5, "bgr": 0.5}  # fmt: skip


def to_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {"bboxes": torch.from_numpy(batch.boxes_xywhn.copy())}


def shown(spec: StreamSpec, device: str, first_step: int = 0) -> list[Rendered]:
    dealt = (
        batch
        for item in spec.plan.items()
        for block in encoded_blocks(spec, item)
        for batch in unpack(pack(block))
    )
    return [
        (batch, {name: tensor.cpu() for name, tensor in tensors.items()})
        for batch, tensors in rendered(dealt, Feed(spec, device, to_tensors), first_step)
        if torch.ones(1, device=device).item() == 1  # the training's stream is in use
    ]


@pytest.mark.parametrize("more", [{}, {"degrees": 20, "shear": 5}])
def test_a_stream_is_rendered_as_on_cpu_tensors_from_any_step(
    folder: Path, more: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    # one decoder: what two of them differ by is another test's
    monkeypatch.setattr(ring, "has_nvjpeg", lambda device: False)
    spec = spec_of(folder, 23, 7, 1, seed=3, global_batch=8, epochs=12, window_images=8)
    spec = replace(spec, recipe=Recipe(32, **EVERYTHING, **more), mosaic_epochs=10)  # type: ignore[arg-type]
    expected, got = shown(spec, "cpu"), shown(spec, "cuda")
    assert len(expected) == len(got) == 36
    for (batch, tensors), (other, made) in zip(expected, got, strict=True):
        assert made["img"].dtype == torch.uint8
        difference = (made["img"].float() - tensors["img"].float()).abs().mean((1, 2, 3))
        assert difference.max() <= 0.5
        assert torch.equal(made["bboxes"], tensors["bboxes"])
        assert np.array_equal(batch.class_ids, other.class_ids)
    for (_, made), (_, again) in zip(got[20:], shown(spec, "cuda", 20), strict=True):
        assert torch.equal(made["img"], again["img"])


def test_the_tensors_are_on_the_device(folder: Path) -> None:
    spec = spec_of(folder, 23, 7, 1, seed=3, global_batch=8, epochs=1, window_images=8)
    dealt = (batch for item in spec.plan.items() for block in encoded_blocks(spec, item) for batch in block)
    for _, tensors in rendered(dealt, Feed(spec, "cuda", to_tensors), 0):
        assert all(tensor.is_cuda for tensor in tensors.values())
