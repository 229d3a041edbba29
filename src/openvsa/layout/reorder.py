"""Reordering tokens by blocks, as torch.library sees it: operators over the kernels, with fakes and autograd.

For tensors that `has_kernels` accepts. An operator cannot return None: what was not asked for has no elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from openvsa.torch_op import torch_op

__all__ = ["all_to_blocks", "from_blocks", "lazy_product", "to_blocks", "two_means"]


def _to_blocks(
    x: Tensor, index: Tensor | None, offsets: Tensor, max_len: int, write: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    """Tokens x [B, S, H, D] in block order (if `write`) and the fp32 means of the blocks [B, H, N, D] (if `mean`).

    index: int64 [S], the token at each place; None if x is in block order. offsets: int32 [N + 1].
    """
    from openvsa.layout import kernels

    blocks, means = kernels.gather([x], index, offsets, max_len, write=write, mean=mean)
    return blocks[0] if write else x.new_empty(0), means[0] if mean else x.new_empty(0, dtype=torch.float32)


def _fake_to_blocks(
    x: Tensor, index: Tensor | None, offsets: Tensor, max_len: int, write: bool, mean: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape if write else (0,)), _fake_means(x, offsets, mean)


def _fake_means(x: Tensor, offsets: Tensor, mean: bool) -> Tensor:
    batch, _, heads, dim = x.shape
    return x.new_empty((batch, heads, offsets.shape[0] - 1, dim) if mean else (0,), dtype=torch.float32)


def _to_blocks_gradient(
    grad_blocks: Tensor | None,
    grad_means: Tensor | None,
    index: Tensor | None,
    offsets: Tensor,
    max_len: int,
    seq: int,
    dtype: torch.dtype,
) -> Tensor:
    from openvsa.layout import kernels

    blocks = None if grad_blocks is None else [grad_blocks]
    rows = None if grad_means is None else [grad_means.transpose(1, 2)]
    return kernels.scatter(blocks, index, offsets, max_len, seq=seq, dtype=dtype, rows=rows)[0]


def _fake_to_blocks_gradient(
    grad_blocks: Tensor | None,
    grad_means: Tensor | None,
    index: Tensor | None,
    offsets: Tensor,
    max_len: int,
    seq: int,
    dtype: torch.dtype,
) -> Tensor:
    if grad_blocks is not None:
        return grad_blocks.new_empty(grad_blocks.shape, dtype=dtype)
    assert grad_means is not None
    batch, heads, _, dim = grad_means.shape
    return grad_means.new_empty((batch, seq, heads, dim), dtype=dtype)


_to_blocks_backward = torch_op("to_blocks_backward", _to_blocks_gradient, _fake_to_blocks_gradient)


def _save_to(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, index, offsets, max_len, write, mean = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(offsets, *(() if index is None else (index,)))
    ctx.settings = max_len, x.shape[1], x.dtype
    ctx.asked = write, mean


def _differentiate_to(ctx: Any, grad_blocks: Tensor | None, grad_means: Tensor | None) -> tuple[Any, ...]:
    offsets, *index = ctx.saved_tensors
    grad_blocks, grad_means = (
        g if asked else None for g, asked in zip((grad_blocks, grad_means), ctx.asked, strict=True)
    )
    grad = None
    if grad_blocks is not None or grad_means is not None:
        grad = _to_blocks_backward(grad_blocks, grad_means, index[0] if index else None, offsets, *ctx.settings)
    return grad, *(None,) * 5


to_blocks = torch_op("to_blocks", _to_blocks, _fake_to_blocks, save=_save_to, differentiate=_differentiate_to)


def _all_to_blocks(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, offsets: Tensor, max_len: int, mean: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`to_blocks` of q [B, S, H, D], k and v [B, S, Hkv, D], whose blocks are the same: the three in block order, then
    their means (if `mean`). In one launch where they have one shape."""
    from openvsa.layout import kernels

    blocks, means = kernels.gather([q, k, v], index, offsets, max_len, write=True, mean=mean)
    means = means or [q.new_empty(0, dtype=torch.float32) for _ in range(3)]
    return blocks[0], blocks[1], blocks[2], means[0], means[1], means[2]


def _fake_all_to_blocks(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, offsets: Tensor, max_len: int, mean: bool
) -> tuple[Tensor, ...]:
    return *(x.new_empty(x.shape) for x in (q, k, v)), *(_fake_means(x, offsets, mean) for x in (q, k, v))


def _all_to_blocks_gradient(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_q_means: Tensor | None,
    grad_k_means: Tensor | None,
    grad_v_means: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    max_len: int,
) -> tuple[Tensor, Tensor, Tensor]:
    from openvsa.layout import kernels

    blocks, means = [grad_q, grad_k, grad_v], [grad_q_means, grad_k_means, grad_v_means]
    groups = [slice(0, 3)] if len({x is None for x in means}) == 1 else [slice(at, at + 1) for at in range(3)]
    found = []
    for group in groups:
        rows = [x.transpose(1, 2) for x in means[group] if x is not None]
        found += kernels.scatter(
            blocks[group], index, offsets, max_len, seq=grad_q.shape[1], dtype=grad_q.dtype, rows=rows
        )
    return found[0], found[1], found[2]


def _fake_all_to_blocks_gradient(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape), grad_v.new_empty(grad_v.shape)


_all_to_blocks_backward = torch_op("all_to_blocks_backward", _all_to_blocks_gradient, _fake_all_to_blocks_gradient)


def _save_all_to(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, index, offsets, max_len, mean = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(index, offsets)
    ctx.settings = max_len, mean
    ctx.like = [(x.shape, x.dtype, x.device) for x in tensors]


def _differentiate_all_to(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    index, offsets = ctx.saved_tensors
    max_len, mean = ctx.settings
    blocks = [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip(grads, ctx.like, strict=False)
    ]
    means = grads[3:] if mean else (None, None, None)
    return *_all_to_blocks_backward(*blocks, *means, index, offsets, max_len), *(None,) * 4


all_to_blocks = torch_op(
    "all_to_blocks", _all_to_blocks, _fake_all_to_blocks, save=_save_all_to, differentiate=_differentiate_all_to
)


def _two_means(q: Tensor, k: Tensor, offsets: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    """The fp32 means [B, H, N, D] of the blocks of q [B, S, H, D] and k [B, S, Hkv, D], which are in block order.
    Without gradient: it is for choosing blocks."""
    from openvsa.layout import kernels

    _, (q_means, k_means) = kernels.gather([q, k], None, offsets, max_len, write=False, mean=True)
    return q_means, k_means


def _fake_two_means(q: Tensor, k: Tensor, offsets: Tensor, max_len: int) -> tuple[Tensor, Tensor]:
    return _fake_means(q, offsets, True), _fake_means(k, offsets, True)


two_means = torch_op("two_means", _two_means, _fake_two_means)


def _product(
    weight: Tensor, rows: Tensor, index: Tensor, offsets: Tensor, max_len: int, first_row: int, dtype: torch.dtype
) -> Tensor:
    """What stands for weight [B, S, H, D] times the row of each token's block until `from_blocks` adds it: a tensor of
    that shape and `dtype` without memory. Its gradient is that of the product.

    rows: fp32 [B, n, H, D], those of the blocks from `first_row` on. Autograd goes backwards through nodes in the
    reverse order of their making. Made before attention, this one waits with the gradient of weight, which is as large
    as that of q, until attention has given back the tensors it keeps.
    """
    return torch.empty(1, dtype=dtype, device=weight.device).expand(weight.shape)


def _fake_product(
    weight: Tensor, rows: Tensor, index: Tensor, offsets: Tensor, max_len: int, first_row: int, dtype: torch.dtype
) -> Tensor:
    return weight.new_empty(1, dtype=dtype).expand(weight.shape)


def _product_gradient(
    grad: Tensor, weight: Tensor, rows: Tensor, index: Tensor, offsets: Tensor, max_len: int, first_row: int
) -> tuple[Tensor, Tensor]:
    """Gradients of rows, as [B, H, n, D], and of weight."""
    from openvsa.layout import kernels

    return kernels.weighted_sums(grad, index, offsets, max_len, weight, rows, first_row)


def _fake_product_gradient(grad: Tensor, weight: Tensor, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, count, heads, dim = rows.shape
    return rows.new_empty((batch, heads, count, dim), dtype=torch.float32), weight.new_empty(weight.shape)


_lazy_backward = torch_op("lazy_product_backward", _product_gradient, _fake_product_gradient)


def _save_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, rows, index, offsets, max_len, first_row, _ = inputs
    ctx.save_for_backward(weight, rows, index, offsets)
    ctx.settings = max_len, first_row


def _differentiate_product(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    row_grads, weight_grad = _lazy_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return weight_grad, row_grads.transpose(1, 2), *(None,) * 5


lazy_product = torch_op(
    "lazy_product", _product, _fake_product, save=_save_product, differentiate=_differentiate_product
)


def _from_blocks(
    blocks: Tensor,
    product: Tensor | None,
    rows: Tensor | None,
    weight: Tensor | None,
    index: Tensor,
    offsets: Tensor,
    max_len: int,
    first_row: int,
) -> Tensor:
    """Tokens blocks [B, S, H, D] back where they belong, plus (if given) weight times the row of their block.

    rows: fp32 [B, n, H, D], those of the blocks from `first_row` on; weight: [B, S, H, D] in the order of the result.
    They get no gradient here: `product` does, which stands for them. Everything is added in fp32 and rounded once.
    index, offsets: as for `to_blocks`.
    """
    from openvsa.layout import kernels

    return kernels.scatter(
        [blocks], index, offsets, max_len, seq=blocks.shape[1], dtype=blocks.dtype,
        rows=None if rows is None else [rows], weight=weight, first_row=first_row,
    )[0]  # fmt: skip


def _fake_from_blocks(blocks: Tensor, *_: Any) -> Tensor:
    return blocks.new_empty(blocks.shape)


def _save_from(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, index, offsets, max_len, first_row = inputs
    ctx.save_for_backward(index, offsets)
    ctx.max_len = max_len


def _differentiate_from(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    index, offsets = ctx.saved_tensors
    grad_blocks = to_blocks(grad, index, offsets, ctx.max_len, True, False)[0]
    return grad_blocks, grad if ctx.needs_input_grad[1] else None, *(None,) * 6


from_blocks = torch_op(
    "from_blocks", _from_blocks, _fake_from_blocks, save=_save_from, differentiate=_differentiate_from
)
