"""Plans: conversions there and back, algebra against boolean algebra, and figures against the mask."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from helpers import DEVICE, equal_lens, offsets
from openvsa import BlockPlan, Budget, MissingExtraError, PlanError, block_sparse_attention
from openvsa.plan.convert import csr_to_lists, lists_to_csr, mask_to_lists, transpose_lists


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...] | None = None) -> Tensor:
    """Any mask, also with rows or columns that are empty or full."""
    if shape is None:
        shape = draw(st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 6), st.integers(1, 7)))
    share = draw(st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return (torch.rand(shape, generator=generator) < share).to(DEVICE)


@st.composite
def plans(draw: st.DrawFn) -> tuple[BlockPlan, Tensor]:
    mask = draw(masks())
    lens = [draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)) for n in mask.shape[2:]]
    return BlockPlan.from_block_mask(mask, *map(offsets, lens)), mask


def mask_of(plan: BlockPlan) -> Tensor:
    """The dense form, row by row, straight from the definition."""
    counts, indices = plan.kv_num_blocks.tolist(), plan.kv_indices.tolist()
    mask = torch.zeros(*plan.kv_num_blocks.shape, plan.kv_blocks.num_blocks, dtype=torch.bool)
    for b, heads in enumerate(counts):
        for h, rows in enumerate(heads):
            for i, count in enumerate(rows):
                mask[b, h, i, indices[b][h][i][:count]] = True
    return mask.to(DEVICE)


@given(plans())
def test_mask_round_trip(made: tuple[BlockPlan, Tensor]) -> None:
    plan, mask = made
    assert torch.equal(mask_of(plan), mask)
    assert torch.equal(plan.block_mask(), mask)
    assert plan.kv_indices.dtype == plan.kv_num_blocks.dtype == torch.int32
    plan.validate()
    if DEVICE.type == "cpu":
        assert plan.kv_indices.shape[-1] == max(1, int(mask.sum(-1).max())), "the lists are wider than the longest row"


@given(plans())
def test_csr_round_trip(made: tuple[BlockPlan, Tensor]) -> None:
    plan, mask = made
    starts, indices = plan.to_csr()
    rows = mask.tolist()
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            s, packed = starts[b, h].tolist(), indices[b, h].tolist()
            assert [packed[s[i] : s[i + 1]] for i in range(mask.shape[2])] == [
                [j for j, read in enumerate(row) if read] for row in rows[b][h]
            ]
    again = BlockPlan.from_csr(starts, indices, plan.q_blocks, plan.kv_blocks)
    assert torch.equal(again.block_mask(), mask)


@given(plans())
def test_transpose(made: tuple[BlockPlan, Tensor]) -> None:
    plan, mask = made
    transposed = plan.transpose()
    transposed.validate()
    assert torch.equal(transposed.block_mask(), mask.transpose(2, 3))
    assert (transposed.q_blocks, transposed.kv_blocks) == (plan.kv_blocks, plan.q_blocks)
    assert torch.equal(transposed.transpose().block_mask(), mask)
    assert plan.transpose() is transposed
    starts, readers = plan.transpose_csr()
    assert torch.equal(starts[..., 1:] - starts[..., :-1], mask.sum(2).int())
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            s = starts[b, h].tolist()
            for j in range(mask.shape[3]):
                assert readers[b, h, s[j] : s[j + 1]].tolist() == mask[b, h, :, j].nonzero().flatten().tolist()


@given(plans(), st.data())
def test_union_and_intersect(made: tuple[BlockPlan, Tensor], data: st.DataObject) -> None:
    plan, mask = made
    other_mask = data.draw(masks((1, 1, *mask.shape[2:])))
    other = BlockPlan.from_block_mask(other_mask, plan.q_blocks, plan.kv_blocks)
    for result, expected in (
        (plan.union(other), mask | other_mask),
        (plan | other, mask | other_mask),
        (plan.intersect(other), mask & other_mask),
        (other & plan, mask & other_mask),
    ):
        result.validate()
        assert torch.equal(result.block_mask(), expected)


@given(plans(), st.data())
def test_with_dense_blocks(made: tuple[BlockPlan, Tensor], data: st.DataObject) -> None:
    plan, mask = made
    rows, columns = (data.draw(st.lists(st.integers(0, n - 1), max_size=3)) for n in mask.shape[2:])
    dense = plan.with_dense_blocks(rows, columns)
    dense.validate()
    expected = mask.clone()
    expected[:, :, rows] = True
    expected[..., columns] = True
    assert torch.equal(dense.block_mask(), expected)


@given(plans())
def test_density_and_cost(made: tuple[BlockPlan, Tensor]) -> None:
    plan, mask = made
    assert plan.density == pytest.approx(mask.float().mean().item())
    tokens = torch.tensor(plan.q_blocks.lens)[:, None] * torch.tensor(plan.kv_blocks.lens)
    assert plan.cost == int((mask.cpu() * tokens).sum())


@given(plans())
def test_file_round_trip(made: tuple[BlockPlan, Tensor]) -> None:
    plan, mask = made
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.safetensors"
        plan.save(path)
        assert [file.name for file in Path(folder).iterdir()] == [path.name]
        again = BlockPlan.load(path, DEVICE)
    assert torch.equal(again.kv_indices, plan.kv_indices)
    assert torch.equal(again.kv_num_blocks, plan.kv_num_blocks)
    assert (again.q_blocks, again.kv_blocks) == (plan.q_blocks, plan.kv_blocks)


@given(masks(), st.sampled_from([4, 16]), st.integers(0, 3))
def test_flex_round_trip(mask: Tensor, size: int, short: int) -> None:
    q_lens, kv_lens = ((*[size] * (n - 1), size - short) for n in mask.shape[2:])
    plan = BlockPlan.from_block_mask(mask, offsets(q_lens), offsets(kv_lens))
    block_mask = plan.to_flex_block_mask()
    again = BlockPlan.from_flex_block_mask(block_mask)
    assert torch.equal(again.block_mask(), mask)
    assert (again.q_blocks, again.kv_blocks) == (plan.q_blocks, plan.kv_blocks)


@pytest.mark.parametrize("compiler", ["inductor"] if shutil.which("g++") else [])
def test_flex_attention_computes_the_same_plan(compiler: str) -> None:
    """FlexAttention on the CPU has no lse, which is why it is no backend there, but it can check the conversion. On a
    GPU its kernels take no blocks as small."""
    size = 16 if DEVICE.type == "cpu" else 128
    lens = equal_lens(7 * size // 2, size)
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 1, 1]], dtype=torch.bool)[None, None]
    plan = BlockPlan.from_block_mask(mask.to(DEVICE), offsets(lens), offsets(lens))
    q, k, v = (torch.randn(1, sum(lens), 2, 16, device=DEVICE) for _ in range(3))
    ours = block_sparse_attention(q, k, v, plan, backend="reference")
    attend: Any = torch.compile(flex_attention, backend=compiler, fullgraph=True)
    theirs = attend(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=plan.to_flex_block_mask())
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-4, atol=1e-5)


def test_from_a_flex_mask_with_full_blocks() -> None:
    """create_block_mask sorts blocks into partial and full ones; a plan takes both if none is cut."""

    def same_half(b: Any, h: Any, q: Any, kv: Any) -> Any:
        return (q // 32) == (kv // 32)

    whole = create_block_mask(same_half, 1, 1, 64, 64, device=str(DEVICE), BLOCK_SIZE=16)
    expected = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2)).bool().to(DEVICE)
    assert torch.equal(BlockPlan.from_flex_block_mask(whole).block_mask()[0, 0], expected)
    cut = create_block_mask(same_half, 1, 1, 64, 64, device=str(DEVICE), BLOCK_SIZE=64)
    with pytest.raises(PlanError, match="1 blocks of the BlockMask are partial"):
        BlockPlan.from_flex_block_mask(cut)


def test_dense_reads_everything() -> None:
    plan = BlockPlan.dense([0, 2, 5], [0, 1, 3, 9], DEVICE)
    assert plan.block_mask().all()
    assert plan.density == 1.0
    assert plan.cost == 5 * 9
    assert plan.kv_offsets.tolist() == [0, 1, 3, 9]
    assert plan.q_offsets.dtype == torch.int32
    assert plan.device.type == DEVICE.type


def test_max_blocks_fixes_the_width() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0]]).bool()[None, None].to(DEVICE)
    plan = BlockPlan.from_block_mask(mask, [0, 1, 2], [0, 1, 2, 3, 4], max_blocks=3)
    assert plan.kv_indices.shape == (1, 1, 2, 3)
    assert torch.equal(plan.block_mask(), mask)
    starts, indices = plan.to_csr()
    wide = BlockPlan.from_csr(starts, indices, plan.q_blocks, plan.kv_blocks, max_blocks=4)
    assert wide.kv_indices.shape == (1, 1, 2, 4)
    assert torch.equal(wide.block_mask(), mask)


def test_lists_are_contiguous_however_they_came() -> None:
    """Kernels walk them by pointer."""
    plan = BlockPlan.dense([0, 2, 5], [0, 1, 3, 9])
    strided = BlockPlan(
        plan.kv_num_blocks.expand(2, 1, 2), plan.kv_indices.expand(2, 1, 2, 3)[..., :3], plan.q_blocks, plan.kv_blocks
    )
    for made in (plan, strided):
        assert made.kv_indices.is_contiguous()
        assert made.kv_num_blocks.is_contiguous()


def test_plans_are_immutable_and_move() -> None:
    plan = BlockPlan.dense([0, 2], [0, 2])
    with pytest.raises(AttributeError):
        plan.kv_indices = plan.kv_indices  # pyright: ignore[reportAttributeAccessIssue]
    assert plan.to("cpu") is plan
    moved = plan.to("meta")
    assert moved.device.type == "meta"
    assert moved.q_blocks is plan.q_blocks


def test_the_repr_tells_the_story() -> None:
    mask = torch.tensor([[1, 0, 1], [0, 1, 0]]).bool()[None, None]
    assert repr(BlockPlan.from_block_mask(mask, [0, 2, 5], [0, 1, 3, 9])) == (
        "BlockPlan(2 query blocks (5 tokens) read 1 to 2 of 3 key blocks (9 tokens) each; density 0.500, "
        "20 token pairs; batch 1, all heads alike, cpu)"
    )


def test_the_repr_of_what_has_no_numbers() -> None:
    plan = BlockPlan.from_block_mask(torch.eye(2, dtype=torch.bool)[None, None], [0, 2, 5], [0, 1, 3], max_blocks=1)
    story = "BlockPlan(2 query blocks (5 tokens) read up to 1 of 2 key blocks (3 tokens) each; batch 1, all heads alike"
    assert repr(plan.to("meta")) == f"{story}, meta)"
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert repr(BlockPlan(plan.kv_num_blocks + 0, plan.kv_indices + 0, [0, 2, 5], [0, 1, 3])) == f"{story}, cpu)"
    empty = BlockPlan.from_block_mask(torch.zeros(0, 1, 2, 2, dtype=torch.bool), [0, 2, 5], [0, 1, 3])
    assert empty.density == 0
    assert "density 0.000, 0 token pairs; batch 0" in repr(empty)


COUNTS = torch.tensor([[[1, 2]]], dtype=torch.int32)
INDICES = torch.tensor([[[[0, 0], [0, 2]]]], dtype=torch.int32)


@pytest.mark.parametrize(
    ("counts", "indices", "q", "kv", "message"),
    [
        (COUNTS[0], INDICES, [0, 2, 5], [0, 1, 3, 9], r"got shapes \(1, 2\) and \(1, 1, 2, 2\)"),
        (COUNTS, INDICES[:, :, :1], [0, 2, 5], [0, 1, 3, 9], r"got shapes \(1, 1, 2\) and \(1, 1, 1, 2\)"),
        (COUNTS, INDICES, [0, 2, 5, 6], [0, 1, 3, 9], "2 query blocks, but q_offsets describe 3"),
        (COUNTS.long(), INDICES, [0, 2, 5], [0, 1, 3, 9], r"must be int32.*got torch\.int64"),
        (COUNTS, INDICES, [0, 5, 2], [0, 1, 3, 9], "strictly increase, got 5 followed by 2"),
        (COUNTS, INDICES, [0, 2, 5], [1, 3, 9], "start at 0"),
        (COUNTS + 1, INDICES, [0, 2, 5], [0, 1, 3, 9], r"0\.\.K = 2, got values from 2 to 3"),
        (COUNTS - 2, INDICES, [0, 2, 5], [0, 1, 3, 9], r"0\.\.K = 2, got values from -1 to 0"),
        (COUNTS, INDICES + 1, [0, 2, 5], [0, 1, 3, 9], r"kv_indices\[0, 0, 1, 1\] is 3, but there are 3 key blocks"),
        (COUNTS, INDICES - 1, [0, 2, 5], [0, 1, 3, 9], r"kv_indices\[0, 0, 0, 0\] is -1"),
        (COUNTS, INDICES.flip(-1), [0, 2, 5], [0, 1, 3, 9], r"strictly ascend.*got \[2, 0\] in row \[0, 0, 1\]"),
        (COUNTS, INDICES * 0, [0, 2, 5], [0, 1, 3, 9], r"strictly ascend.*got \[0, 0\]"),
    ],
)
def test_malformed_plans_are_refused(counts: Tensor, indices: Tensor, q: list, kv: list, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        BlockPlan(counts, indices, q, kv)  # pyright: ignore[reportArgumentType]


def test_malformed_sources_are_refused() -> None:
    mask = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    with pytest.raises(PlanError, match=r"mask must be bool.*torch\.float32"):
        BlockPlan.from_block_mask(mask.float(), [0, 2, 5], [0, 1, 3, 9])
    with pytest.raises(PlanError, match=r"shape \(1, 2, 3\)"):
        BlockPlan.from_block_mask(mask[0], [0, 2, 5], [0, 1, 3, 9])
    with pytest.raises(PlanError, match="does not match 2 query blocks and 2 key blocks"):
        BlockPlan.from_block_mask(mask, [0, 2, 5], [0, 1, 9])
    with pytest.raises(PlanError, match="max_blocks is 2, but a row of the mask has 3"):
        BlockPlan.from_block_mask(mask, [0, 2, 5], [0, 1, 3, 9], max_blocks=2)

    starts, indices = BlockPlan.from_block_mask(mask, [0, 2, 5], [0, 1, 3, 9]).to_csr()
    for bad_starts, bad_indices, message in (
        (starts[..., :-1], indices, r"starts must be \[B\|1, H\|1, 3\]"),
        (starts, indices[0], r"got shapes \(1, 1, 3\) and \(1, 6\)"),
        (starts.expand(2, 1, 3), indices, r"got shapes \(2, 1, 3\) and \(1, 1, 6\)"),
        (starts + 1, indices, "starts must begin at 0"),
        (starts.flip(-1), indices, "starts must begin at 0"),
        (starts * 2, indices, "within the 6 indices"),
        (starts, indices + 1, "there are 3 key blocks"),
    ):
        with pytest.raises(PlanError, match=message):
            BlockPlan.from_csr(bad_starts, bad_indices, [0, 2, 5], [0, 1, 3, 9])
    with pytest.raises(PlanError, match="a row of the compressed form has 3 blocks, but at most 2"):
        BlockPlan.from_csr(starts, indices, [0, 2, 5], [0, 1, 3, 9], max_blocks=2)


def test_plans_that_do_not_fit_together_are_refused() -> None:
    plan = BlockPlan.dense([0, 2, 5], [0, 1, 3, 9])
    for combine in (plan.union, plan.intersect):
        with pytest.raises(PlanError, match="over the same blocks on one device"):
            combine(BlockPlan.dense([0, 2, 4], [0, 1, 3, 9]))
        with pytest.raises(PlanError, match=r"cpu and .* on meta"):
            combine(plan.to("meta"))
    with pytest.raises(PlanError, match=r"dense rows must be in 0\.\.1, got \[2\]"):
        plan.with_dense_blocks(rows=[2])
    with pytest.raises(PlanError, match=r"dense columns must be in 0\.\.2, got \[-1\]"):
        plan.with_dense_blocks(columns=[-1])
    with pytest.raises(PlanError, match="FlexAttention needs key blocks of one length"):
        BlockPlan.dense([0, 2, 4], [0, 1, 3, 9]).to_flex_block_mask()


def test_files_that_are_not_plans_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(PlanError, match=r"cannot read a plan from .*nowhere"):
        BlockPlan.load(tmp_path / "nowhere")
    damaged = tmp_path / "damaged"
    BlockPlan.dense([0, 2], [0, 2]).save(damaged)
    damaged.write_bytes(damaged.read_bytes()[:-8])
    with pytest.raises(PlanError, match=r"cannot read a plan from .*damaged"):
        BlockPlan.load(damaged)
    other = tmp_path / "other"
    save_file({"kv_indices": torch.zeros(1)}, other)
    with pytest.raises(PlanError, match="not a plan of format"):
        BlockPlan.load(other)
    out_of_range = tmp_path / "out_of_range"
    save_file(
        {
            "kv_num_blocks": COUNTS,
            "kv_indices": INDICES + 7,
            "q_offsets": torch.arange(3),
            "kv_offsets": torch.arange(4),
        },
        out_of_range,
        metadata={"format": "openvsa.BlockPlan/1"},
    )
    with pytest.raises(PlanError, match="there are 3 key blocks"):
        BlockPlan.load(out_of_range)


def test_without_safetensors_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for use in (BlockPlan.dense([0, 2], [0, 2]).save, BlockPlan.load):
        with pytest.raises(MissingExtraError, match=r"pip install 'openvsa\[io\]'"):
            use(tmp_path / "plan")
    assert list(tmp_path.iterdir()) == []


def test_saving_without_numpy_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """safetensors is imported without it, and fails in the middle."""
    monkeypatch.setitem(sys.modules, "numpy", None)
    with pytest.raises(MissingExtraError, match=r"'numpy'.*pip install 'openvsa\[io\]'"):
        BlockPlan.dense([0, 2], [0, 2]).save(tmp_path / "plan")


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, target: Path) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "plan"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        BlockPlan.dense([0, 2], [0, 2]).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["plan"]
    assert path.read_bytes() == b"old"


def test_saved_plans_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    BlockPlan.dense([0, 2], [0, 2]).save(tmp_path / "plan")
    assert (tmp_path / "plan").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_compressed_rows_that_32_bits_cannot_count_are_refused() -> None:
    counts = torch.zeros(1, dtype=torch.int32).expand(1, 1, 46341)
    indices = torch.zeros(1, dtype=torch.int32).expand(1, 1, 46341, 46341)
    for convert in (lists_to_csr, lambda counts, indices: transpose_lists(counts, indices, 46341)):
        with pytest.raises(PlanError, match=r"46341 query blocks \* K = 46341; make the lists shorter"):
            convert(counts, indices)


def test_lists_never_hold_more_than_they_can_where_nothing_is_checked() -> None:
    """On a GPU, and here in compiled code, a row that is longer than promised is cut."""
    mask = torch.ones(1, 1, 2, 5, dtype=torch.bool)
    counts, indices = torch.compile(mask_to_lists, backend="eager", fullgraph=True)(mask, 3)
    assert counts.tolist() == [[[3, 3]]]
    assert indices.tolist() == [[[[0, 1, 2]] * 2]]
    starts, packed = torch.tensor([[[0, 5, 7]]]).int(), torch.tensor([[[0, 1, 2, 3, 4, 1, 3]]]).int()
    counts, indices = torch.compile(csr_to_lists, backend="eager", fullgraph=True)(starts, packed, 5, 3)
    assert counts.tolist() == [[[3, 2]]]
    assert indices.tolist() == [[[[0, 1, 2], [1, 3, 0]]]]


@pytest.mark.parametrize("shape", [(1, 1, 2, 4), (1, 1, 2, 2), (1, 1, 3, 3), (1, 2, 3)], ids=str)
def test_scores_of_other_blocks_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="with 2 query blocks and 3 key blocks, got shape"):
        BlockPlan.from_scores(torch.zeros(shape), Budget(top_k=1), [0, 1, 2], [0, 1, 2, 3])


AT = [0, 3, 5]
MASK = torch.ones(1, 1, 2, 2, dtype=torch.bool)
WRONG: dict[str, tuple[Any, str]] = {
    "mask": (lambda: BlockPlan.from_block_mask([[True]], AT, AT), "mask must be a tensor, got list"),
    "max_blocks": (
        lambda: BlockPlan.from_block_mask(~MASK, AT, AT, max_blocks=-1), "max_blocks must be a number .*, got -1",
    ),
    "scores": (lambda: BlockPlan.from_scores(None, Budget(top_k=1), AT, AT), "scores must be a tensor, got NoneType"),
    "starts": (lambda: BlockPlan.from_csr([0], [0], AT, AT), "starts must be a tensor, got list"),
    "floats": (
        lambda: BlockPlan.from_csr(torch.tensor([[[0, 1.0, 2]]]), torch.tensor([[[0, 1]]]), AT, AT),
        r"must be integers, got torch\.float32 and torch\.int64",
    ),
    "counts": (lambda: BlockPlan([1], MASK, AT, AT), "kv_num_blocks must be a tensor, got list"),
    "rows": (lambda: BlockPlan.dense(AT, AT).with_dense_blocks([0.5]), r"rows must be numbers .*, got \[0\.5\]"),
    "one row": (lambda: BlockPlan.dense(AT, AT).with_dense_blocks(columns=1), "columns must be numbers .*, got 1"),
    "or": (lambda: BlockPlan.dense(AT, AT) | MASK, "must be a BlockPlan, got Tensor"),
    "inflation": (lambda: BlockPlan.dense(AT, AT).inflation(None), "must be a BlockPlan, got NoneType"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_of_another_type_is_refused(name: str) -> None:
    call, message = WRONG[name]
    with pytest.raises(PlanError, match=message):
        call()
