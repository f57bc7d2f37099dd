"""Encoded batches, decoded and rendered on the device: the other half of ``augment: gpu``.

Runs in: training workers. One decode serves an image's about four uses: a rank's ring keeps the images of its last ``depth`` steps. A worker that
starts in the middle of a run fills its ring with the steps before, and renders from there on what an undisturbed one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from raypar.augment.geometry import Recipe
from raypar.augment.gpu import GpuRenderer
from raypar.augment.ring import Ring, decode_batch
from raypar.dataset.batch import Batch
from raypar.dataset.encoded import EncodedBatch, depth_of, encoded_batches
from raypar.dataset.stream import StreamSpec
from raypar.prefetch import prefetched, to_device

Rendered = tuple[Batch, dict[str, Tensor]]
ToTensors = Callable[[Batch], dict[str, Tensor]]


class Feed:
    """A rank's ring and renderer.

    Args:
        spec: of the stream.
        device: of the ring and of batches.
        to_tensors: a batch's labels as the loss wants them, on the host; ``img`` among them is replaced.

    Raises:
        ValueError: the device has no memory for the ring.
    """

    def __init__(self, spec: StreamSpec, device: torch.device | str, to_tensors: ToTensors):
        assert isinstance(spec.recipe, Recipe)
        self.device, self.to_tensors, self.imgsz = torch.device(device), to_tensors, spec.recipe.imgsz
        self.steps_per_epoch, self.depth = spec.plan.steps_per_epoch, depth_of(spec)
        self.renderer = GpuRenderer(spec.recipe, device)
        capacity = self.depth * spec.images_per_batch
        self.ring = self._ring(capacity, is_enlarged=not spec.recipe.is_axis_aligned)
        self.is_grey = np.zeros(capacity, np.bool_)  # of each slot, whether its image could not be decoded

    def _ring(self, capacity: int, *, is_enlarged: bool) -> Ring:
        try:
            return Ring(capacity, self.imgsz, self.device, is_enlarged=is_enlarged)
        except RuntimeError as error:  # torch's errors of CUDA and of the host have no other class in common
            if "memory" not in str(error):
                raise
            raise ValueError(
                f"train.augment=gpu keeps the worker's last {capacity} images, {4 * capacity * self.imgsz**2 / 1e9:.1f} GB, on {self.device}, "
                f"which has not so much left: take train.augment=cpu, more workers, or a smaller train.batch or train.yolo.imgsz"
            ) from error

    def put(self, given: EncodedBatch) -> int:
        """Decodes a step's images into the ring. Returns how many could not be: they are grey."""
        per_batch = len(given.encoded)
        first = (given.epoch * self.steps_per_epoch + given.step) % self.depth * per_batch
        images, grey = decode_batch(
            given.encoded, [(int(h), int(w)) for h, w in given.image_hws], self.imgsz, self.device
        )
        self.ring.put(range(first, first + per_batch), images)
        self.is_grey[first : first + per_batch] = False
        self.is_grey[[first + i for i in grey]] = True
        return len(grey)

    def __call__(self, given: EncodedBatch) -> Rendered:
        """A step: the batch, whose ``images`` are empty, and what the loss wants, on the device."""
        num_grey = self.put(given)
        batch = replace(given.labels, num_replaced=num_grey)
        if self.is_grey.any():
            batch = without(batch, self.is_grey[given.box_slots])
        labels = {name: tensor for name, tensor in self.to_tensors(batch).items() if name != "img"}
        return batch, to_device(labels, self.device) | {"img": self.renderer.render(given.table, self.ring)}


def rendered_batches(
    spec: StreamSpec, rank: int, cursor: int, device: torch.device | str, to_tensors: ToTensors
) -> Iterator[Rendered]:
    """A rank's batches from a cursor to the end of the run, each prepared while the one before is in use.

    Every rank of the worker group must iterate; rank 0 feeds all.
    """
    begin = max(0, cursor - (depth_of(spec) - 1) * spec.plan.global_batch)
    return rendered(
        encoded_batches(spec, rank, begin), Feed(spec, device, to_tensors), cursor // spec.plan.global_batch
    )


def rendered(given: Iterable[EncodedBatch], feed: Feed, first_step: int) -> Iterator[Rendered]:
    """Batches from a step of the run on; those before only fill the ring."""

    def prepare(batch: EncodedBatch) -> Rendered | None:
        if batch.epoch * feed.steps_per_epoch + batch.step >= first_step:
            return feed(batch)
        feed.put(batch)
        return None

    for made in prefetched(given, prepare, feed.device):
        if made is not None:
            yield made


def without(batch: Batch, is_dropped: NDArray[np.bool_]) -> Batch:
    """A batch without some of its labels, which are those of images that nobody sees.

    Args:
        batch: to change.
        is_dropped: bool (M,).
    """
    keep = ~is_dropped
    masks = batch.masks
    if masks is not None:  # pixels of dropped instances are nobody's; the others are counted anew
        masks = masks.copy()
        for i, mask in enumerate(masks):
            kept = keep[batch.image_index == i]
            number = np.concatenate([[0], np.where(kept, np.cumsum(kept), 0)])
            mask[:] = number.astype(masks.dtype)[mask]
    return replace(
        batch, class_ids=batch.class_ids[keep], boxes_xywhn=batch.boxes_xywhn[keep], image_index=batch.image_index[keep], masks=masks,
        keypoints=None if batch.keypoints is None else batch.keypoints[keep],
        boxes_xywhr=None if batch.boxes_xywhr is None else batch.boxes_xywhr[keep])  # fmt: skip
