"""video_sparse_attention against an independent statement of VSA, and the properties that must hold."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helpers import DEVICE
from openvsa import BlockPlan, Budget, BudgetError, ShapeError, TileLayout, UnsupportedError, video_sparse_attention
from openvsa.nn import compressed_attention
from openvsa.nn.released import released_attention
from openvsa.select import PooledTopK
from openvsa.select.released import ReleasedVSA
from tolerance import FORWARD, GRADIENT, excess

GRID, TILE = (3, 5, 6), (2, 2, 4)
S = math.prod(GRID)


def make(
    *, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16, tokens: int = S, **kind: Any
) -> list[Tensor]:
    """q, k, v and branch_weight, leaves that want gradients."""
    kind = {"dtype": torch.float64, "device": DEVICE, **kind}
    sizes = (heads, kv_heads, kv_heads, heads)
    return [torch.randn(batch, tokens, h, dim, **kind).requires_grad_() for h in sizes]


def tiles_of(grid: tuple[int, ...], tile: tuple[int, ...]) -> list[list[int]]:
    """The raster indices of the tokens of each tile, by walking the lattice."""
    corners = product(*(range(0, g, t) for g, t in zip(grid, tile, strict=True)))
    tiles = []
    for corner in corners:
        tokens = []
        for point in product(*(range(c, min(c + t, g)) for c, t, g in zip(corner, tile, grid, strict=True))):
            index = 0
            for side, coordinate in zip(grid, point, strict=True):
                index = index * side + coordinate
            tokens.append(index)
        tiles.append(tokens)
    return tiles


def vsa_in_words(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None, kept: int, scale: float | None = None
) -> Tensor:
    """VSA as DESIGN.md section 6 says it, one batch entry, head and tile at a time (arXiv 2505.13389, section 2.2)."""
    scale = scale or 1 / math.sqrt(q.shape[-1])
    tiles = tiles_of(GRID, TILE)
    out = torch.zeros_like(q)
    for b, head in product(range(q.shape[0]), range(q.shape[2])):
        kv_head = head * k.shape[2] // q.shape[2]
        queries, keys, values = q[b, :, head], k[b, :, kv_head], v[b, :, kv_head]
        q_mean, k_mean, v_mean = (torch.stack([x[t].mean(0) for t in tiles]) for x in (queries, keys, values))
        for i, tokens in enumerate(tiles):
            coarse = torch.stack([(q_mean[i] * k_mean[j]).sum() * scale for j in range(len(tiles))])
            chosen = sorted(range(len(tiles)), key=lambda j: (-coarse[j].item(), j))[:kept]
            read = [token for j in sorted(chosen) for token in tiles[j]]
            fine = torch.softmax(queries[tokens] @ keys[read].T * scale, dim=-1) @ values[read]
            if weight is not None:
                compressed = torch.softmax(coarse, dim=-1) @ v_mean
                fine = fine + weight[b, tokens, head] * compressed
            out[b, tokens, head] = fine
    return out


@pytest.mark.parametrize("branch", [True, False], ids=["branch", "no-branch"])
@pytest.mark.parametrize(("ratio", "kept"), [(0.125, 2), (0.5, 6), (1.0, 12)])
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_it_is_vsa(branch: bool, ratio: float, kept: int, kv_heads: int) -> None:
    q, k, v, weight = make(kv_heads=kv_heads)
    leaves = (q, k, v, weight) if branch else (q, k, v)
    layout = TileLayout(GRID, TILE)
    assert layout.num_tiles == 12
    ours = video_sparse_attention(q, k, v, layout, Budget(keep_ratio=ratio), weight if branch else None)
    theirs = vsa_in_words(q, k, v, weight if branch else None, kept)
    torch.testing.assert_close(ours, theirs)
    grad_out = torch.randn_like(ours)
    for our_grad, their_grad in zip(
        torch.autograd.grad(ours, leaves, grad_out), torch.autograd.grad(theirs, leaves, grad_out), strict=True
    ):
        torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_vsa_in_the_dtypes_of_training(dtype: torch.dtype) -> None:
    """Everything is kept, because naive scores in a low precision would choose other tiles."""
    leaves = make(dtype=dtype)
    layout, budget = TileLayout(GRID, TILE), Budget(keep_ratio=1.0)
    grad_out = torch.randn(leaves[0].shape).to(DEVICE, dtype)

    def with_gradients(run: Any, run_dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(run_dtype).requires_grad_() for x in leaves]
        out = run(*inputs)
        return (out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(run_dtype)))

    def naive(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return vsa_in_words(q, k, v, weight, 12)

    ours = with_gradients(lambda q, k, v, weight: video_sparse_attention(q, k, v, layout, budget, weight), dtype)
    assert all(x.dtype == dtype for x in ours)
    for i, (mine, plain, exact) in enumerate(
        zip(ours, with_gradients(naive, dtype), with_gradients(naive, torch.float64), strict=True)
    ):
        assert excess(mine, plain, exact, FORWARD if i == 0 else GRADIENT) == []


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize(
    "layout",
    [
        TileLayout(GRID, TILE),
        TileLayout((9, 10), (4, 4)),
        TileLayout((90,), (16,)),
        TileLayout((8, 10), (4, 4), prefix=7, suffix=3),
    ],
    ids=["3d", "2d", "1d", "text"],
)
def test_density_one_is_dense_attention(layout: TileLayout) -> None:
    q, k, v, weight = make()
    expected = dense(q, k, v)
    out = video_sparse_attention(q, k, v, layout, Budget(keep_ratio=1.0))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(video_sparse_attention(q, k, v, layout, Budget(top_p=1.0)), expected)
    with_branch = video_sparse_attention(q, k, v, layout, Budget(keep_ratio=1.0), weight)
    pooled = (torch.stack([x[:, t].mean(1) for t in raster_tiles(layout)], 1) for x in (q, k, v))
    compressed = compressed_attention(*pooled, 1 / math.sqrt(16))
    for i, tokens in enumerate(raster_tiles(layout)):
        expected = expected.index_add(
            1, torch.tensor(tokens, device=DEVICE), weight[:, tokens] * compressed[:, i : i + 1]
        )
    torch.testing.assert_close(with_branch, expected)


def raster_tiles(layout: TileLayout) -> list[list[int]]:
    return [[layout.prefix + token for token in tile] for tile in tiles_of(layout.grid, layout.tile)]


def test_a_zero_weight_leaves_only_the_sparse_branch() -> None:
    q, k, v, weight = make()
    layout, budget = TileLayout(GRID, TILE), Budget(keep_ratio=0.25)
    zero = torch.zeros_like(weight).requires_grad_()
    sparse = video_sparse_attention(q, k, v, layout, budget)
    out = video_sparse_attention(q, k, v, layout, budget, zero)
    assert torch.equal(out, sparse)
    (grad,) = torch.autograd.grad(out.sum(), zero)
    assert (grad != 0).any(), "a weight that starts at zero could not learn"


def test_text_has_no_compressed_branch_and_is_dense() -> None:
    layout = TileLayout(GRID, TILE, prefix=9, suffix=4)
    q, k, v, weight = make(tokens=layout.num_tokens)
    out = video_sparse_attention(q, k, v, layout, Budget(top_k=1), weight)
    text = [*range(9), *range(9 + S, 13 + S)]
    torch.testing.assert_close(out[:, text], dense(q, k, v)[:, text])


def test_permuting_batch_or_heads_permutes_the_result() -> None:
    q, k, v, weight = make(kv_heads=4)
    layout, budget = TileLayout(GRID, TILE), Budget(keep_ratio=0.25)
    out = video_sparse_attention(q, k, v, layout, budget, weight)
    order = torch.tensor([2, 0, 3, 1], device=DEVICE)
    by_head = video_sparse_attention(*(x[:, :, order] for x in (q, k, v)), layout, budget, weight[:, :, order])
    torch.testing.assert_close(by_head, out[:, :, order], rtol=1e-12, atol=1e-12)
    by_batch = video_sparse_attention(*(x.flip(0) for x in (q, k, v)), layout, budget, weight.flip(0))
    torch.testing.assert_close(by_batch, out.flip(0), rtol=1e-12, atol=1e-12)


def test_memory_layout_does_not_matter() -> None:
    leaves = make(dtype=torch.float32)
    layout, budget = TileLayout(GRID, TILE), Budget(keep_ratio=0.25)
    out = video_sparse_attention(*leaves[:3], layout, budget, leaves[3])
    for order in ((0, 2, 1, 3), (1, 0, 2, 3), (0, 1, 3, 2)):
        back = [order.index(i) for i in range(4)]
        moved = [x.permute(order).contiguous().permute(back) for x in leaves]
        assert torch.equal(video_sparse_attention(*moved[:3], layout, budget, moved[3]), out)


def test_same_input_same_bits() -> None:
    layout, budget = TileLayout(GRID, TILE), Budget(keep_ratio=0.25)
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        leaves = make(dtype=torch.float32)
        out = video_sparse_attention(*leaves[:3], layout, budget, leaves[3])
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_selector_of_ones_own() -> None:
    """Any callable is a selector; here one that keeps each tile to itself, with the tensors in block order."""
    seen = []

    def only_self(q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        seen.append((q, k))
        mask = torch.eye(layout.num_blocks, dtype=torch.bool, device=q.device)[None, None]
        return BlockPlan.from_block_mask(mask, layout.blocks, layout.blocks)

    q, k, v, weight = make()
    layout = TileLayout(GRID, TILE)
    for branch in (None, weight):
        out = video_sparse_attention(q, k, v, layout, Budget(top_k=1), branch, selector=only_self)
        base = (
            out
            if branch is None
            else out - (out - video_sparse_attention(q, k, v, layout, Budget(top_k=1), selector=only_self))
        )
        for tokens in tiles_of(GRID, TILE):
            torch.testing.assert_close(base[:, tokens], dense(q[:, tokens], k[:, tokens], v[:, tokens]))
    assert torch.equal(seen[0][0], layout.permute(q))
    assert torch.equal(seen[0][1], layout.permute(k))


def test_scale_reaches_both_branches() -> None:
    q, k, v, weight = make(batch=1)
    ours = video_sparse_attention(q, k, v, TileLayout(GRID, TILE), Budget(top_k=3), weight, scale=0.7)
    torch.testing.assert_close(ours, vsa_in_words(q, k, v, weight, 3, scale=0.7))


def test_top_p_budgets_use_the_scale_of_attention() -> None:
    """The plan is that of PooledTopK with the same scale."""
    q, k, v, _ = make()
    layout, budget = TileLayout(GRID, TILE), Budget(top_p=0.5)
    plans = []

    def spy(q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> BlockPlan:
        plans.append(PooledTopK(2.0)(q, k, layout, budget))
        return plans[-1]

    ours = video_sparse_attention(q, k, v, layout, budget, scale=2.0)
    assert torch.equal(ours, video_sparse_attention(q, k, v, layout, budget, selector=spy, scale=2.0))
    assert plans[0].density < 1


def test_a_weight_in_fp32_does_not_change_the_dtype() -> None:
    q, k, v, weight = make(dtype=torch.bfloat16)
    out = video_sparse_attention(q, k, v, TileLayout(GRID, TILE), Budget(top_k=3), weight.float())
    assert out.dtype == torch.bfloat16


def test_used_in_inference_first_and_trained_with_later() -> None:
    layout = TileLayout(GRID, TILE)
    leaves = make(dtype=torch.float32)
    with torch.inference_mode():
        inference = video_sparse_attention(*leaves[:3], layout, Budget(top_k=3), leaves[3])
    training = video_sparse_attention(*leaves[:3], layout, Budget(top_k=3), leaves[3])
    training.sum().backward()
    assert torch.equal(training, inference)


@pytest.mark.parametrize(
    "layout",
    [TileLayout(GRID, TILE), TileLayout(GRID, TILE, prefix=5, suffix=2)],
    ids=["video", "text"],
)
@pytest.mark.parametrize("warm", [True, False], ids=["warm", "fresh"])
def test_compiles_in_one_graph(layout: TileLayout, warm: bool) -> None:
    layout = TileLayout(layout.grid, layout.tile, layout.prefix, layout.suffix)
    leaves = make(tokens=layout.num_tokens, dtype=torch.float32)

    def f(q: Tensor, k: Tensor, v: Tensor, weight: Tensor) -> Tensor:
        return video_sparse_attention(q, k, v, layout, Budget(keep_ratio=0.25), weight)

    if warm:
        f(*leaves)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(*leaves)
    eager = f(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(
        torch.autograd.grad(compiled.square().sum(), leaves),
        torch.autograd.grad(eager.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_autocast_changes_nothing() -> None:
    leaves = make(dtype=torch.float32)
    layout = TileLayout(GRID, TILE)
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=enabled):
            out = video_sparse_attention(*leaves[:3], layout, Budget(top_k=3), leaves[3])
            results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, weight = make()
    layout, budget = TileLayout(GRID, TILE), Budget(top_k=3)
    with pytest.raises(ShapeError, match=r"q has 90 tokens, but the layout of grid \(3, 5, 7\) has 105 .*3x5x7 = 105"):
        video_sparse_attention(q, k, v, TileLayout((3, 5, 7), TILE), budget)
    with pytest.raises(ShapeError, match=r"dimension 2 of q \[2, 4, 90, 16\] has the 90 .* q\.transpose\(1, 2\)"):
        video_sparse_attention(*(x.transpose(1, 2) for x in (q, k, v)), layout, budget)
    with pytest.raises(ShapeError, match=r"k has 89 tokens"):
        video_sparse_attention(q, k[:, 1:], v[:, 1:], layout, budget)
    with pytest.raises(ShapeError, match=r"branch_weight must be .*\(2, 90, 4, 16\).* got \(2, 90, 2, 16\)"):
        video_sparse_attention(q, k, v, layout, budget, weight[:, :, :2])
    with pytest.raises(ShapeError, match=r"branch_weight must be .* like the output, got .* on meta"):
        video_sparse_attention(q, k, v, layout, budget, weight.to("meta"))
    with pytest.raises(ShapeError, match=r"branch_weight must be .* like the output, got 0\.5"):
        video_sparse_attention(q, k, v, layout, budget, 0.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match=r"branch_weight must have a floating dtype, got torch\.complex"):
        video_sparse_attention(q, k, v, layout, budget, torch.complex(weight, weight))
    with pytest.raises(ShapeError, match=r"scale must be a finite number, or None .*, got nan"):
        video_sparse_attention(q, k, v, layout, budget, scale=float("nan"))
    with pytest.raises(UnsupportedError, match=r"selector must be an object to call, such as PooledTopK.*got <class"):
        video_sparse_attention(q, k, v, layout, budget, selector=PooledTopK)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ShapeError, match="the 4 heads of q must be a multiple of the 3 heads of k"):
        video_sparse_attention(q, *(x[:, :, :1].expand(2, S, 3, 16) for x in (k, v)), layout, budget)
    with pytest.raises(BudgetError, match="but the budget is 1 of 12 blocks"):
        video_sparse_attention(q, k, v, layout, Budget(top_k=1, keep_first=2))
    with pytest.raises(UnsupportedError, match="'flex' cannot"):
        video_sparse_attention(q, k, v, layout, budget, backend="flex")


def test_torch_func_is_refused() -> None:
    q, k, v, weight = make()
    layout, budget = TileLayout(GRID, TILE), Budget(top_k=3)

    def total(q: Tensor) -> Tensor:
        return video_sparse_attention(q, k, v, layout, budget, weight).sum()

    refused = pytest.raises(UnsupportedError, match=r"cannot see through video sparse attention; use .*backward")
    with refused:
        torch.func.grad(total)(q)
    with refused:
        torch.func.jvp(total, (q,), (q,))
    with refused:
        torch.func.vmap(total)(q[None])


@pytest.mark.parametrize("layout", [GRID, None, TileLayout])
def test_a_layout_is_a_tile_layout(layout: Any) -> None:
    q, k, v, weight = make()
    refused = pytest.raises(ShapeError, match=r"layout must be a TileLayout, got .* TileLayout\.fit\(\(T, H, W\)\)")
    released = ReleasedVSA(0.5)
    with refused:
        video_sparse_attention(q, k, v, layout, Budget(top_k=3))
    with refused:
        PooledTopK()(q, k, layout, Budget(top_k=3))
    with refused:
        released(q, q, layout, released.budget)
    with refused:
        released_attention(q, q, q, q, layout, released)


def test_meta_tensors_give_shapes() -> None:
    inputs = [x.detach().to("meta").requires_grad_() for x in make(dtype=torch.float32)]
    out = video_sparse_attention(*inputs[:3], TileLayout(GRID, TILE), Budget(keep_ratio=0.5), inputs[3])
    assert (out.device.type, out.shape) == ("meta", inputs[0].shape)
    assert all(grad.is_meta for grad in torch.autograd.grad(out.sum(), inputs))
