"""Does sparse attention pay? The time of one attention call, dense and sparse, predicted from measured constants.

    dense  = pairs / rate
    sparse = max(host, overhead + selection + kept pairs / rate)

where selection (permuting and pooling tokens, scoring and ranking pairs of tiles) costs something for every element of
the queries and for every pair of tiles. `host` is what Python takes to enqueue the call: a device that is faster waits.
The constants are in `break_even.json`; `python scripts/fit_break_even.py` fits them to the newest results.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from openvsa.config import Budget, machine_fact

__all__ = ["BLOCK_TOKENS", "Prediction", "objection", "predict", "predict_on", "share_of"]

_FILE = Path(__file__).with_name("break_even.json")
# Tokens of a tile, about: TileLayout.fit and the tiles that were measured have up to 64.
BLOCK_TOKENS = 64
# Stands for GPUs that were not measured. On a slower one attention takes longer, and Python does not.
_TYPICAL_GPU = "NVIDIA H200"


@dataclass(frozen=True)
class Prediction:
    """Milliseconds of one attention call. `measured_on` is where the constants come from;
    `assumed` says that this machine is another one."""

    dense_ms: float
    sparse_ms: float
    measured_on: str
    assumed: bool

    @property
    def pays(self) -> bool:
        return self.sparse_ms < self.dense_ms

    def __str__(self) -> str:
        how = "assuming it is like" if self.assumed else "as measured on"
        return f"predicted {self.dense_ms:.3g} ms dense and {self.sparse_ms:.3g} ms sparse, {how} {self.measured_on}"


@machine_fact
def objection(device: str, tokens: int, heads: int, head_dim: int, density: float) -> str:
    """In words why such a call should stay dense; empty if sparse attention pays."""
    found = predict(device, tokens, heads, head_dim, density)
    return "" if found.pays else f"{tokens} tokens at density {density:.3g} would not be faster: {found}"


def predict(device: str, tokens: int, heads: int, head_dim: int, density: float) -> Prediction:
    """What one attention call takes on a device (as torch names it: "cpu", "cuda:0"), keeping a share of all pairs of
    tiles. Of one sample: more of them make both as much slower, but for the host."""
    return predict_on(_name(device), tokens, heads, head_dim, density)


@cache
def predict_on(name: str, tokens: int, heads: int, head_dim: int, density: float) -> Prediction:
    """`predict` for a machine by its name: "cpu", or a GPU as torch calls it."""
    known = _constants()
    kind = name if name in known else _TYPICAL_GPU
    by_head_dim = known[kind]["head_dims"]
    nearest = min(by_head_dim, key=lambda dim: abs(int(dim) - head_dim))
    c = by_head_dim[nearest]
    # Products are proportional to the head size, a multiple of which was measured.
    pairs = heads * tokens**2 * head_dim / int(nearest)
    selection = (
        c["ms_per_element"] * tokens * heads * head_dim + c["ms_per_block_pair"] * heads * (tokens / BLOCK_TOKENS) ** 2
    )
    sparse = c["overhead_ms"] + selection + density * pairs * c["sparse_ms_per_pair"]
    measured_on = known[kind]["device"]
    return Prediction(pairs * c["dense_ms_per_pair"], max(c["host_ms"], sparse), measured_on, name != kind)


def share_of(budget: Budget | Sequence[Budget], tiles: int) -> float:
    """The share of tiles that a budget keeps of so many, the mean over heads if each has its own. What a top_p budget
    will keep is not known before; it counts as if attention were spread evenly, which is the most it can be."""
    if isinstance(budget, Budget):
        return budget.blocks(tiles) / tiles if budget.top_p is None else budget.top_p
    return sum(share_of(one, tiles) for one in budget) / len(budget)


@cache
def _name(device: str) -> str:
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "cpu"


@cache
def _constants() -> dict[str, Any]:
    """By kind of device: {"device", "file", "head_dims": {head_dim: constants}}."""
    return json.loads(_FILE.read_text(encoding="utf-8"))
