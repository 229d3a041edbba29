"""The best tile for a lattice."""

from __future__ import annotations

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import LATTICES
from openvsa import ShapeError, TileLayout
from openvsa.layout.fit import best_tile

grids = st.one_of(
    st.tuples(st.integers(1, 300)),
    st.tuples(*[st.integers(1, 60)] * 2),
    st.tuples(*[st.integers(1, 30)] * 3),
)


@given(grids, st.integers(1, 128))
def test_tiles_obey_max_block(grid: tuple[int, ...], max_block: int) -> None:
    layout = TileLayout.fit(grid, max_block)
    assert max(layout.block_lens) <= math.prod(layout.tile) <= max_block
    assert layout.num_tokens == math.prod(grid)


@given(st.tuples(*[st.integers(1, 40)] * 3))
def test_never_more_blocks_than_the_cube(grid: tuple[int, int, int]) -> None:
    assert TileLayout.fit(grid).num_blocks <= TileLayout(grid, (4, 4, 4)).num_blocks


@given(st.one_of(st.tuples(*[st.integers(1, 24)] * 2), st.tuples(*[st.integers(1, 8)] * 3)), st.integers(1, 200))
def test_no_admissible_tile_is_better(grid: tuple[int, ...], max_block: int) -> None:
    def admissible(tile: tuple[int, ...]) -> bool:
        inner = [t for t, g in zip(tile, grid, strict=True) if t < g]
        return math.prod(tile) <= max_block and (not inner or max(tile) <= 4 * min(inner))

    def rank(tile: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
        blocks = math.prod(-(-g // t) for g, t in zip(grid, tile, strict=True))
        surface = sum(math.prod(tile) // t for t in tile)
        return blocks, surface, tile

    tiles = [tile for tile in product(*(range(1, g + 1) for g in grid)) if admissible(tile)]
    assert TileLayout.fit(grid, max_block).tile == min(tiles, key=rank)


@pytest.mark.timeout(10)
def test_the_search_is_short_for_any_block() -> None:
    assert best_tile((2**31 - 1,), 2**30) == (2**30,)
    assert best_tile((46000, 46000), 10**9) == (15334, 46000)
    assert best_tile((1000, 1000, 1000), 10**12) == (1000, 1000, 1000)


@pytest.mark.parametrize("grid", LATTICES)
def test_real_lattices_gain(grid: tuple[int, ...]) -> None:
    fitted, cube = TileLayout.fit(grid), TileLayout(grid, (4, 4, 4))
    assert fitted.num_blocks <= cube.num_blocks
    if grid == (21, 30, 52):
        assert fitted.num_blocks < cube.num_blocks, "the border tiles of Wan's standard lattice are not filled better"


def test_text_and_query_blocks_are_kept() -> None:
    assert TileLayout.fit((4, 4, 8), q_tiles=(1, 1, 2)) == TileLayout((4, 4, 8), (4, 4, 4), q_tiles=(1, 1, 2))
    layout = TileLayout.fit((4, 4, 4), prefix=3, suffix=2)
    assert (layout.prefix, layout.suffix, layout.num_tokens) == (3, 2, 69)


@pytest.mark.parametrize(
    ("grid", "max_block", "message"),
    [
        ((4, 4), 0, "max_block must be a number of tokens >= 1, got 0"),
        ((4, 4), "64", "max_block must be a number of tokens >= 1, got '64'"),
        ((4, 4), 64.0, r"max_block must be a number of tokens >= 1, got 64\.0"),
        ((4, 0), 64, r"grid must be a tuple of positive integers.*\(4, 0\)"),
        ((10**6, 10**6), 64, "at most 2,147,483,647 tokens, because .* int32, got 1,000,000,000,000 "),
        ((1,) * 1100, 64, "grid must have at most 64 numbers"),
    ],
)
@pytest.mark.timeout(10)  # refused before the search
def test_nonsense_is_refused(grid: tuple[int, ...], max_block: int, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TileLayout.fit(grid, max_block)
