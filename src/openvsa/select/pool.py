"""From tokens to one summary vector per block, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openvsa.errors import ShapeError
from openvsa.layout import BlockOffsets, TileLayout
from openvsa.layout.device import has_kernels
from openvsa.layout.reorder import all_to_blocks, from_blocks, lazy_product, to_blocks

__all__ = ["permute_pool", "permute_pool_all", "pool_mean", "spread", "unpermute_add", "weighted_product"]


def permute_pool(x: Tensor, layout: TileLayout, blocks: BlockOffsets) -> tuple[Tensor, Tensor]:
    """`layout.permute(x)` and its `pool_mean` over `blocks` (those of the layout's keys or queries), for x [B, S, H, D]
    in raster order: block order [B, S, H, D] and means [B, N, H, D]. On a GPU both come from one pass over x, and so
    does their gradient.

    Raises:
        ShapeError: x is not [B, S, H, D] with the S of the layout.
    """
    if x.dim() != 4 or not has_kernels(x):
        moved = layout.permute(x)
        return moved, pool_mean(moved, blocks)
    layout.check("x", x.shape[1])
    moved, means = to_blocks(x, layout.index_on(x.device), blocks.on(x.device), blocks.max_len, True, True)
    return moved, means.transpose(1, 2)


def permute_pool_all(
    q: Tensor, k: Tensor, v: Tensor, layout: TileLayout, *, pool: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor] | None]:
    """q [B, S, H, D], k and v [B, S, Hkv, D] in block order and, if asked for, the means of their blocks: as
    `permute_pool` for each, q over the query blocks. Together they are one launch and one node for autograd.

    Raises:
        ShapeError: they do not have the S of the layout.
    """
    if layout.q_blocks is layout.blocks and has_kernels(q, k, v):
        for name, x in (("q", q), ("k", k), ("v", v)):
            layout.check(name, x.shape[1])
        blocks = layout.blocks
        q, k, v, *means = all_to_blocks(q, k, v, layout.index_on(q.device), blocks.on(q.device), blocks.max_len, pool)
        return (q, k, v), (
            means[0].transpose(1, 2),
            means[1].transpose(1, 2),
            means[2].transpose(1, 2),
        ) if pool else None
    if not pool:
        return (layout.permute(q), layout.permute(k), layout.permute(v)), None
    q, q_means = permute_pool(q, layout, layout.q_blocks)
    k, k_means = permute_pool(k, layout, layout.blocks)
    v, v_means = permute_pool(v, layout, layout.blocks)
    return (q, k, v), (q_means, k_means, v_means)


def weighted_product(weight: Tensor, rows: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor | None:
    """What `unpermute_add` wants where gradients are, made before the attention whose result it gets: the gradient of
    weight then is made after that of attention, and the memory of both is not needed at a time. Nothing on a CPU."""
    if not (torch.is_grad_enabled() and (weight.requires_grad or rows.requires_grad) and has_kernels(weight, rows)):
        return None
    blocks, device = layout.q_blocks, weight.device
    first = layout.q_tile_blocks.start
    return lazy_product(weight, rows, layout.index_on(device), blocks.on(device), blocks.max_len, first, dtype)


def unpermute_add(
    x: Tensor, layout: TileLayout, weight: Tensor, rows: Tensor, promised: Tensor | None = None
) -> Tensor:
    """`layout.unpermute(x)` plus weight times the row of each token's query block; text tokens have none.

    x [B, S, H, D] in block order, weight [B, S, H, D] in raster order, rows [B, n, H, D] of the n query blocks that are
    tiles; promised: their `weighted_product`, made by now if it was not before. Returns raster order in the dtype of x.
    On a GPU it is one pass that adds in fp32 and rounds once.
    """
    tiles, blocks = layout.q_tile_blocks, layout.q_blocks
    if has_kernels(x, weight, rows):
        promised = weighted_product(weight, rows, layout, x.dtype) if promised is None else promised
        index = layout.index_on(x.device)
        return from_blocks(
            x, promised, rows.detach(), weight.detach(), index, blocks.on(x.device), blocks.max_len, tiles.start
        )
    text_before, text_after = tiles.start, blocks.num_blocks - tiles.stop
    rows = torch.nn.functional.pad(rows.to(x.dtype), (0, 0, 0, 0, text_before, text_after))
    added = layout.permute(weight) * spread(rows, blocks)
    return layout.unpermute((x + added).to(x.dtype))


def pool_mean(x: Tensor, blocks: BlockOffsets) -> Tensor:
    """The mean of each block's tokens, however many it has: x [B, S, H, D] in block order to [B, N, H, D].

    Computed and returned in fp32 (fp64 for fp64 input), because rounding the summaries makes ties that decide which
    blocks are kept. Differentiable, deterministic.

    Raises:
        ShapeError: x does not have the tokens that `blocks` describe.
    """
    _check_blocks(x, blocks)
    if x.dim() != 4 or x.shape[1] != blocks.num_tokens:
        raise ShapeError(f"x must be [B, {blocks.num_tokens}, H, D] for {blocks}, got shape {tuple(x.shape)}")
    if has_kernels(x):
        return to_blocks(x, None, blocks.on(x.device), blocks.max_len, False, True)[1].transpose(1, 2)
    x = x if x.dtype == torch.float64 else x.float()
    size = blocks.uniform_len
    if size is not None and blocks.num_tokens % size == 0:
        return x.unflatten(1, (blocks.num_blocks, size)).mean(2)
    return _BlockSum.apply(x, *_tables(blocks, x.device)) / blocks.lens_on(x.device)[:, None, None]


def spread(x: Tensor, blocks: BlockOffsets) -> Tensor:
    """Each block's row to all of its tokens: x [B, N, H, D] to [B, S, H, D] in block order. Differentiable,
    deterministic.

    Raises:
        ShapeError: x does not have a row for each of `blocks`.
    """
    _check_blocks(x, blocks)
    if x.dim() != 4 or x.shape[1] != blocks.num_blocks:
        raise ShapeError(f"x must be [B, {blocks.num_blocks}, H, D] for {blocks}, got shape {tuple(x.shape)}")
    return _Spread.apply(x, *_tables(blocks, x.device))


def _check_blocks(x: Tensor, blocks: BlockOffsets) -> None:
    if not isinstance(x, Tensor) or not isinstance(blocks, BlockOffsets):
        raise ShapeError(
            f"wanted: a tensor and the BlockOffsets of its tokens, such as layout.blocks; got {type(x).__name__} and "
            f"{type(blocks).__name__}"
        )


def _tables(blocks: BlockOffsets, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return blocks.padded_slots(device), blocks.lens_on(device), blocks.block_of_token(device)


# The two are each other's gradient. Autograd's own would be scatter-adds, whose order on a GPU is not fixed.
class _BlockSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, lens: Tensor, block_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(slots, lens, block_of_token)
        filled = torch.arange(slots.shape[1], device=x.device) < lens[:, None]
        found = x.index_select(1, slots.flatten()).unflatten(1, slots.shape)
        return torch.where(filled[..., None, None], found, 0.0).sum(2)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Spread.apply(grads[0], *ctx.saved_tensors), None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slots: Tensor, lens: Tensor, block_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(slots, lens, block_of_token)
        return x.index_select(1, block_of_token)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _BlockSum.apply(grads[0], *ctx.saved_tensors), None, None, None
