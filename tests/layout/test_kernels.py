"""Permutation kernels: one pass each, and the same as the plain code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers import DEVICE
from openvsa import TileLayout
from openvsa.layout import kernels
from openvsa.layout.device import has_kernels
from openvsa.layout.reorder import all_to_blocks, lazy_product, to_blocks
from plain import both

pytestmark = pytest.mark.triton

LAYOUTS = [TileLayout((5, 3, 5), (2, 2, 3)), TileLayout((5, 6), (4, 4), prefix=5, suffix=2), TileLayout((7,), (20,))]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tokens(layout: TileLayout, dtype: torch.dtype = torch.float32, heads: int = 2, dim: int = 24) -> Tensor:
    return torch.randn(2, layout.num_tokens, heads, dim).to(DEVICE, dtype).requires_grad_()


def tables(layout: TileLayout) -> tuple[Tensor, Tensor, int]:
    return layout.index_on(DEVICE), layout.blocks.on(DEVICE), layout.blocks.max_len


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_permuting_moves_bits(layout: TileLayout, dtype: torch.dtype) -> None:
    def run() -> tuple[Tensor, ...]:
        x = tokens(layout, dtype)
        moved, back = layout.permute(x), layout.unpermute(x)
        return moved, back, *torch.autograd.grad((moved, back), x, (torch.randn_like(x), torch.randn_like(x)))

    ours, theirs = both(run)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_any_strides_and_nan_around() -> None:
    layout = LAYOUTS[0]
    x = tokens(layout).detach()
    expected = layout.permute(x)
    for order in ((0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)):
        back = [order.index(i) for i in range(4)]
        assert torch.equal(layout.permute(x.permute(order).contiguous().permute(back)), expected)
    framed = x.new_full((2, layout.num_tokens + 2, 4, 30), float("nan"))
    framed[:, 1:-1, 1:3, 3:27] = x
    view = framed[:, 1:-1, 1:3, 3:27]
    assert torch.equal(layout.permute(view), expected)
    assert torch.equal(layout.unpermute(layout.permute(view)), x)
    everywhere = x[:, :1].expand(x.shape)
    assert torch.equal(layout.permute(everywhere), everywhere)


def test_a_grid_holds_any_number_of_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its second and third dimensions end at 65,535."""
    grids = []

    class Launch:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(kernels, "_gather_kernel", Launch())
    monkeypatch.setattr(kernels, "_scatter_kernel", Launch())
    layout = TileLayout((2,), (1,))
    x = torch.empty(70_000, 2, 1, 1)
    kernels.gather([x, x, x], *tables(layout), write=True, mean=False)
    kernels.weighted_sums(x, *tables(layout), x, x, 0)
    kernels.scatter([x], *tables(layout), seq=2, dtype=x.dtype)
    assert grids == [(140_000, 3), (140_000, 1), (140_000, 1)]


def test_blocks_longer_than_a_program_holds() -> None:
    layout = TileLayout((300,), (150,))
    moved, means = to_blocks(tokens(layout, dim=64), *tables(layout), True, True)
    torch.testing.assert_close(means.transpose(1, 2), moved.unflatten(1, (2, 150)).mean(2))


def test_nothing_to_move() -> None:
    layout = LAYOUTS[0]
    empty = torch.empty(0, layout.num_tokens, 2, 4, device=DEVICE)
    assert layout.permute(empty).shape == layout.unpermute(empty).shape == empty.shape


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["blocks", "means", "both"])
def test_gradients_of_what_was_used(wanted: tuple[bool, bool]) -> None:
    """An output without gradient is left out, not filled with zeros; the sum over both is the sum of the parts."""
    layout = LAYOUTS[1]
    x = tokens(layout)
    outputs = to_blocks(x, *tables(layout), True, True)
    weights = [torch.randn_like(y) for y in outputs]
    used = [i for i in range(2) if wanted[i]]
    (grad,) = torch.autograd.grad([outputs[i] for i in used], x, [weights[i] for i in used])
    exact = torch.zeros_like(x)
    order = layout.permutation.to(DEVICE)
    if wanted[0]:
        exact[:, order] += weights[0]
    if wanted[1]:
        lens = layout.blocks.lens_on(DEVICE)
        exact[:, order] += (weights[1].transpose(1, 2) / lens[:, None, None]).repeat_interleave(lens, dim=1)
    torch.testing.assert_close(grad, exact)


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("mean", [True, False])
def test_all_three_together_are_as_one_by_one(kv_heads: int, mean: bool) -> None:
    """In one launch where they have one shape (and their gradients too), in several where not."""
    layout = LAYOUTS[1]
    q, k, v = tokens(layout), tokens(layout)[:, :, :kv_heads], tokens(layout)[:, :, :kv_heads]
    together = all_to_blocks(q, k, v, *tables(layout), mean)
    pairs = [to_blocks(x, *tables(layout), True, mean) for x in (q, k, v)]
    alone = [x for x, _ in pairs] + [means for _, means in pairs]
    # The means of v are not used: their gradient is left out.
    used = [0, 1, 2, 3, 4] if mean else [0, 1, 2]
    weights = [torch.randn_like(alone[i]) for i in used]
    results = [torch.autograd.grad([outputs[i] for i in used], (q, k, v), weights) for outputs in (together, alone)]
    for a, b in zip((*together, *results[0]), (*alone, *results[1]), strict=True):
        assert torch.equal(a, b)


def test_the_same_bits_twice() -> None:
    layout = LAYOUTS[1]
    rows = torch.randn(2, layout.num_tiles, 2, 24, device=DEVICE)

    def run() -> tuple[Tensor | None, ...]:
        torch.manual_seed(2)
        x, weight = tokens(layout, torch.bfloat16).detach(), tokens(layout).detach()
        index, offsets, longest = tables(layout)
        return kernels.weighted_sums(x, index, offsets, longest, weight, rows, layout.tile_blocks.start)

    for a, b in zip(run(), run(), strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits() -> None:
    """The last batch entry starts 2**31 elements after the first; only what is touched is ever resident."""
    layout = TileLayout((3,), (2,))
    if DEVICE.type == "cpu":
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    else:
        memory = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=DEVICE)
    x = memory.as_strided((2, 3, 1, 16), (2**31, 16, 16, 1))
    values = torch.randn(2, 3, 1, 16).bfloat16().to(DEVICE)
    x.copy_(values)
    assert torch.equal(layout.permute(x), values)
    assert torch.equal(layout.unpermute(x), values)


def test_opcheck() -> None:
    layout = LAYOUTS[1]
    index, offsets, longest = tables(layout)
    x, weight = tokens(layout), tokens(layout)
    rows = torch.randn(2, layout.num_tiles, 2, 24, device=DEVICE, requires_grad=True)
    first = layout.tile_blocks.start
    # The schema, the fake and the autograd registration; the whole op is traced in tests/nn.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for write, mean in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            torch.ops.openvsa.to_blocks.default, (x, index, offsets, longest, write, mean), test_utils=checks
        )
    torch.library.opcheck(
        torch.ops.openvsa.to_blocks.default, (x, None, offsets, longest, False, True), test_utils=checks
    )
    torch.library.opcheck(
        torch.ops.openvsa.all_to_blocks.default, (x, weight, x, index, offsets, longest, True), test_utils=checks
    )
    torch.library.opcheck(torch.ops.openvsa.two_means.default, (x, weight, offsets, longest), test_utils=checks)
    torch.library.opcheck(
        torch.ops.openvsa.from_blocks.default, (x, None, None, None, index, offsets, longest, 0), test_utils=checks
    )
    arguments = (index, offsets, longest, first)
    promised = lazy_product(weight, rows, *arguments, x.dtype)
    assert promised.untyped_storage().nbytes() == x.element_size()
    torch.library.opcheck(
        torch.ops.openvsa.lazy_product.default, (weight, rows, *arguments, x.dtype), test_utils=checks
    )
    promised, rows, weight = promised.detach().requires_grad_(), rows.detach(), weight.detach()
    torch.library.opcheck(
        torch.ops.openvsa.from_blocks.default, (x, promised, rows, weight, *arguments), test_utils=checks
    )


def test_fp64_and_integers_keep_the_plain_code() -> None:
    layout = LAYOUTS[0]
    for x in (tokens(layout).double(), tokens(layout).detach().long()):
        assert not has_kernels(x)
        assert torch.equal(layout.permute(x), x[:, layout.permutation.to(DEVICE)])
