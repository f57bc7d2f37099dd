"""The batch renderer on a GPU: the pixels of the CPU renderer, without waiting for the device; nvJPEG; the side stream."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from raypar.augment import fused
from raypar.augment import ring as ring_module
from raypar.augment.cpu import Renderer
from raypar.augment.geometry import Recipe, draw, generator
from raypar.augment.gpu import GpuRenderer
from raypar.augment.pack import Table, pack
from raypar.augment.ring import Ring, decode_batch, has_nvjpeg
from raypar.images import decode, encode_jpeg, encode_png
from raypar.prefetch import prefetched

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_augment_gpu import SIZE, differences, filled, jpeg, picture, window_of

EVERYTHING = {"mosaic": 0.7, "mixup": 0.5, "cutmix": 0.7, "scale": 0.5, "translate": 0.2, "hsv_h": 0.015, "hsv_s": 0.7, "hsv_v": 0.4,
              "fliplr": 0.5, "flipud": 0.5, "bgr": 0.5}  # fmt: skip
RECIPES = {
    "upright": Recipe(SIZE, **EVERYTHING),
    "turned": Recipe(SIZE, **EVERYTHING, degrees=20, shear=5, perspective=0.001),
}
HWS = [(96, 72), (64, 96), (96, 96), (20, 30), (80, 96)]
kernels = pytest.mark.parametrize(
    "is_fused", [False, pytest.param(True, marks=pytest.mark.skipif(not fused.IS_HERE, reason="no Triton"))]
)
recipes = pytest.mark.parametrize("name", RECIPES)


def prepared(recipe: Recipe, seed: int, num_images: int = 16) -> tuple[Table, Ring, np.ndarray]:
    """A packed batch, a ring on the GPU, and the CPU renderer's batch."""
    sources = window_of(seed, HWS)
    samples = [
        draw(recipe, generator(seed, 0, i), i % len(HWS), len(HWS), mosaic_on=i % 4 < 3)
        for i in range(num_images)
    ]
    expected = np.empty((num_images, 3, SIZE, SIZE), np.uint8)
    renderer = Renderer(recipe)
    cuts = [renderer.render(sample, sources, out).cut for sample, out in zip(samples, expected, strict=True)]
    ring, slots = filled(recipe, sources, "cuda")
    return pack(recipe, samples, [ring.hws[slot] for slot in slots], slots, cuts), ring, expected


@kernels
@recipes
def test_pixels_are_those_of_the_cpu_renderer(name: str, is_fused: bool) -> None:
    for seed in range(4):
        table, ring, expected = prepared(RECIPES[name], seed)
        got = GpuRenderer(RECIPES[name], "cuda", is_fused=is_fused).render(table, ring).cpu().numpy()
        assert differences(got, expected).max() <= 2
        assert differences(got, expected).mean() <= 0.5


@kernels
@recipes
def test_a_floating_channels_last_batch_has_the_same_values(name: str, is_fused: bool) -> None:
    table, ring, _ = prepared(RECIPES[name], 0)
    as_bytes = GpuRenderer(RECIPES[name], "cuda", is_fused=is_fused).render(table, ring)
    made = GpuRenderer(
        RECIPES[name], "cuda", is_fused=is_fused, dtype=torch.bfloat16, channels_last=True
    ).render(table, ring)
    assert made.is_contiguous(memory_format=torch.channels_last)
    assert (made.float() * 255 - as_bytes.float()).abs().max() <= 0.51  # bfloat16 has 8 bits


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_an_error")
@kernels
@recipes
def test_nothing_waits_for_the_device(name: str, is_fused: bool) -> None:
    table, ring, _ = prepared(RECIPES[name], 0)
    renderer = GpuRenderer(RECIPES[name], "cuda", is_fused=is_fused)
    renderer.render(table, ring)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    renderer.render(table, ring)


def luma(image: np.ndarray) -> np.ndarray:
    """float (H, W) of uint8 (H, W, 3) RGB: what chroma upsampling, which every decoder does in its own way, leaves alone (but for clipping)."""
    return image @ np.array([0.299, 0.587, 0.114])


def test_decoding_on_the_gpu_is_near_to_decoding_on_the_host_and_mends_the_same() -> None:
    image, small = picture(np.random.default_rng(0), 200, 150), picture(np.random.default_rng(1), 40, 60)
    sound = [encode_jpeg(image), encode_png(small), jpeg(small, progressive=True), jpeg(small, subsampling=0)]
    for encoded, damaged in ((sound, []), ([*sound, sound[0][:300]], [4])):
        hws = [(200, 150), (40, 60), (40, 60), (40, 60), (30, 40)][: len(encoded)]
        images, grey = decode_batch(encoded, hws, 200, "cuda")
        assert grey == damaged
        for data, made in zip(sound, images, strict=False):
            pixels = made.cpu().numpy()
            assert np.abs(luma(pixels) - luma(decode(data))).mean() <= 1
            most = 1 if data in sound[1:] else 6  # the first has colours for every second pixel only
            assert np.abs(pixels.astype(int) - decode(data)).mean() <= most
    assert decode_batch(sound[:1], [(200, 150)], SIZE, "cuda")[0][0].shape == (96, 72, 3)


def test_batches_made_on_a_side_stream_are_whole_when_they_are_used() -> None:
    recipe = RECIPES["upright"]
    renderer, sources = GpuRenderer(recipe, "cuda"), window_of(0, HWS)
    ring, slots = filled(recipe, sources, "cuda")
    hws = [ring.hws[slot] for slot in slots]
    tables = [
        pack(
            recipe,
            [draw(recipe, generator(0, e, i), i % 5, 5, mosaic_on=True) for i in range(32)],
            hws,
            slots,
        )
        for e in range(40)
    ]
    expected = [renderer.render(table, ring).float().sum() for table in tables]
    busy = torch.randn(2048, 2048, device="cuda")
    found = []
    for batch in prefetched(tables, lambda table: renderer.render(table, ring), "cuda"):
        # the model: the batch waits in the stream, and its memory must not be given away
        busy = busy @ busy / 2048
        found.append(batch.float().sum())
    assert torch.equal(torch.stack(found), torch.stack(expected))


def test_without_nvjpeg_the_same_images_come_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = [encode_jpeg(picture(np.random.default_rng(i), 64, 80)) for i in range(3)]
    on_device, _ = decode_batch(encoded, [(64, 80)] * 3, SIZE, "cuda")
    assert [image.is_cuda for image in on_device] == [has_nvjpeg(torch.device("cuda"))] * 3
    monkeypatch.setattr(ring_module, "has_nvjpeg", lambda device: False)
    on_host, grey = decode_batch(encoded, [(64, 80)] * 3, SIZE, "cuda")
    assert not grey
    rings = [Ring(3, SIZE, "cuda") for _ in range(2)]
    for ring, images in zip(rings, (on_device, on_host), strict=True):
        ring.put(range(3), images)
    first, second = (ring.pixels[:, :64, :80, :3].cpu().numpy() for ring in rings)
    assert np.abs(luma(first) - luma(second)).mean() <= 1


def test_where_triton_cannot_compile_the_torch_program_renders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    table, ring, expected = prepared(RECIPES["upright"], 0)
    renderer = GpuRenderer(RECIPES["upright"], "cuda")
    assert renderer.is_fused == fused.IS_HERE
    monkeypatch.setattr(fused, "render", fail)
    got = renderer.render(table, ring).cpu().numpy()
    assert differences(got, expected).max() <= 2
    assert capsys.readouterr().out.count("C compiler") == int(fused.IS_HERE)
