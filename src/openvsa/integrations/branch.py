"""The compressed branch of Wan models that were trained with VSA: its linear maps, and what they do in a forward.

The linear map of a block is the submodule `to_gate_compress` of its self-attention, beside to_q, so it moves, trains
and is saved with the model. `openvsa.sparsify` uses it wherever it is there.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from openvsa.config import Budget
from openvsa.errors import BudgetError, OpenVSAError, ShapeError, UnsupportedError, require
from openvsa.integrations.checkpoint import BRANCH, read_branch
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.intercept import SparseProcessor
from openvsa.layout import TileLayout
from openvsa.nn.functional import compressed_attention
from openvsa.nn.released import released_attention
from openvsa.ops import block_sparse_attention
from openvsa.plan import BlockPlan
from openvsa.select import PooledTopK, ReleasedVSA, Selector, pool_mean, select_by_head
from openvsa.select.pool import spread

__all__ = [
    "LearnedBranch",
    "add_branch",
    "check_settings",
    "load_branch",
    "pipeline_has_branch",
    "remove_branch",
    "warn_without_branch",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def add_branch(transformer: Any) -> None:
    """Give every self-attention of a Wan transformer a branch weight that is zero: the model computes what it did.

    Do so before `sparsify`, and before offloading, FSDP or torch.compile.

    Raises:
        UnsupportedError: it is no WanTransformer3DModel.
        OpenVSAError: it has branch weights already, or is attached, or its weights are elsewhere (offloaded).
    """
    for name, attn in _attentions(transformer):
        if hasattr(attn, BRANCH):
            raise OpenVSAError(f"{name} has branch weights already; use them, or remove_branch first")
    for name, attn in _attentions(transformer):
        like: Tensor = attn.to_q.weight
        if like.dtype not in _DTYPES or like.device.type == "meta":
            raise OpenVSAError(
                f"{name}.to_q.weight is {like.dtype} on {like.device}; add branch weights to a model in one of "
                f"{', '.join(map(str, _DTYPES))}, before it is quantized, cast layer by layer, or offloaded"
            )
        linear = nn.Linear(attn.to_q.in_features, attn.to_q.out_features, device=like.device, dtype=like.dtype)
        for parameter in linear.parameters():
            nn.init.zeros_(parameter)
        attn.add_module(BRANCH, linear)


def load_branch(transformer: Any, checkpoint: str | os.PathLike[str]) -> None:
    """Give a Wan transformer the branch weights of a VSA checkpoint, which Diffusers leaves out when it loads it.

    Args:
        transformer: the model that Diffusers made from the same checkpoint.
        checkpoint: a safetensors file, or the folder of the transformer, in any layout that
            `openvsa.integrations.checkpoint.rename` knows.

    Raises:
        UnsupportedError: the transformer is no WanTransformer3DModel.
        OpenVSAError: the checkpoint has no branch weights, or cannot be read; or as in `add_branch`.
        ShapeError: the branch weights do not fit this transformer.
    """
    found = read_branch(checkpoint)
    layers = dict(_attentions(transformer))
    if not found:
        raise OpenVSAError(f"{checkpoint} has no branch weights ({BRANCH}); for a dense checkpoint use add_branch")
    expected = {
        f"{name}.{BRANCH}.{part}": tuple(getattr(attn.to_q, part).shape)
        for name, attn in layers.items()
        for part in ("weight", "bias")
    }
    got = {name: tuple(tensor.shape) for name, tensor in found.items()}
    if wrong := sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)):
        name = wrong[0]
        raise ShapeError(
            f"{len(wrong)} branch weights of {checkpoint} do not fit the transformer, such as {name}: shape "
            f"{got.get(name)} in the checkpoint, {expected.get(name)} in the model"
        )
    add_branch(transformer)
    with torch.no_grad():
        for name, attn in layers.items():
            for part in ("weight", "bias"):
                getattr(getattr(attn, BRANCH), part).copy_(found[f"{name}.{BRANCH}.{part}"])


def remove_branch(transformer: Any) -> None:
    """Take the branch weights off again. Harmless where there are none.

    Raises:
        UnsupportedError: it is no WanTransformer3DModel.
        OpenVSAError: the model is attached.
    """
    for _, attn in _attentions(transformer):
        if hasattr(attn, BRANCH):
            delattr(attn, BRANCH)


def _attentions(transformer: Any) -> list[tuple[str, Any]]:
    wan = require("diffusers.models.transformers.transformer_wan", extra="diffusers")
    if not isinstance(transformer, wan.WanTransformer3DModel):
        raise UnsupportedError(
            f"branch weights are for WanTransformer3DModel, got {type(transformer).__name__}; of a pipeline give the "
            "transformer"
        )
    layers = [(f"blocks.{index}.attn1", block.attn1) for index, block in enumerate(transformer.blocks)]
    for name, attn in layers:
        if isinstance(attn.processor, SparseProcessor):
            raise OpenVSAError(f"{name} is attached: detach its handle first, and sparsify again afterwards")
    return layers


def pipeline_has_branch(pipe: Any) -> bool:
    """Whether the transformer of a pipeline, or one of its two, has branch weights."""
    found = [getattr(pipe, name, None) for name in ("transformer", "transformer_2")]
    return any(hasattr(module, BRANCH) for one in found if one is not None for module in one.modules())


def check_settings(config: SparsityConfig, branch: bool) -> None:
    """Refuse settings that a model with a compressed branch (`branch`), or the selector ReleasedVSA, cannot have.

    Raises:
        UnsupportedError: plans would be reused, or tiles choose together, with a compressed branch.
        BudgetError: the selector decides by itself how many tiles are kept, and the settings say otherwise.
    """
    if branch and config.reuse_steps > 1:
        raise UnsupportedError("plans cannot be reused with a compressed branch; leave reuse_steps at 1")
    if config.q_tiles and (branch or isinstance(config.selector, ReleasedVSA)):
        raise UnsupportedError(
            f"a compressed branch has one query block for each tile; leave out q_tiles, got {config.q_tiles}"
        )
    if isinstance(config.selector, ReleasedVSA):
        config.selector.check(config.base)
        if config.steps or config.layers:
            raise BudgetError(f"{config.selector} keeps alike in all steps and layers; leave out steps and layers")


def warn_without_branch(config: SparsityConfig, layers: list[nn.Module]) -> None:
    """Tell who asks for the rule of the released weights that a model with these self-attentions has no branch."""
    if isinstance(config.selector, ReleasedVSA) and not any(hasattr(attn, BRANCH) for attn in layers):
        # No word of the sparsity: Python shows a text once, and an audit sparsifies with several that nobody asked for.
        warnings.warn(
            "ReleasedVSA is for weights that were trained with VSA, and this model has no branch weights "
            f"({BRANCH}): only the sparse part is computed. Diffusers leaves them out when it loads a model; "
            "openvsa.integrations.branch.load_branch puts them in, before sparsify",
            stacklevel=2,
        )


class LearnedBranch:
    """Sparse branch + branch weight * compressed branch, in layers that have the linear map. See `sparsify`."""

    @classmethod
    def of(cls, layers: list[nn.Module]) -> LearnedBranch | None:
        """The branch of a model with these self-attentions; None if none has the linear map.

        Raises:
            OpenVSAError: some have it and some do not.
        """
        having = [hasattr(attn, BRANCH) for attn in layers]
        if any(having) and not all(having):
            raise OpenVSAError(
                f"{sum(having)} of {len(having)} self-attentions have branch weights ({BRANCH}); all or none must: see "
                "load_branch and remove_branch"
            )
        return cls() if any(having) else None

    def weight(self, attn: Any, hidden_states: Tensor) -> Tensor | None:
        """The branch weight [B, S, H, D] of hidden states [B, S, C], in their token order; None without linear map."""
        linear = getattr(attn, BRANCH, None)  # of two transformers one may have branch weights and the other none
        return None if linear is None else linear(hidden_states).unflatten(-1, (attn.heads, -1))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        layout: TileLayout,
        budget: Budget | tuple[Budget, ...],
        selector: Selector,
        *,
        scale: float | None,
        backend: str,
    ) -> tuple[Tensor, BlockPlan]:
        """Both branches together: [B, S, H, D], and the plan of the sparse one. All tensors are in block order.

        With the selector ReleasedVSA in the order and with the rounding of the authors of VSA; with any other as in
        `openvsa.video_sparse_attention`.
        """
        if isinstance(selector, ReleasedVSA):
            if scale not in (None, q.shape[-1] ** -0.5):
                raise UnsupportedError(f"the released VSA weights have the scale 1 / sqrt(head_dim), got {scale}")
            return released_attention(q, k, v, weight.to(q.dtype), layout, selector, backend=backend)
        q_means, k_means, v_means = (pool_mean(x, layout.blocks) for x in (q, k, v))
        if type(selector) is PooledTopK and isinstance(budget, Budget):
            plan = selector.plan(q_means, k_means, layout, budget)
        else:
            plan = select_by_head(selector, q, k, layout, budget)
        sparse = block_sparse_attention(q, k, v, plan, scale=scale, backend=backend)
        compressed = compressed_attention(q_means, k_means, v_means, q.shape[-1] ** -0.5 if scale is None else scale)
        return (sparse + weight * spread(compressed.to(q.dtype), layout.blocks)).to(q.dtype), plan
