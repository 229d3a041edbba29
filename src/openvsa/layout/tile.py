"""Tiles of a token lattice, as contiguous blocks."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import torch
from torch import Tensor

from openvsa.errors import ShapeError
from openvsa.layout.device import as_device, has_kernels
from openvsa.layout.fit import best_tile
from openvsa.layout.keep import as_computed_here, build_to_keep, can_keep
from openvsa.layout.offsets import MAX_TOKENS, BlockOffsets
from openvsa.layout.reorder import from_blocks, to_blocks
from openvsa.torch_op import is_transformed

__all__ = ["TileLayout", "check_layout", "sides", "whole"]

_MOST_AXES = 64  # as torch's own tensors


@dataclass(frozen=True)
class TileLayout:
    """A lattice of tokens cut into tiles, each of which becomes one contiguous block.

    The raster sequence is `prefix` tokens (text, say), then the lattice in raster order (last axis fastest), then
    `suffix` tokens: S = prefix + prod(grid) + suffix. In block order the prefix blocks come first, then the tiles
    (raster order of the tile grid, raster order inside a tile), then the suffix blocks. Prefix and suffix are cut
    into blocks of at most prod(tile) tokens that never mix with the lattice. Tiles at a border that the tile does
    not divide are short blocks: nothing is padded.

    Query blocks are the same blocks, unless `q_tiles` makes them larger: a box of q_tiles neighbouring tiles is then
    one query block (of 128 tokens, say, over key blocks of 64). Block order goes through such boxes in raster order
    and through the tiles of a box in raster order, so that a query block, too, is contiguous and queries, keys and
    values have one order. Prefix and suffix are grouped alike, prod(q_tiles) blocks to a query block.

    Args:
        grid: tokens along each axis: (T, H, W) for video, (H, W) for an image, (N,) for text.
        tile: tokens of a tile along each axis, as many numbers as `grid`. A side longer than the grid is cut to it.
        prefix, suffix: tokens before and after the lattice.
        q_tiles: tiles of a query block along each axis; () means one. A side longer than the tile grid is cut to it.

    Attributes:
        num_tokens: S: prefix, lattice and suffix together.
        tile_grid: tiles along each axis.
        num_tiles: blocks that are tiles of the lattice.
        tile_blocks: which blocks are tiles of the lattice.
        q_tile_blocks: which query blocks are of the lattice.
        blocks: lengths and offsets of all N blocks; key blocks are these.
        q_blocks: those of the query blocks; `blocks` itself if a query block is one tile.

    Raises:
        ShapeError: a number is not positive, grid and tile differ in rank, or S is more than int32 can count.
    """

    grid: tuple[int, ...]
    tile: tuple[int, ...]
    prefix: int = 0
    suffix: int = 0
    q_tiles: tuple[int, ...] = ()
    num_tokens: int = field(init=False, repr=False, compare=False)
    tile_grid: tuple[int, ...] = field(init=False, repr=False, compare=False)
    num_tiles: int = field(init=False, repr=False, compare=False)
    tile_blocks: slice = field(init=False, repr=False, compare=False)
    q_tile_blocks: slice = field(init=False, repr=False, compare=False)
    blocks: BlockOffsets = field(init=False, repr=False, compare=False)
    q_blocks: BlockOffsets = field(init=False, repr=False, compare=False)
    _indices: dict[tuple[torch.device, bool], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        grid, tile = sides("grid", self.grid), sides("tile", self.tile)
        q_tiles = sides("q_tiles", self.q_tiles or (1,) * len(tile))
        if len(grid) != len(tile):
            raise ShapeError(
                f"grid and tile must have one number per axis each, got grid={grid} and tile={tile}; "
                "give a tile side for each axis of the grid"
            )
        if len(q_tiles) != len(tile):
            raise ShapeError(f"q_tiles must have one number per axis, got q_tiles={q_tiles} for tile={tile}")
        for name in ("prefix", "suffix"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 0))
        num_tokens = _count_tokens(grid, self.prefix, self.suffix)
        tile = tuple(min(t, g) for t, g in zip(tile, grid, strict=True))
        tile_grid = tuple(-(-g // t) for g, t in zip(grid, tile, strict=True))
        q_tiles = tuple(min(n, along) for n, along in zip(q_tiles, tile_grid, strict=True))
        boxes = math.prod([-(-along // n) for along, n in zip(tile_grid, q_tiles, strict=True)])
        before = -(-self.prefix // math.prod(tile))  # blocks of the prefix
        q_before = -(-before // math.prod(q_tiles))
        # Made once, because every call of attention asks for them.
        for name, value in {
            "grid": grid,
            "tile": tile,
            "q_tiles": q_tiles,
            "num_tokens": num_tokens,
            "tile_grid": tile_grid,
            "num_tiles": math.prod(tile_grid),
            "tile_blocks": slice(before, before + math.prod(tile_grid)),
            "q_tile_blocks": slice(q_before, q_before + boxes),
        }.items():
            object.__setattr__(self, name, value)
        lens, q_lens = self._block_lens()
        object.__setattr__(self, "blocks", BlockOffsets(lens))
        object.__setattr__(self, "q_blocks", self.blocks if q_lens == lens else BlockOffsets(q_lens))
        permutation = build_to_keep(self._build_permutation)
        inverse = build_to_keep(permutation.argsort)
        cpu = torch.device("cpu")
        object.__setattr__(self, "_indices", {(cpu, False): permutation, (cpu, True): inverse})

    @classmethod
    def fit(
        cls,
        grid: tuple[int, ...],
        max_block: int = 64,
        prefix: int = 0,
        suffix: int = 0,
        q_tiles: tuple[int, ...] = (),
    ) -> TileLayout:
        """The layout whose tile leaves the fewest, and so the fullest, blocks on this lattice.

        It minimises the number of blocks N = prod(ceil(grid / tile)) over all tiles of at most `max_block` tokens
        whose longest side is at most 4 times its shortest (a side that spans the whole grid is exempt): a kernel
        works in whole blocks, so at a given density its cost grows with N^2, while long thin tiles hold tokens
        that have little to do with each other. Among equals the tile with the smallest surface wins, then the one
        longer along the later axes.

        Raises:
            ShapeError: `grid` or `max_block` is not positive, or as for the class.
        """
        grid, prefix, suffix = sides("grid", grid), whole("prefix", prefix, 0), whole("suffix", suffix, 0)
        _count_tokens(grid, prefix, suffix)
        return cls(grid, best_tile(grid, whole("max_block", max_block, 1)), prefix, suffix, q_tiles)

    @property
    def num_blocks(self) -> int:
        """N: prefix blocks, tiles and suffix blocks."""
        return self.blocks.num_blocks

    @property
    def text_blocks(self) -> tuple[int, ...]:
        """Which blocks hold prefix or suffix tokens."""
        tiles = self.tile_blocks
        return (*range(tiles.start), *range(tiles.stop, self.num_blocks))

    @property
    def block_lens(self) -> tuple[int, ...]:
        """Tokens in each block."""
        return self.blocks.lens

    @property
    def block_offsets(self) -> Tensor:
        """int32 [N + 1] on the CPU: block i holds positions block_offsets[i] to block_offsets[i + 1]."""
        return self.blocks.on(torch.device("cpu"))

    @property
    def permutation(self) -> Tensor:
        """int64 [S] on the CPU: raster index of the token at each permuted position."""
        return self._index(torch.device("cpu"), inverse=False)

    @property
    def inverse_permutation(self) -> Tensor:
        """int64 [S] on the CPU: permuted position of the token at each raster index."""
        return self._index(torch.device("cpu"), inverse=True)

    def permute(self, x: Tensor, dim: int = 1) -> Tensor:
        """Raster order to block order along `dim`, which must have S entries. Any dtype; differentiable.

        Raises:
            ShapeError: the size of `dim` is not S.
        """
        return self._reorder(x, dim, inverse=False)

    def unpermute(self, x: Tensor, dim: int = 1) -> Tensor:
        """Block order back to raster order along `dim`. The inverse of `permute`.

        Raises:
            ShapeError: the size of `dim` is not S.
        """
        return self._reorder(x, dim, inverse=True)

    def on(self, device: torch.device | str) -> TileLayout:
        """This layout, its index tensors copied to `device` ahead of use (otherwise the first use copies them,
        and a first use inside torch.compile copies them in every call).

        Raises:
            ShapeError: `device` names none.
        """
        device = as_device(device)
        for inverse in (False, True):
            self._index(device, inverse=inverse)
        for blocks in (self.blocks, self.q_blocks):
            for tensor in (blocks.on, blocks.lens_on, blocks.block_of_token, blocks.padded_slots):
                tensor(device)
        return self

    def check(self, name: str, tokens: int) -> None:
        """Raise ShapeError unless `tokens` is S; `name` says in the message whose tokens they are."""
        if tokens != self.num_tokens:
            parts = f"{self.prefix} prefix + " if self.prefix else ""
            parts += "x".join(map(str, self.grid)) + f" = {math.prod(self.grid)} lattice"
            parts += f" + {self.suffix} suffix" if self.suffix else ""
            raise ShapeError(
                f"{name} has {tokens} tokens, but the layout of grid {self.grid} has {self.num_tokens} "
                f"({parts}); build the TileLayout from the lattice of this tensor"
            )

    def _reorder(self, x: Tensor, dim: int, *, inverse: bool) -> Tensor:
        if not isinstance(x, Tensor) or x.is_nested:
            what = "a nested tensor" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(f"what is put in another order must be a plain tensor, got {what}")
        if not isinstance(dim, int) or not -x.dim() <= dim < x.dim():
            raise ShapeError(f"dim {dim!r} does not exist in a tensor of shape {tuple(x.shape)}")
        self.check(f"dimension {dim} of a tensor of shape {tuple(x.shape)}", x.shape[dim])
        if x.dim() == 4 and dim % 4 == 1 and has_kernels(x):
            index, offsets = self.index_on(x.device), self.blocks.on(x.device)
            if inverse:
                return from_blocks(x, None, None, None, index, offsets, self.blocks.max_len, 0)
            return to_blocks(x, index, offsets, self.blocks.max_len, True, False)[0]
        there, back = self._index(x.device, inverse=inverse), self._index(x.device, inverse=not inverse)
        if not torch.compiler.is_compiling() and is_transformed():
            return x.index_select(dim, there)
        return _Reorder.apply(x, dim, there, back)

    def index_on(self, device: torch.device) -> Tensor:
        """`permutation`, int64 [S], on `device`; copied there once."""
        return self._index(device, inverse=False)

    def _index(self, device: torch.device, *, inverse: bool) -> Tensor:
        found = self._indices.get((device, inverse))
        if found is None:
            with torch.inference_mode(False):
                found = self._index(torch.device("cpu"), inverse=inverse).to(device, non_blocking=True)
            if can_keep(found):
                self._indices[device, inverse] = found
        return as_computed_here(found)

    def _block_lens(self) -> tuple[list[int], list[int]]:
        """Tokens of each block and of each query block, in block order."""
        axes = []
        for g, t, n in zip(self.grid, self.tile, self.q_tiles, strict=True):
            axes.append(_groups([min(t, g - start) for start in range(0, g, t)], n))
        boxes = [[math.prod(sides) for sides in product(*box)] for box in product(*axes)]
        before, after = (_groups(self._text_lens(n), math.prod(self.q_tiles)) for n in (self.prefix, self.suffix))
        query_blocks = [*before, *boxes, *after]
        return [n for lens in query_blocks for n in lens], [sum(lens) for lens in query_blocks]

    def _build_permutation(self) -> Tensor:
        box = within = torch.zeros((), dtype=torch.int64, device="cpu")
        for g, t, along, n in zip(self.grid, self.tile, self.tile_grid, self.q_tiles, strict=True):
            tile = torch.arange(g, device="cpu") // t
            box = box[..., None] * -(-along // n) + tile // n
            within = within[..., None] * n + tile % n
        place = box * math.prod(self.q_tiles) + within
        lattice = place.flatten().argsort(stable=True) + self.prefix
        text = torch.arange(self.num_tokens, device="cpu")
        return torch.cat([text[: self.prefix], lattice, text[self.num_tokens - self.suffix :]])

    def _text_lens(self, tokens: int) -> list[int]:
        size = math.prod(self.tile)
        return [min(size, tokens - start) for start in range(0, tokens, size)]


class _Reorder(torch.autograd.Function):
    """A permutation, whose gradient is the inverse permutation rather than a scatter-add."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, there: Tensor, back: Tensor) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(there, back)
        return x.index_select(dim, there)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        there, back = ctx.saved_tensors
        return _Reorder.apply(grads[0], ctx.dim, back, there), None, None, None


def _groups(values: list[int], size: int) -> list[list[int]]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def check_layout(layout: object) -> None:
    """Raise ShapeError unless `layout` is a TileLayout: a lattice alone does not say into what it is cut."""
    if not isinstance(layout, TileLayout):
        raise ShapeError(
            f"layout must be a TileLayout, got {layout!r}; for a lattice of (T, H, W) tokens make one with "
            "TileLayout((T, H, W), tile=(4, 4, 4)) or TileLayout.fit((T, H, W))"
        )


def _count_tokens(grid: tuple[int, ...], prefix: int, suffix: int) -> int:
    """S. Raises ShapeError if block offsets, which are int32, cannot count so far."""
    tokens = prefix + math.prod(grid) + suffix
    if tokens > MAX_TOKENS:
        raise ShapeError(
            f"a layout may have at most {MAX_TOKENS:,} tokens, because block offsets are int32, got {tokens:,} "
            f"(grid {grid}, prefix {prefix}, suffix {suffix}); sides are in tokens, after patches: check them, or "
            "split the sequence"
        )
    return tokens


def whole(name: str, count: object, least: int) -> int:
    """A number of tokens as an integer; `name` says in the error which it is."""
    try:
        value = least - 1 if isinstance(count, bool) else operator.index(count)  # pyright: ignore[reportArgumentType]
    except TypeError:
        value = least - 1
    if value < least:
        raise ShapeError(f"{name} must be a number of tokens >= {least}, got {count!r}")
    return value


def sides(name: str, given: Iterable[int]) -> tuple[int, ...]:
    """Numbers along each axis as a tuple of integers; `name` says in the error whose they are."""
    try:
        values = tuple(0 if isinstance(n, bool) else operator.index(n) for n in islice(given, _MOST_AXES + 1))
    except TypeError:
        values = ()
    if not values or min(values) < 1:
        raise ShapeError(f"{name} must be a tuple of positive integers such as (21, 30, 52), got {given!r}")
    if len(values) > _MOST_AXES:
        raise ShapeError(f"{name} must have at most {_MOST_AXES} numbers, one for each axis, got more")
    return values
