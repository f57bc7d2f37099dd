"""The batch renderer on CPU tensors against the CPU renderer: the same samples, the same pixels; its ring, its decoding, its kernel."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raypar.augment import fused
from raypar.augment import ring as ring_module
from raypar.augment.cpu import Renderer, Source
from raypar.augment.geometry import Recipe, draw, generator
from raypar.augment.gpu import GpuRenderer
from raypar.augment.labels import move_labels
from raypar.augment.ring import Ring, decode_batch, has_nvjpeg, is_baseline_jpeg
from raypar.images import decode, decode_shrunk, encode_jpeg, encode_png

SIZE = 96
MAX_MEAN_DIFFERENCE = 0.5  # grey levels: OpenCV interpolates in fixed point


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Waves and a hard edge: uint8 (H, W, 3)."""
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.sin(x * a + y * b + c) for a, b, c in rng.uniform(0, 2, (3, 3))]
    image = 120 + 70 * np.stack(waves, -1) + rng.normal(0, 4, (height, width, 3))
    image[height // 3 : height // 2] += 50
    return image.clip(0, 255).astype(np.uint8)


def window_of(seed: int, hws: list[tuple[int, int]]) -> list[Source]:
    rng = np.random.default_rng(seed)
    wh = rng.uniform(0.1, 0.4, (len(hws), 2, 2))
    boxes = np.concatenate([rng.uniform(wh / 2, 1 - wh / 2), wh], 2).astype(np.float32)
    return [
        Source(picture(rng, *hw), np.arange(2, dtype=np.int32), box)
        for hw, box in zip(hws, boxes, strict=True)
    ]


def both(
    recipe: Recipe, sources: list[Source], seed: int, num_images: int = 3, **how: object
) -> tuple[np.ndarray, np.ndarray]:
    """A batch by either renderer, (B, 3, S, S); the ring's slots are not the window's order."""
    samples = [
        draw(recipe, generator(seed, 0, i), (seed + i) % len(sources), len(sources), mosaic_on=i % 4 < 3)
        for i in range(num_images)
    ]
    expected = np.empty((num_images, 3, recipe.imgsz, recipe.imgsz), np.uint8)
    renderer = Renderer(recipe)
    cuts = [renderer.render(sample, sources, out).cut for sample, out in zip(samples, expected, strict=True)]
    # what a task would send along
    assert cuts == [move_labels(recipe, sample, sources).cut for sample in samples]
    ring, slots = filled(recipe, sources)
    return GpuRenderer(recipe, "cpu", **how)(samples, ring, slots, cuts).numpy(), expected  # type: ignore[arg-type]


def filled(recipe: Recipe, sources: list[Source], device: str = "cpu") -> tuple[Ring, list[int]]:
    ring = Ring(len(sources) + 2, recipe.imgsz, device, is_enlarged=not recipe.is_axis_aligned)
    ring.pixels.fill_(255)  # what lies beyond an image must never be seen
    slots = (
        [(3 * i + 1) % len(sources) + 1 for i in range(len(sources))]
        if len(sources) % 3
        else list(range(1, len(sources) + 1))
    )
    ring.put(slots, [source.image for source in sources])
    return ring, slots


def differences(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(got.astype(float) - expected).mean((1, 2, 3))


sides = st.integers(10, SIZE)
shares = st.sampled_from([0.0, 0.5, 1.0])
common = {"mosaic": shares, "mixup": shares, "cutmix": shares, "fliplr": shares, "flipud": shares, "bgr": shares,
          "translate": st.floats(0, 0.5), "scale": st.floats(0, 0.5), "hsv_h": st.sampled_from([0.0, 0.015, 0.5]),
          "hsv_s": st.sampled_from([0.0, 0.7]), "hsv_v": st.sampled_from([0.0, 0.4, 1.0])}  # fmt: skip
upright = st.builds(Recipe, imgsz=st.just(SIZE), **common)
turned = st.builds(Recipe, imgsz=st.just(SIZE), **common, degrees=st.floats(1, 180), shear=st.floats(0, 20),
                   perspective=st.sampled_from([0.0, 0.0005, 0.001]))  # fmt: skip
hws = st.lists(st.tuples(sides, sides), min_size=1, max_size=5)


@settings(max_examples=80)
@given(upright, hws, st.integers(0, 10**6))
def test_scale_shift_flip_mix_cut_and_colours_are_those_of_the_cpu_renderer(
    recipe: Recipe, image_hws: list[tuple[int, int]], seed: int
) -> None:
    got, expected = both(recipe, window_of(seed, image_hws), seed)
    assert differences(got, expected).max() <= 2
    # of three images, in the worst of cases
    assert differences(got, expected).mean() <= 2 * MAX_MEAN_DIFFERENCE


@settings(max_examples=80)
@given(turned, hws, st.integers(0, 10**6))
def test_turned_sheared_and_tilted_too(recipe: Recipe, image_hws: list[tuple[int, int]], seed: int) -> None:
    got, expected = both(recipe, window_of(seed, image_hws), seed)
    assert differences(got, expected).max() <= 2


@pytest.mark.parametrize("turn", [0.0, 20.0])
def test_typical_batches_differ_by_far_less_than_a_grey_level(turn: float) -> None:
    recipe = Recipe(
        SIZE,
        mosaic=1,
        scale=0.5,
        translate=0.1,
        hsv_h=0.015,
        hsv_s=0.7,
        hsv_v=0.4,
        fliplr=0.5,
        mixup=0.3,
        degrees=turn,
    )
    found = [
        differences(
            *both(recipe, window_of(seed, [(96, 72), (64, 96), (96, 96), (80, 96), (48, 40)]), seed, 4)
        )
        for seed in range(12)
    ]
    assert np.mean(found) <= MAX_MEAN_DIFFERENCE


def test_nothing_but_copying_is_exact() -> None:
    """Without a change of scale no value is between two pixels: only colours are left, and those are computed alike."""
    recipe = Recipe(
        SIZE,
        mosaic=1,
        scale=0,
        translate=0.1,
        hsv_h=0.5,
        hsv_s=0.7,
        hsv_v=0.4,
        fliplr=0.5,
        flipud=0.5,
        bgr=0.5,
    )
    got, expected = both(recipe, window_of(0, [(96, 72), (64, 96), (96, 96), (96, 50)]), 5, 12)
    np.testing.assert_array_equal(got, expected)


def test_a_floating_batch_is_the_bytes_over_255_and_channels_last_is_only_a_layout() -> None:
    recipe, sources = Recipe(SIZE, mosaic=1, scale=0.5, hsv_v=0.4), window_of(1, [(96, 72), (64, 96)])
    as_bytes, _ = both(recipe, sources, 1)
    as_floats, _ = both(recipe, sources, 1, dtype=torch.float32, channels_last=True)
    np.testing.assert_allclose(as_floats, as_bytes / np.float32(255), atol=1e-7)
    ring, slots = filled(recipe, sources)
    made = GpuRenderer(recipe, "cpu", dtype=torch.bfloat16, channels_last=True)(
        [draw(recipe, generator(0, 0, 0), 0, 2, mosaic_on=True)], ring, slots
    )
    assert made.dtype == torch.bfloat16
    assert made.is_contiguous(memory_format=torch.channels_last)


def test_the_triton_kernel_is_the_torch_program() -> None:
    """Interpreted, on CPU tensors; each pixel by the same steps, so that only what is rounded may differ."""
    pytest.importorskip("triton")
    code = """
import numpy as np, sys
sys.path.insert(0, sys.argv[1])
import test_augment_gpu as t
everything = dict(mosaic=0.7, mixup=0.5, cutmix=0.7, scale=0.5, translate=0.2, hsv_h=0.015, hsv_s=0.7, hsv_v=0.4, fliplr=0.5, flipud=0.5, bgr=0.5)
sources = t.window_of(0, [(16, 12), (10, 16), (16, 16), (9, 12)])
for more in ({}, dict(degrees=20, shear=5, perspective=0.001)):
    recipe = t.Recipe(16, **everything, **more)
    got, expected = (t.both(recipe, sources, 3, 4, is_fused=f)[0].astype(int) for f in (True, False))
    assert expected.std() > 20
    assert np.abs(got - expected).max() <= 1 and np.abs(got - expected).mean() < 0.01, np.abs(got - expected).mean()
floats = t.both(recipe, sources, 3, 1, is_fused=True, dtype=t.torch.float32, channels_last=True)[0]
assert np.abs(floats * 255 - expected[:1]).max() <= 1.01
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=False,
                          env=os.environ | {"TRITON_INTERPRET": "1"})  # fmt: skip
    assert done.stdout.endswith("equal\n"), done.stderr[-3000:]


@pytest.mark.parametrize("spans", [True, False])
def test_the_triton_kernel_compiles_without_a_gpu(
    spans: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a T4 and an H200, and so that it rounds as the torch program does."""
    triton = pytest.importorskip("triton")
    compiler, backends = (
        pytest.importorskip("triton.compiler"),
        pytest.importorskip("triton.backends.compiler"),
    )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"size": 640, "block": fused.BLOCK, "spans": spans, "is_byte": False}
    types = {"words": "*i32", "rows": "*fp32", "layers": "*fp32", "out": "*bf16"} | {
        f"stride_{axis}": "i32" for axis in "bcyx"
    }
    source = compiler.ASTSource(
        fn=fused._kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants
    )
    for architecture in (75, 90):
        made = triton.compile(
            source, target=backends.GPUTarget("cuda", architecture, 32), options={"enable_fp_fusion": False}
        )
        assert made.asm["cubin"]
        assert "fma.rn" not in made.asm["ptx"]


def test_what_the_renderer_does_not_do_is_refused() -> None:
    with pytest.raises(ValueError, match="augment=cpu"):
        GpuRenderer(Recipe(SIZE, copy_paste=0.5), "cpu")


def jpeg(image: np.ndarray, **settings: object) -> bytes:
    out = io.BytesIO()
    PIL.Image.fromarray(image).save(out, "JPEG", **settings)  # type: ignore[arg-type]
    return out.getvalue()


def test_decoding_shrinks_and_replaces_what_is_damaged_by_grey_of_the_same_size() -> None:
    rng = np.random.default_rng(0)
    large, small = picture(rng, 200, 150), picture(rng, 40, 60)
    encoded = [
        encode_jpeg(large),
        encode_png(small),
        b"no image",
        encode_png(small),
        memoryview(encode_jpeg(small)),
    ]
    images, grey = decode_batch(encoded, [(200, 150), (40, 60), (300, 100), (41, 60), (40, 60)], SIZE, "cpu")
    assert grey == [2, 3]
    assert [tuple(image.shape) for image in images] == [
        (96, 72, 3),
        (40, 60, 3),
        (96, 32, 3),
        (41, 60, 3),
        (40, 60, 3),
    ]
    np.testing.assert_array_equal(images[0].numpy(), decode_shrunk(encoded[0], SIZE))
    np.testing.assert_array_equal(images[1].numpy(), small)
    assert set(images[2].unique().tolist()) == set(images[3].unique().tolist()) == {114}


def test_the_gpu_is_given_sequential_jpegs_only() -> None:
    image = picture(np.random.default_rng(0), 40, 60)
    assert is_baseline_jpeg(jpeg(image))
    assert is_baseline_jpeg(memoryview(jpeg(image, quality=95, subsampling=0)))
    for other in (
        jpeg(image, progressive=True),
        encode_png(image),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe0\x00",
        b"\xff\xd8" + b"\xff" * 40,
    ):
        assert not is_baseline_jpeg(other)


def test_jpegs_that_a_gpu_would_show_otherwise_are_not_given_to_it() -> None:
    image = picture(np.random.default_rng(0), 40, 60)
    assert is_baseline_jpeg(jpeg(image[:, :, 0]))  # grey
    whole = jpeg(image)
    assert not is_baseline_jpeg(whole[:-100]), "truncated"
    out = io.BytesIO()
    PIL.Image.fromarray(image).convert("CMYK").save(out, "JPEG")
    assert not is_baseline_jpeg(out.getvalue()), "four components"
    assert not is_baseline_jpeg(jpeg(image, keep_rgb=True)), "red, green and blue as they are"
    adobe = b"\xff\xee\x00\x0eAdobe" + bytes([0, 100, 0, 0, 0, 0, 0])
    assert not is_baseline_jpeg(whole[:2] + adobe + whole[2:]), "said by Adobe's marker"
    assert is_baseline_jpeg(whole[:2] + adobe[:-1] + b"\x01" + whole[2:])


def test_without_nvjpeg_it_is_said_once_and_asked_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def refuse(encoded: list[bytes], device: torch.device) -> list[torch.Tensor]:
        asked.append(len(encoded))
        raise RuntimeError("not compiled with nvJPEG support")

    monkeypatch.setattr(ring_module, "_nvjpeg", refuse)
    has_nvjpeg.cache_clear()
    image = picture(np.random.default_rng(0), 40, 60)
    for _ in range(3):
        (made,), grey = decode_batch([jpeg(image)], [(40, 60)], SIZE, "cuda")
        assert not grey
        np.testing.assert_array_equal(made.numpy(), decode(jpeg(image)))
    assert asked == [1]
    assert capsys.readouterr().out.count("not compiled with nvJPEG support") == 1
    has_nvjpeg.cache_clear()


def test_a_list_that_nvjpeg_refuses_is_decoded_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(np.random.default_rng(0), 40, 60)
    given: list[int] = []

    def decoder(encoded: list[bytes], device: torch.device) -> list[torch.Tensor]:
        given.append(len(encoded))
        if len(encoded) == 2:
            raise RuntimeError("Error while decoding JPEG images")
        return [torch.from_numpy(decode(one)) for one in encoded]

    monkeypatch.setattr(ring_module, "_nvjpeg", decoder)
    has_nvjpeg.cache_clear()
    for count in (2, 3):
        images, grey = decode_batch([jpeg(image)] * count, [(40, 60)] * count, SIZE, "cuda")
        assert (len(images), grey) == (count, [])
    assert given == [1, 2, 3]
    has_nvjpeg.cache_clear()


def test_where_triton_cannot_compile_the_torch_program_renders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(fused, "render", fail)
    recipe, sources = Recipe(SIZE, mosaic=1, scale=0.5), window_of(1, [(96, 72), (64, 96)])
    ring, slots = filled(recipe, sources)
    samples = [draw(recipe, generator(0, 0, 0), 0, 2, mosaic_on=True)]
    renderer = GpuRenderer(recipe, "cpu")
    expected = renderer(samples, ring, slots)
    renderer.is_fused = True  # as on a GPU
    for _ in range(2):
        assert torch.equal(renderer(samples, ring, slots), expected)
    assert capsys.readouterr().out.count("Failed to find C compiler") == 1
    with pytest.raises(RuntimeError, match="C compiler"):
        GpuRenderer(recipe, "cpu", is_fused=True)(samples, ring, slots)
