"""What one forward of an attached model is about."""

from __future__ import annotations

from dataclasses import dataclass
from threading import get_ident

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.families import Sequence
from openvsa.layout import TileLayout

__all__ = ["Forward", "Part"]


@dataclass(frozen=True)
class Part:
    """Samples whose valid text has one length. `rows` are their places in the batch; None means all of it."""

    layout: TileLayout
    rows: Tensor | None = None

    def samples(self, x: Tensor) -> Tensor:
        """Their valid tokens: x [B, S, ...] to [B', S', ...]."""
        if self.rows is not None:
            x = x.index_select(0, self.rows.to(x.device))  # elsewhere if the model is offloaded
        return x if x.shape[1] == self.layout.num_tokens else x[:, : self.layout.num_tokens]


@dataclass
class Forward:
    """What the current forward is about."""

    sequence: Sequence
    parts: tuple[Part, ...]
    timestep: Tensor | None
    device: torch.device
    config: SparsityConfig | None  # the settings it began with, which its backward pass may need after others were set
    thread: int = 0  # the one that it runs in; 0 for any
    entered: TileLayout | None = None  # of what the entries put in block order; None where the order stays
    left: TileLayout | None = None  # of what the exit puts back
    checked_mask: bool = False

    @property
    def hoisted(self) -> bool:
        """Whether all layers have their tokens in block order."""
        return self.entered is not None

    def check_thread(self) -> None:
        """Refuse to be the forward of another thread than the one it runs in.

        Raises:
            OpenVSAError: another thread has begun this forward while one of this thread was under way.
        """
        if self.thread and self.thread != get_ident():
            raise OpenVSAError(
                "another thread has begun a forward of this model while one was under way; an attached model, and all "
                "pipelines that share it, serve one generation at a time: hold a lock around each, or give every "
                "thread a model of its own"
            )
