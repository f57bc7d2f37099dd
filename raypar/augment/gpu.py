"""The geometry, rendered for a whole batch by one torch program, on a GPU or on CPU tensors.

Runs in: training workers. What :mod:`raypar.augment.cpu` paints tile by tile is turned round: for every pixel of the output the tile it
shows and the place in it are computed, and its four neighbours are gathered from a :class:`raypar.augment.ring.Ring`. All numbers come in
one small table (:mod:`raypar.augment.pack`), in one copy, and nothing waits for the device. On CUDA with Triton the same program is one
kernel (:mod:`raypar.augment.fused`). Values between pixels are rounded, colours are looked up, as the CPU renderer does: the two differ by
the fixed point of OpenCV's interpolation.

Letters: B images, L layers (at least one an image), S the output's side in px.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from raypar.augment import fused
from raypar.augment.geometry import Recipe, Sample
from raypar.augment.pack import (
    FLIP_X,
    FLIP_Y,
    HAS_COLOUR,
    HUE,
    LAYER_WIDTH,
    MATRIX,
    OWNER,
    PLACE_WIDTH,
    PLACES,
    RECT,
    SAMPLE_WIDTH,
    SATURATION,
    SEAM,
    SHARE,
    SWAP,
    TILE_WIDTH,
    TILES,
    VALUE,
    Rect,
    Table,
    pack,
)
from raypar.augment.paint import GREY
from raypar.augment.ring import Ring
from raypar.prefetch import to_device

SHIFTS = (0, 8, 16)  # of red, green and blue in a word of the ring


class GpuRenderer:
    """Renders samples of a recipe.

    Args:
        recipe: whose ``imgsz`` is the output's side S.
        device: where the ring and the batches are.
        dtype: of batches: uint8, or a floating one for values from 0 to 1.
        channels_last: the batches' memory format.
        is_fused: one Triton kernel, not a torch program; by default on CUDA, where Triton is installed.

    Raises:
        ValueError: the recipe pastes copies of instances, for which a canvas must be painted.
    """

    def __init__(self, recipe: Recipe, device: torch.device | str, *, dtype: torch.dtype = torch.uint8, channels_last: bool = False,
                 is_fused: bool | None = None):  # fmt: skip
        if recipe.copy_paste:
            raise ValueError(
                f"train.yolo.copy_paste={recipe.copy_paste} is not done on the device: use train.augment=cpu, or copy_paste=0"
            )
        self.recipe, self.device, self.dtype = recipe, torch.device(device), dtype
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.is_fused = self.device.type == "cuda" and fused.IS_HERE if is_fused is None else is_fused
        self._must_be_fused = is_fused is not None

    def __call__(
        self,
        samples: Sequence[Sample],
        ring: Ring,
        slots: Sequence[int],
        cuts: Sequence[Rect | None] | None = None,
    ) -> Tensor:
        """Draws samples' images, (B, 3, S, S) RGB, where the samples' sources lie in the ring's ``slots``; ``cuts`` as for :func:`pack`."""
        return self.render(pack(self.recipe, samples, [ring.hws[slot] for slot in slots], slots, cuts), ring)

    @torch.no_grad()
    def render(self, table: Table, ring: Ring) -> Tensor:
        """Renders a packed batch: (B, 3, S, S) RGB. The caller's stream does it, and does not wait for it."""
        values = to_device({"values": torch.from_numpy(table.values)}, self.device)["values"]
        middle = table.num_images * SAMPLE_WIDTH
        rows, layers = values[:middle].view(-1, SAMPLE_WIDTH), values[middle:].view(-1, LAYER_WIDTH)
        if self.is_fused:
            try:
                made = self._kernel(rows, layers, table, ring.words)
            # whatever the compiler of a node says that lacks a C compiler or Python's headers
            except Exception as error:
                if self._must_be_fused:
                    raise
                print(
                    f"train.augment=gpu: rendered without Triton, which is slower, for it cannot compile here: {str(error)[:200]}",
                    flush=True,
                )
                self.is_fused = False
            else:
                self._must_be_fused = True  # it was compiled: a later error is another one
                return made
        return self._program(rows, layers, table, ring.words)

    def _kernel(self, rows: Tensor, layers: Tensor, table: Table, words: Tensor) -> Tensor:
        size = self.recipe.imgsz
        out = torch.empty(
            (table.num_images, 3, size, size), dtype=self.dtype, device=self.device, memory_format=self.layout
        )
        fused.render(words, rows, layers, out, is_axis_aligned=self.recipe.is_axis_aligned)
        return out

    def _program(self, rows: Tensor, layers: Tensor, table: Table, words: Tensor) -> Tensor:
        size = self.recipe.imgsz
        # (L, S): the pixels' places before flips
        x, y = _flipped_indices(rows.index_select(0, layers[:, OWNER].long()), size)
        sample = sample_spans if self.recipe.is_axis_aligned else sample_canvas
        planes = sample(words, layers, x, y, size)  # (L, 3, S, S)
        image = planes[: table.num_images]
        mixed = slice(table.num_images, table.num_images + table.num_mixed)
        if table.num_mixed:
            owner = layers[mixed, OWNER].long()
            share = rows[owner, SHARE].view(-1, 1, 1, 1)
            blend = (image[owner] * share + planes[mixed] * (1 - share) - 0.5).round().clamp(0, 255)
            image = image.index_copy(0, owner, blend)
        if table.num_cut:
            owner, second = layers[mixed.stop :, OWNER].long(), planes[mixed.stop :]
            x0, y0, x1, y1 = (rows[owner, RECT + i].view(-1, 1) for i in range(4))
            across, down = (x[owner] >= x0) & (x[owner] < x1), (y[owner] >= y0) & (y[owner] < y1)
            image = image.index_copy(
                0, owner, torch.where((down[:, :, None] & across[:, None, :])[:, None], second, image[owner])
            )
        image = torch.where(_column(rows, HAS_COLOUR).unsqueeze(1) > 0, shift_hsv(image, rows), image)
        image = torch.where(_column(rows, SWAP).unsqueeze(1) > 0, image.flip(1), image)
        image = image if self.dtype == torch.uint8 else image / 255
        return image.to(self.dtype).contiguous(memory_format=self.layout)


def _flipped_indices(rows: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """For each column and row of pixels of the output its x and y before flips: float32 (L, S) both."""
    places = torch.arange(size, dtype=torch.float32, device=rows.device).expand(len(rows), -1)
    return tuple(torch.where(rows[:, c, None] > 0, size - 1 - places, places) for c in (FLIP_X, FLIP_Y))  # type: ignore[return-value]


def sample_spans(words: Tensor, layers: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Layers whose maps only scale and shift.

    Args:
        words: of a ring.
        layers: float32 (L, LAYER_WIDTH).
        x, y: of the output's columns and rows before flips, float32 (L, S).
        size: S.

    Returns:
        float32 (L, 3, S, S), whole numbers.
    """
    tiles = layers[:, TILES : TILES + 4 * TILE_WIDTH].view(-1, 4, TILE_WIDTH)
    is_right, is_low = x >= layers[:, SEAM, None], y >= layers[:, SEAM + 1, None]  # (L, S)
    right, low = is_right[:, None, :], is_low[:, :, None]

    def along(places: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Along one axis, for every tile (L, 4, S): source index, that of the next pixel, its share, whether the tile is there."""
        factor, offset, lowest, highest, begin, end = (tiles[:, :, first + i, None] for i in range(6))
        at = torch.minimum(torch.maximum(places[:, None] * factor + offset, lowest), highest)
        index = at.floor()
        beyond = torch.minimum(index + 1, highest)
        return index, beyond, at - index, (places[:, None] >= begin) & (places[:, None] < end)

    def pick_x(values: Tensor) -> Tensor:  # (L, 4, S) -> (L, S, S)
        upper, lower = (torch.where(is_right, values[:, i + 1], values[:, i])[:, None, :] for i in (0, 2))
        return torch.where(low, lower, upper)

    def pick_y(values: Tensor) -> Tensor:
        on_left, on_right = (torch.where(is_low, values[:, i + 2], values[:, i])[:, :, None] for i in (0, 1))
        return torch.where(right, on_right, on_left)

    x0, x1, share_x, is_there_x = (pick_x(v) for v in along(x, 1))
    y0, y1, share_y, is_there_y = (pick_y(v) for v in along(y, 7))
    slots = tiles[:, :, 0, None].expand(-1, -1, size)
    base = pick_x(slots).long() * size * size
    taps = [_unpack(words[base + (row * size + column).long()]) for row in (y0, y1) for column in (x0, x1)]
    return torch.where((is_there_x & is_there_y)[:, None], _blend(taps, share_x, share_y), float(GREY))


def sample_canvas(words: Tensor, layers: Tensor, x: Tensor, y: Tensor, size: int) -> Tensor:
    """Layers under any map: as if the tiles were painted on a grey canvas and that were warped. Arguments as :func:`sample_spans`."""
    m = layers[:, MATRIX : MATRIX + 9, None, None].unbind(1)
    across, down = x[:, None, :], y[:, :, None]
    depth = m[6] * across + m[7] * down + m[8]
    depth = torch.where(depth == 0, torch.inf, depth)  # such a pixel shows nothing; OpenCV says: index 0
    canvas_x, canvas_y = ((m[i] * across + m[i + 1] * down + m[i + 2]) / depth for i in (0, 3))
    column, row = (v.clamp(-4 * size, 4 * size).floor() for v in (canvas_x, canvas_y))
    share_x, share_y = canvas_x - column, canvas_y - row
    taps = [_canvas_pixel(words, layers, column + i, row + j, size) for j in (0, 1) for i in (0, 1)]
    return _blend(taps, share_x.clamp(0, 1), share_y.clamp(0, 1))


def _canvas_pixel(words: Tensor, layers: Tensor, column: Tensor, row: Tensor, size: int) -> Tensor:
    """Whole pixels of the canvas, grey where no tile lies: float32 (L, 3, S, S)."""
    tiles = layers[:, PLACES : PLACES + 4 * PLACE_WIDTH].view(-1, 4, PLACE_WIDTH)
    is_right, is_low = column >= layers[:, SEAM, None, None], row >= layers[:, SEAM + 1, None, None]

    def pick(values: Tensor) -> Tensor:
        a, b, c, d = (values[:, i, None, None] for i in range(4))
        return torch.where(is_low, torch.where(is_right, d, c), torch.where(is_right, b, a))

    slot, left, top, width, height = (pick(tiles[:, :, i]) for i in range(PLACE_WIDTH))
    in_x, in_y = column - left, row - top
    is_there = (in_x >= 0) & (in_x < width) & (in_y >= 0) & (in_y < height)
    is_there &= (column < 2 * size) & (row < 2 * size) & (column >= 0) & (row >= 0)
    index = torch.where(is_there, in_y * size + in_x, 0).long() + slot.long() * size * size
    return torch.where(is_there[:, None], _unpack(words[index]), float(GREY))


def _unpack(words: Tensor) -> Tensor:
    """int32 (L, S, S) words of a ring -> float32 (L, 3, S, S)."""
    return torch.stack([(words >> shift) & 255 for shift in SHIFTS], 1).float()


def _blend(taps: Sequence[Tensor], share_x: Tensor, share_y: Tensor) -> Tensor:
    """Bilinear, rounded to whole numbers; taps: upper left, upper right, lower left, lower right."""
    across, down = share_x[:, None], share_y[:, None]
    upper, lower = (left + (right - left) * across for left, right in (taps[:2], taps[2:]))
    return (upper + (lower - upper) * down + 0.5).floor()


def _column(rows: Tensor, column: int) -> Tensor:
    return rows[:, column].view(-1, 1, 1)


def shift_hsv(image: Tensor, rows: Tensor) -> Tensor:
    """:func:`raypar.augment.kernels.shift_hsv`, step by step, for float32 (B, 3, S, S) of whole numbers."""
    r, g, b = image.unbind(1)
    v = image.amax(1)
    chroma = v - image.amin(1)
    s = (chroma * ((255 << 12) / v.clamp_min(1) + 0.5).trunc() * 2**-12 + 0.5).trunc()
    apart = torch.where(v == r, g - b, torch.where(v == g, b - r + 2 * chroma, r - g + 4 * chroma))
    h = (apart * ((30 << 12) / chroma.clamp_min(1) + 0.5).trunc() * 2**-12 + 90.5).trunc() + _column(
        rows, HUE
    )
    h = torch.where(h >= 180, h - 180, h)
    h = torch.where(h >= 180, h - 180, h).trunc() * (6 / 180)
    v = (v * _column(rows, VALUE)).clamp_max(255).trunc() * (1 / 255)
    c = v * ((s * _column(rows, SATURATION)).clamp_max(255).trunc() * (1 / 255))
    planes = []
    for sixths in (5, 3, 1):
        k = h + sixths
        k = torch.where(k >= 6, k - 6, k)
        planes.append(((v - c * torch.minimum(k, 4 - k).clamp(0, 1)) * 255).trunc())
    return torch.stack(planes, 1)
