"""Batches that Ray Data rendered, copied to a GPU beside the model's stream: whole, one ahead, without waiting, from pinned memory used again."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from raypar.prefetch import sent

DEVICE = torch.device("cuda", 0)
SHAPE, COUNT = (8, 3, 256, 256), 40


def slabs() -> Iterator[np.ndarray]:
    """As Ray Data deals them; a slab's memory is another one's two steps later."""
    memory = np.empty((2, *SHAPE), np.uint8)
    for i in range(COUNT):
        memory[i % 2] = np.random.default_rng(i).integers(0, 256, SHAPE, np.uint8)
        yield memory[i % 2]


def to_tensors(slab: np.ndarray) -> dict[str, torch.Tensor]:
    return {"img": torch.from_numpy(slab), "cls": torch.zeros(0, 1), "batch_idx": torch.arange(3.0)}


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_batches_are_whole_when_the_models_stream_uses_them() -> None:
    expected = [int(slab.sum(dtype=np.int64)) for slab in slabs()]
    busy = torch.randn(2048, 2048, device=DEVICE)
    found = []
    for _, tensors in sent(slabs(), to_tensors, DEVICE):
        assert all(tensor.is_cuda for tensor in tensors.values())
        assert tensors["cls"].shape == (0, 1)
        for _ in range(3):  # the model: the batch waits in the stream, and its memory must not be given away
            busy = busy @ busy / 2048
        found.append(tensors["img"].sum(dtype=torch.int64))
        del tensors
    assert torch.stack(found).tolist() == expected


@pytest.mark.usefixtures("_waiting_is_an_error")
def test_the_host_does_not_wait() -> None:
    assert sum(1 for _ in sent(slabs(), to_tensors, DEVICE)) == COUNT


def test_pinned_memory_is_used_again() -> None:
    made = sent(slabs(), to_tensors, DEVICE)
    for _ in range(8):
        next(iter(made))
        torch.cuda.synchronize()
    before = torch.cuda.host_memory_stats()["num_host_alloc"]
    for _ in made:
        torch.cuda.synchronize()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before


def test_a_stream_that_is_left_early_leaves_nothing_under_way() -> None:
    made = sent(slabs(), to_tensors, DEVICE)
    _, tensors = next(iter(made))
    first = int(tensors["img"].sum(dtype=torch.int64))
    made.close()  # type: ignore[attr-defined]
    assert first == int(next(slabs()).sum(dtype=np.int64))
    torch.cuda.synchronize()
