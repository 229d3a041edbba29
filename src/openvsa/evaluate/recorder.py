"""Where attention looked: the kept tiles and the pooled attention between tiles, small enough for a web page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, ShapeError
from openvsa.integrations.report import AttentionEvent
from openvsa.layout import TileLayout
from openvsa.select.pool import pool_mean

__all__ = ["AttentionRecord", "AttentionRecorder", "TileAttention", "evenly", "pack_bits", "tile_attention"]

PROBABILITY_BITS = 16
"""Probabilities below 2^-16 are stored as 0."""


@dataclass(frozen=True, eq=False)
class TileAttention:
    """One attention call, batch element 0. N is the number of blocks, text blocks included.

    kept: uint8 [H, N, ceil(N / 8)], bit j % 8 of byte j // 8 is set when the query block reads key block j.
    probability: uint8 [H, N, N], the pooled attention p as round(255 (1 + log2(p) / 16)), 0 for p <= 2^-16.
    recall: uint8 [H, N], the share of the pooled attention of a query block that falls on its kept blocks, times 255.
    """

    kept: Tensor
    probability: Tensor
    recall: Tensor

    @property
    def num_bytes(self) -> int:
        return self.kept.numel() + self.probability.numel() + self.recall.numel()


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """What a recorder saw.

    heads: the heads that are stored, by their numbers in the model. steps: denoising step -> timestep. layers: layer ->
    name. calls: (step, layer) -> its tiles. left_out: calls of the chosen steps and layers that were not stored because
    the record was full.
    """

    layout: TileLayout
    heads: tuple[int, ...]
    steps: dict[int, float]
    layers: dict[int, str]
    calls: dict[tuple[int, int], TileAttention]
    left_out: int

    @property
    def num_heads(self) -> int:
        """How many heads are stored."""
        return len(self.heads)

    def mean_recall(self, layer: int) -> float:
        """Recall of the pooled attention of one layer, mean over the recorded steps, heads and query blocks."""
        recalls = [call.recall.float().mean() for (_, at), call in self.calls.items() if at == layer]
        return float(torch.stack(recalls).mean()) / 255


class AttentionRecorder:
    """Stores the kept tiles and the pooled attention of the chosen denoising steps: `handle.on_attention(recorder)`.

    Within a step the first call of a layer is stored (a pipeline with guidance calls each layer more than once). The
    record holds at most `max_bytes`; calls beyond that are counted, not stored. A large model is recorded in part:
    `layers` are the layers to store, None all of them, and `max_heads` is how many heads of each, evenly chosen.
    """

    def __init__(
        self,
        steps: Collection[int],
        *,
        layers: Collection[int] | None = None,
        max_heads: int | None = None,
        max_bytes: int = 3 << 20,
    ):
        self._chosen = frozenset(steps)
        self._chosen_layers = None if layers is None else frozenset(layers)
        self._max_heads = max_heads
        self._max_bytes = max_bytes
        self._layout: TileLayout | None = None
        self._heads: tuple[int, ...] = ()
        self._steps: dict[int, float] = {}
        self._layers: dict[int, str] = {}
        self._calls: dict[tuple[int, int], TileAttention] = {}
        self._num_bytes = self._left_out = 0

    def __call__(self, event: AttentionEvent) -> None:
        """Takes one event.

        Raises:
            ShapeError: the lattice differs from that of the calls before.
            OpenVSAError: not even one call fits in `max_bytes`.
        """
        key = (event.step, event.layer)
        if event.step not in self._chosen or key in self._calls:
            return
        if self._chosen_layers is not None and event.layer not in self._chosen_layers:
            return
        if self._layout is None:
            self._layout, self._heads = event.layout, evenly(event.q.shape[2], self._max_heads)
        elif event.layout != self._layout:
            raise ShapeError(f"one record holds one lattice, got {event.layout} after {self._layout}")
        call = tile_attention(event, self._heads)
        if call.num_bytes > self._max_bytes:
            raise OpenVSAError(
                f"attention of {call.kept.shape[0]} heads between {call.kept.shape[1]} blocks takes {call.num_bytes} "
                f"bytes a call, and the record may hold {self._max_bytes}; raise max_bytes"
            )
        if self._num_bytes + call.num_bytes > self._max_bytes:
            self._left_out += 1
            return
        self._num_bytes += call.num_bytes
        self._steps[event.step] = event.timestep
        self._layers[event.layer] = event.name
        self._calls[key] = call

    def record(self) -> AttentionRecord | None:
        """What was seen so far, None when nothing was stored."""
        if self._layout is None or not self._calls:
            return None
        return AttentionRecord(
            self._layout, self._heads, self._steps, dict(sorted(self._layers.items())), self._calls, self._left_out
        )


def evenly(count: int, at_most: int | None) -> tuple[int, ...]:
    """At most so many of 0 ... count - 1, evenly spread, the first among them; all of them for None."""
    chosen = count if at_most is None else max(1, min(at_most, count))
    return tuple(index * count // chosen for index in range(chosen))


@torch.no_grad()
def tile_attention(event: AttentionEvent, heads: Sequence[int] | None = None) -> TileAttention:
    """The kept tiles of an attention call and the softmax of its mean-pooled queries and keys (reference: VSA paper,
    arXiv 2505.13389, coarse stage), quantised, of the given heads or of all. Dense attention (plan None) keeps every
    tile."""
    heads = range(event.q.shape[2]) if heads is None else heads
    group = event.q.shape[2] // event.k.shape[2]
    at = torch.tensor(list(heads), device=event.q.device)
    q = pool_mean(event.q[:1, :, at], event.layout.blocks)[0].transpose(0, 1)
    k = pool_mean(event.k[:1, :, at // group], event.layout.blocks)[0].transpose(0, 1)
    probability = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1)
    if event.plan is None:
        kept = torch.ones_like(probability, dtype=torch.bool)
    else:
        # Tiles that choose together are shown one by one.
        kept = event.plan.refine(event.layout.blocks).block_mask()[0]
        kept = kept[at] if len(kept) > 1 else kept.expand_as(probability)
    recall = (probability * kept).sum(-1)
    quantised = (255 * (1 + probability.log2() / PROBABILITY_BITS)).clamp(0, 255)
    return TileAttention(
        kept=pack_bits(kept).cpu(),
        probability=quantised.round().to(torch.uint8).cpu(),
        recall=(255 * recall).clamp(0, 255).round().to(torch.uint8).cpu(),
    )


def pack_bits(mask: Tensor) -> Tensor:
    """bool [..., N] -> uint8 [..., ceil(N / 8)], element j in bit j % 8 of byte j // 8."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)
