"""Block offsets: what they hold, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers import DEVICE, offsets
from openvsa import PlanError
from openvsa.layout import BlockOffsets

lens_lists = st.lists(st.integers(1, 9), min_size=1, max_size=8)


@given(lens_lists)
def test_forms_agree(lens: list[int]) -> None:
    blocks = BlockOffsets(lens)
    for form in (offsets(lens), torch.tensor(offsets(lens)), torch.tensor(offsets(lens), dtype=torch.int32), blocks):
        assert BlockOffsets.of(form) == blocks
    assert len({blocks, BlockOffsets(lens)}) == 1
    assert (blocks.num_blocks, blocks.num_tokens, blocks.max_len) == (len(lens), sum(lens), max(lens))
    assert blocks.on(DEVICE).tolist() == offsets(lens)
    assert blocks.on(DEVICE).dtype == torch.int32
    assert blocks.lens_on(DEVICE).tolist() == lens
    assert blocks.block_of_token(DEVICE).tolist() == [block for block, n in enumerate(lens) for _ in range(n)]


@given(lens_lists)
def test_slots_stay_inside_their_block(lens: list[int]) -> None:
    starts = offsets(lens)
    slots = BlockOffsets(lens).padded_slots(DEVICE).tolist()
    for block, n in enumerate(lens):
        assert slots[block] == [starts[block] + min(slot, n - 1) for slot in range(max(lens))]


@pytest.mark.parametrize(
    ("lens", "uniform"),
    [([4, 4, 4], 4), ([4, 4, 1], 4), ([4, 5], None), ([3], 3), ([1, 4, 4], None), ([4, 3, 4], None)],
)
def test_uniform_len(lens: list[int], uniform: int | None) -> None:
    assert BlockOffsets(lens).uniform_len == uniform


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 3, 5], r"start at 0, got \[1, 3, 5\]"),
        ([0], r"start at 0, got \[0\]"),
        ([], "start at 0"),
        ([0, 3, 3], "strictly increase, got 3 followed by 3 at position 1"),
        ([0, 5, 3], "strictly increase, got 5 followed by 3 at position 1"),
        ([0, 1.5, 3], "integers"),
        (torch.tensor([0.0, 1.5, 3.0]), "integers"),
        (torch.tensor([[0, 3]]), "start at 0"),
        (torch.tensor(0), "start at 0"),
    ],
)
def test_malformed_offsets_are_refused(values: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BlockOffsets.of(values)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("lens", [[], [3, 0], [-1], [1.5]])
def test_malformed_lens_are_refused(lens: list[int]) -> None:
    with pytest.raises(PlanError, match="block lengths must be positive integers"):
        BlockOffsets(lens)


def test_more_tokens_than_int32_counts_are_refused() -> None:
    assert BlockOffsets([2**31 - 1]).on(torch.device("cpu")).tolist() == [0, 2**31 - 1]
    for make in (lambda: BlockOffsets([2**30, 2**30]), lambda: BlockOffsets.of([0, 2**31])):
        with pytest.raises(PlanError, match=r"at most 2,147,483,647 tokens in all, .* int32, got 2,147,483,648"):
            make()


def test_the_repr_says_how_long_blocks_are() -> None:
    assert repr(BlockOffsets([4, 4])) == "BlockOffsets(2 blocks of 4 tokens, 8 in all)"
    assert repr(BlockOffsets([4, 1])) == "BlockOffsets(2 blocks of 1 to 4 tokens, 5 in all)"
