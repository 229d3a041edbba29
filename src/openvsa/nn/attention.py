"""Video sparse attention as a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from openvsa.config import Budget
from openvsa.errors import BudgetError, ShapeError
from openvsa.layout import TileLayout
from openvsa.layout.device import as_device
from openvsa.layout.shelf import kept_layout
from openvsa.nn.functional import video_sparse_attention
from openvsa.select import Selector
from openvsa.torch_op import check_not_traced

__all__ = ["VideoSparseAttention"]

Rope = Callable[[Tensor], Tensor]


class VideoSparseAttention(nn.Module):
    """Multi-head self-attention over a video lattice that computes only the tiles that matter.

    Projections, QK-norm, RoPE, `video_sparse_attention`, output projection. `budget`, `density`, `tile`, `q_tiles`,
    `selector` and `backend` are plain settings that may be changed at any time; they hold no state and no weights.

    Args:
        dim: channels of the hidden states.
        num_heads: query heads; head_dim is dim // num_heads.
        tile: tokens of a tile along each axis of the lattice, or "fit" for the tile that leaves the fewest blocks.
        budget: how many key tiles each query tile keeps (default: one eighth).
        q_tiles: tiles of a query block along each axis, as in TileLayout; () means one.
        num_kv_heads: key and value heads; None means num_heads.
        branch: whether there is a compressed branch. Its weight is a linear map of the hidden states, initialised
            to zero, so that a dense model that adopts this module starts out unchanged at density 1.
        qk_norm: makes the norms of q and k from head_dim; None leaves them out.
        selector: how tiles are chosen; None means the rule of the paper.
        bias: whether the projections have biases.
        backend: as in `openvsa.block_sparse_attention`.

    Raises:
        ShapeError: dim is not a positive multiple of num_heads, or num_heads of num_kv_heads.
        BudgetError: budget is no Budget.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        tile: tuple[int, ...] | str = (4, 4, 4),
        budget: Budget | None = None,
        *,
        q_tiles: tuple[int, ...] = (),
        num_kv_heads: int | None = None,
        branch: bool = True,
        qk_norm: Callable[[int], nn.Module] | None = nn.RMSNorm,
        selector: Selector | None = None,
        bias: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        sizes = dim, num_heads, num_kv_heads
        if not all(isinstance(n, int) and n > 0 for n in sizes) or dim % num_heads or num_heads % num_kv_heads:
            raise ShapeError(
                f"dim must be a positive multiple of num_heads and num_heads of num_kv_heads, got dim={dim!r}, "
                f"num_heads={num_heads!r}, num_kv_heads={num_kv_heads!r}"
            )
        if budget is not None and not isinstance(budget, Budget):
            raise BudgetError(f"budget must be a Budget such as Budget(keep_ratio=0.125), got {budget!r}")
        self.dim = dim
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, dim // num_heads
        self.tile, self.q_tiles = tile, q_tiles
        self.budget = budget or Budget(keep_ratio=0.125)
        self.selector, self.backend = selector, backend
        kv_dim = self.head_dim * num_kv_heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(dim, kv_dim, bias=bias)
        self.to_v = nn.Linear(dim, kv_dim, bias=bias)
        self.to_out = nn.Linear(dim, dim, bias=bias)
        self.norm_q = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.norm_k = qk_norm(self.head_dim) if qk_norm else nn.Identity()
        self.to_branch_weight = nn.Linear(dim, dim, bias=bias) if branch else None
        if self.to_branch_weight is not None:
            for parameter in self.to_branch_weight.parameters():
                nn.init.zeros_(parameter)

    @property
    def density(self) -> float | None:
        """The share of key tiles kept, if the budget is a share; setting it replaces the budget."""
        return self.budget.keep_ratio

    @density.setter
    def density(self, value: float) -> None:
        self.budget = Budget(keep_ratio=value)

    def layout(
        self, grid: tuple[int, ...], prefix: int = 0, suffix: int = 0, device: torch.device | str = "cpu"
    ) -> TileLayout:
        """The layout this module uses for a lattice, its index tensors copied to `device` ahead of use."""
        if self.tile is None or (isinstance(self.tile, str) and self.tile != "fit"):
            raise ShapeError(f"tile must be a tuple of sides or 'fit', got {self.tile!r}")
        tile = None if isinstance(self.tile, str) else self.tile
        return kept_layout(grid, tile, self.q_tiles, prefix, suffix, as_device(device))

    def forward(
        self, x: Tensor, grid: tuple[int, ...], rope: Rope | None = None, *, prefix: int = 0, suffix: int = 0
    ) -> Tensor:
        """Attend over hidden states.

        Args:
            x: [B, S, dim] in raster order, with S = prefix + prod(grid) + suffix.
            grid: the lattice, (T, H, W) for video.
            rope: applied to q [B, S, H, D] and to k [B, S, Hkv, D], in raster order, after the norms.
            prefix, suffix: text tokens before and after the lattice.

        Returns:
            [B, S, dim].

        Raises:
            ShapeError: x is not [B, S, dim], or S does not match the lattice.
        """
        check_not_traced("video sparse attention")
        if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[2] != self.dim:
            got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ShapeError(f"x must be hidden states [B, S, dim] with dim {self.dim}, got {got}")
        layout = self.layout(grid, prefix, suffix, x.device)
        layout.check("x", x.shape[1])
        q = self.norm_q(self.to_q(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.norm_k(self.to_k(x).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v = self.to_v(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if rope is not None:
            q, k = rope(q), rope(k)
        # Norms and rotary embeddings may leave in fp32, under autocast in particular.
        q, k = q.to(v.dtype), k.to(v.dtype)
        weight = None
        if self.to_branch_weight is not None:
            weight = self.to_branch_weight(x).unflatten(-1, (self.num_heads, self.head_dim))
        out = video_sparse_attention(q, k, v, layout, self.budget, weight, selector=self.selector, backend=self.backend)
        return self.to_out(out.flatten(2))

    def extra_repr(self) -> str:
        """Heads, tile, budget and branch."""
        heads = f"{self.num_heads} heads" + (
            f" over {self.num_kv_heads} key heads" if self.num_kv_heads != self.num_heads else ""
        )
        kept = {name: value for name, value in vars(self.budget).items() if value not in (None, False, 0)}
        keeps = ", ".join(f"{name}={value}" for name, value in kept.items() if (name, value) != ("min_blocks", 1))
        branch = "with" if self.to_branch_weight is not None else "without"
        tiles = f"tile={self.tile}" + (f", q_tiles={self.q_tiles}" if self.q_tiles else "")
        return (
            f"{heads} of {self.head_dim}, {tiles}, keeps {keeps}, {branch} compressed branch, backend={self.backend!r}"
        )
