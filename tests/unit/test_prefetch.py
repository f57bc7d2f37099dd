"""What a step needs is made one step ahead. The part for GPUs is shown what a GPU would be asked, in which order; on one it runs in tests/gpu."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

from raypar import prefetch
from raypar.dataset.batch import Batch
from raypar.prefetch import prefetched, sent, to_device
from raypar.train.loop import to_tensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_prefetching_keeps_order_is_one_ahead_and_passes_errors_on() -> None:
    begun: list[int] = []
    has_begun = threading.Event()

    def prepare(item: int) -> torch.Tensor:
        begun.append(item)
        if item == 1:
            has_begun.set()
        if item == 4:
            raise ValueError("item 4")
        return torch.tensor(item)

    made = prefetched(range(9), prepare, "cpu")
    assert int(next(made)) == 0
    assert has_begun.wait(10), "the next one is made while this one is in use"
    assert begun == [0, 1]
    assert [int(next(made)) for _ in range(3)] == [1, 2, 3]
    with pytest.raises(ValueError, match="item 4"):
        next(made)
    assert 6 not in begun


def test_on_a_cpu_nothing_is_copied_ahead_or_by_another_thread() -> None:
    threads: list[int] = []
    image = torch.zeros(3)

    def tensors_of(item: int) -> dict[str, torch.Tensor]:
        threads.append(threading.get_ident())
        return {"img": image}

    made = sent(iter(range(3)), tensors_of, CPU)
    assert next(iter(made))[1]["img"] is image
    assert threads == [threading.get_ident()]
    assert [item for item, _ in made] == [1, 2]
    assert to_device({"img": image}, CPU)["img"] is image


def test_a_batch_that_cannot_be_written_to_becomes_tensors_without_a_word(
    recwarn: pytest.WarningsRecorder,
) -> None:
    batch = Batch(
        0,
        0,
        0,
        np.zeros((1, 3, 2, 2), np.uint8),
        np.zeros(1, np.int32),
        np.zeros((1, 4), np.float32),
        np.zeros(1, np.int32),
        np.zeros(1, np.int64),
    )
    for array in (batch.images, batch.class_ids, batch.boxes_xywhn, batch.image_index):
        array.setflags(write=False)
    tensors = to_tensors(batch)
    assert tensors["img"].data_ptr() == batch.images.ctypes.data, "the slab is not copied"
    assert not recwarn.list


class Cuda:
    """In the place of ``torch.cuda``: tells what is asked of it; a thread's current stream is its own, as there."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.here = threading.local()

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        return Stream(self, "side")

    def current_stream(self, device: Any = None) -> Stream:
        return getattr(self.here, "stream", None) or Stream(self, "model's")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.here.stream = stream
        yield
        self.here.stream = None

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        yield


class Stream:
    def __init__(self, cuda: Cuda, name: str):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self.cuda.told.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        return f"{self.name}'s event after {self.cuda.told.pop()}"

    def wait_event(self, event: str) -> None:
        self.cuda.told.append(f"{self.name} waits for {event}")


class Pretender(torch.Tensor):
    """A tensor that takes itself for one of a GPU."""

    is_cuda = True
    cuda: Cuda

    def record_stream(self, stream: Stream) -> None:
        self.cuda.told.append(f"used by {stream.name}")


def test_on_a_gpu_the_models_stream_waits_for_the_copy_and_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = Cuda()
    monkeypatch.setattr(prefetch.torch, "cuda", cuda)
    monkeypatch.setattr(Pretender, "cuda", cuda, raising=False)

    def prepare(item: str) -> tuple[str, dict[str, torch.Tensor]]:
        cuda.told.append(f"{item} on {cuda.current_stream().name}")
        return item, {name: torch.zeros(1).as_subclass(Pretender) for name in ("img", "cls")}

    def shown() -> Iterator[str]:
        for item, _ in prefetched(["a"], prepare, CUDA):
            yield item

    assert list(shown()) == ["a"]
    assert cuda.told == [
        "side waits for model's",
        "model's waits for side's event after a on side",
        "used by model's",
        "used by model's",
        "model's waits for side",
    ]
