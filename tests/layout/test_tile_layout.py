"""The permutation, its inverse, the blocks, and what is refused."""

from __future__ import annotations

import math
import re
from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import openvsa
from helpers import DEVICE, LATTICES
from openvsa import BlockPlan, OpenVSAError, ShapeError, TileLayout

DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


@st.composite
def layouts(draw: st.DrawFn) -> TileLayout:
    """Of one to three axes, with and without text."""
    rank = draw(st.integers(1, 3))
    grid = draw(st.tuples(*[st.integers(1, 9)] * rank))
    tile = draw(st.tuples(*[st.integers(1, 5)] * rank))
    q_tiles = draw(st.just(()) | st.tuples(*[st.integers(1, 3)] * rank))
    return TileLayout(grid, tile, draw(st.integers(0, 7)), draw(st.integers(0, 7)), q_tiles)


def query_blocks_in_words(layout: TileLayout) -> list[list[list[int]]]:
    """The raster indices of each block of each query block, straight from the definition."""
    lattice = torch.arange(math.prod(layout.grid)).reshape(layout.grid) + layout.prefix
    boxes = []
    steps = [t * n for t, n in zip(layout.tile, layout.q_tiles, strict=True)]
    for box_corner in product(*map(range, [0] * len(steps), layout.grid, steps)):
        ends = [min(c + step, g) for c, step, g in zip(box_corner, steps, layout.grid, strict=True)]
        tiles = []
        for corner in product(*map(range, box_corner, ends, layout.tile)):
            box = tuple(slice(c, c + t) for c, t in zip(corner, layout.tile, strict=True))
            tiles.append(lattice[box].flatten().tolist())
        boxes.append(tiles)
    size, number = math.prod(layout.tile), math.prod(layout.q_tiles)
    before, after = range(layout.prefix), range(layout.num_tokens - layout.suffix, layout.num_tokens)
    cut = [[list(text[i : i + size]) for i in range(0, len(text), size)] for text in (before, after)]
    groups = [[blocks[i : i + number] for i in range(0, len(blocks), number)] for blocks in cut]
    return [*groups[0], *boxes, *groups[1]]


def blocks_in_words(layout: TileLayout) -> list[list[int]]:
    return [block for blocks in query_blocks_in_words(layout) for block in blocks]


@given(layouts())
def test_query_blocks_are_what_the_definition_says(layout: TileLayout) -> None:
    blocks = query_blocks_in_words(layout)
    assert layout.q_blocks.lens == tuple(sum(map(len, group)) for group in blocks)
    lattice = set(range(layout.prefix, layout.num_tokens - layout.suffix))
    of_the_lattice = [lattice.issuperset(group[0]) for group in blocks]
    tiles = range(layout.q_blocks.num_blocks)[layout.q_tile_blocks]
    assert [i for i, inside in enumerate(of_the_lattice) if inside] == list(tiles)


def test_a_query_block_of_one_tile_changes_nothing() -> None:
    plain = TileLayout((9, 10, 11), (4, 4, 4), 5, 70)
    assert plain.q_tiles == (1, 1, 1)
    assert plain.q_blocks is plain.blocks
    assert plain.q_tile_blocks == plain.tile_blocks
    assert TileLayout((9, 10, 11), (4, 4, 4), 5, 70, (1, 1, 1)) == plain
    assert TileLayout((3, 4, 8), (4, 4, 4), q_tiles=(2, 3, 1)) == TileLayout((3, 4, 8), (4, 4, 4))


def test_query_blocks_of_128_over_key_blocks_of_64() -> None:
    layout = TileLayout((4, 8, 16), (4, 4, 4), q_tiles=(1, 1, 2))
    assert layout.block_lens == (64,) * 8
    assert layout.q_blocks.lens == (128,) * 4
    first = torch.zeros(layout.grid, dtype=torch.bool).flatten()
    first[layout.permutation[:128]] = True
    assert first.reshape(layout.grid)[:, :4, :8].all()


@given(layouts())
def test_blocks_are_what_the_definition_says(layout: TileLayout) -> None:
    blocks = blocks_in_words(layout)
    assert layout.permutation.tolist() == [token for block in blocks for token in block]
    assert layout.block_lens == tuple(map(len, blocks))
    starts = layout.block_offsets.tolist()
    assert [b - a for a, b in pairwise(starts)] == list(layout.block_lens)
    assert starts[0] == 0
    assert starts[-1] == layout.num_tokens == sum(layout.block_lens)
    assert layout.num_blocks == len(blocks)


@given(layouts())
def test_permutation_is_a_bijection_and_has_its_inverse(layout: TileLayout) -> None:
    everything = torch.arange(layout.num_tokens)
    assert layout.permutation.dtype == torch.int64
    assert layout.block_offsets.dtype == torch.int32
    assert torch.equal(layout.permutation.sort().values, everything)
    assert torch.equal(layout.permutation[layout.inverse_permutation], everything)
    assert torch.equal(layout.inverse_permutation[layout.permutation], everything)


@given(layouts())
def test_tile_blocks_and_text_blocks_part_the_blocks(layout: TileLayout) -> None:
    tiles = range(layout.num_blocks)[layout.tile_blocks]
    assert len(tiles) == layout.num_tiles == math.prod(layout.tile_grid)
    assert sorted([*tiles, *layout.text_blocks]) == list(range(layout.num_blocks))
    starts = layout.block_offsets.tolist()
    for block in layout.text_blocks:
        tokens = layout.permutation[starts[block] : starts[block + 1]]
        assert ((tokens < layout.prefix) | (tokens >= layout.num_tokens - layout.suffix)).all()


@given(layouts(), st.sampled_from(DTYPES), st.integers(-3, 2))
def test_permute_round_trip(layout: TileLayout, dtype: torch.dtype, dim: int) -> None:
    shape = [2, 3, 2]
    shape[dim] = layout.num_tokens
    x = torch.randint(0, 2, shape).to(DEVICE, dtype)
    permuted = layout.permute(x, dim)
    assert permuted.dtype == dtype
    assert same_bits(permuted, x.index_select(dim, layout.permutation.to(DEVICE)))
    assert same_bits(layout.unpermute(permuted, dim), x)
    assert same_bits(layout.permute(layout.unpermute(x, dim), dim), x)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.flatten().clone().view(torch.uint8), b.flatten().clone().view(torch.uint8))


def test_gradients_of_permute_are_the_inverse() -> None:
    layout = TileLayout((3, 4, 5), (2, 2, 2), prefix=2, suffix=1)
    x = torch.randn(2, layout.num_tokens, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.permute, x)
    assert torch.autograd.gradcheck(lambda x: layout.unpermute(x, -2), x)
    assert torch.autograd.gradgradcheck(layout.permute, x)
    weight = torch.randn_like(x)
    (grad,) = torch.autograd.grad(layout.permute(x), x, weight)
    assert torch.equal(grad, layout.unpermute(weight))


def test_permute_any_strides() -> None:
    layout = TileLayout((4, 6), (2, 4))
    x = torch.randn(5, 3, 24).transpose(1, 2)
    assert torch.equal(layout.permute(x), layout.permute(x.contiguous()))


def test_a_layout_used_in_inference_can_be_trained_with_later() -> None:
    layout = TileLayout((4, 6), (3, 4))
    x = torch.randn(1, 24, 2)
    with torch.inference_mode():
        layout.permute(x)
        layout.blocks.block_of_token(DEVICE)
    x.requires_grad_()
    layout.permute(x).sum().backward()
    weight = torch.randn(24, requires_grad=True)
    (weight * layout.blocks.block_of_token(torch.device("cpu"))).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("grid", LATTICES)
def test_no_token_is_padded_or_lost_on_real_lattices(grid: tuple[int, ...]) -> None:
    layout = TileLayout(grid, (4, 4, 4))
    assert layout.num_tokens == math.prod(grid)
    assert torch.equal(layout.permutation.sort().values, torch.arange(layout.num_tokens))
    assert max(layout.block_lens) <= 64
    assert layout.num_blocks == math.prod(-(-side // 4) for side in grid)


def test_a_side_longer_than_the_grid_is_cut() -> None:
    assert TileLayout((2, 30), (4, 4)).tile == (2, 4)


def test_layouts_are_values() -> None:
    assert TileLayout((4, 4), (2, 2)) == TileLayout((4, 4), (2, 2))
    assert len({TileLayout((4, 4), (2, 2)), TileLayout((4, 4), (2, 2)), TileLayout((4, 4), (2, 2), prefix=1)}) == 2
    with pytest.raises(AttributeError):
        TileLayout((4, 4), (2, 2)).grid = (5, 5)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((4, 4), (2, 2, 2)), r"one number per axis.*\(4, 4\).*\(2, 2, 2\)"),
        (((0, 4), (2, 2)), r"grid must be a tuple of positive integers.*\(0, 4\)"),
        (((4, 4), (2, -1)), r"tile must be a tuple of positive integers.*\(2, -1\)"),
        (((), ()), "grid must be a tuple of positive integers"),
        ((64, (4,)), "grid must be a tuple of positive integers .*, got 64"),
        (((4.5, 4), (2, 2)), r"grid must be a tuple of positive integers.*4\.5"),
        (("44", (2, 2)), "grid must be a tuple of positive integers.*'44'"),
        (((4, 4), (2, 2), 0, 0, (1, 2, 1)), r"q_tiles must have one number per axis, got q_tiles=\(1, 2, 1\)"),
        (((4, 4), (2, 2), 0, 0, (0, 1)), r"q_tiles must be a tuple of positive integers.*\(0, 1\)"),
        (((4, 4), (2, 2), -1), "prefix must be a number of tokens >= 0, got -1"),
        (((4, 4), (2, 2), 0, 1.5), r"suffix must be a number of tokens >= 0, got 1\.5"),
        (((True, 4), (2, 2)), r"grid must be a tuple of positive integers.*\(True, 4\)"),
        (((4, 4), (2, 2), True), "prefix must be a number of tokens >= 0, got True"),
        (((10**6, 10**6), (10**3, 10**3)), "at most 2,147,483,647 tokens, because .* int32, got 1,000,000,000,000 "),
        (((4, 4), (2, 2), 2**31 - 16), "at most 2,147,483,647 tokens.*, got 2,147,483,648 .*prefix 2147483632"),
        (((4, 4), (2, 2), 0, 10**30), "at most 2,147,483,647 tokens"),
        ((range(1, 10**12), (2, 2)), "grid must have at most 64 numbers"),
        (((1,) * 1100, (1,) * 1100), "grid must have at most 64 numbers, one for each axis"),
    ],
)
@pytest.mark.timeout(10)  # refused before any work, also where the work would never end
def test_malformed_layouts_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        TileLayout(*arguments)


def test_a_tensor_of_another_lattice_is_refused() -> None:
    layout = TileLayout((3, 4, 5), (2, 2, 2), prefix=7)
    for reorder in (layout.permute, layout.unpermute):
        with pytest.raises(
            ShapeError, match=r"\(1, 60, 8\).*60 tokens.*grid \(3, 4, 5\) has 67.*7 prefix \+ 3x4x5 = 60"
        ):
            reorder(torch.zeros(1, 60, 8))
        with pytest.raises(ShapeError, match=r"dim 5 does not exist in a tensor of shape \(1, 67\)"):
            reorder(torch.zeros(1, 67), dim=5)
        with pytest.raises(ShapeError, match=r"dim 1\.0 does not exist in a tensor of shape \(1, 67\)"):
            reorder(torch.zeros(1, 67), dim=1.0)
        for wrong, got in (([0] * 67, "list"), (torch.nested.nested_tensor([torch.zeros(67)] * 2), "a nested tensor")):
            with pytest.raises(ShapeError, match=f"must be a plain tensor, got {got}"):
                reorder(wrong)
    assert issubclass(ShapeError, OpenVSAError)
    assert issubclass(ShapeError, ValueError)


def test_on_moves_and_returns_the_layout() -> None:
    layout = TileLayout((3, 4, 5), (2, 2, 2))
    assert layout.on(DEVICE) is layout
    assert layout.on(str(DEVICE)).permute(torch.arange(60, device=DEVICE), 0).tolist() == layout.permutation.tolist()


@pytest.mark.parametrize("device", ["bogus", "cpu:x", None, 3.5])
def test_what_names_no_device_is_refused(device: object) -> None:
    layout = TileLayout((4, 4), (2, 2))
    plan = BlockPlan.dense(layout.blocks, layout.blocks)
    module = openvsa.nn.VideoSparseAttention(8, 1)
    for call in (
        lambda: layout.on(device),
        lambda: plan.to(device),
        lambda: BlockPlan.dense(layout.blocks, layout.blocks, device),
        lambda: module.layout((4, 4), device=device),
    ):
        with pytest.raises(ShapeError, match=re.escape(f"such as 'cpu' or 'cuda:0', got {device!r}")):
            call()


def test_numbers_may_be_of_numpy_or_torch() -> None:
    layout = TileLayout(torch.tensor([4, 4]), (2, 2), prefix=torch.tensor(3))  # pyright: ignore[reportArgumentType]
    assert layout == TileLayout((4, 4), (2, 2), 3)
    assert type(layout.prefix) is int


def test_torch_func_sees_through_a_new_order() -> None:
    layout = TileLayout((3, 4, 5), (2, 2, 2))
    x = torch.randn(1, 60, 2, dtype=torch.float64)
    weight = torch.randn_like(x)
    grad = torch.func.grad(lambda x: (layout.permute(x) * weight).sum())(x)
    assert torch.equal(grad, layout.unpermute(weight))
    _, tangent = torch.func.jvp(layout.permute, (x,), (weight,))
    assert torch.equal(tangent, layout.permute(weight))
