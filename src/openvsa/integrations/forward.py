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
    text_mask: bool | None = None  # whether the mask of its layers is that of padded text; None before it was seen

    @property
    def hoisted(self) -> bool:
        """Whether all layers have their tokens in block order."""
        return self.entered is not None

    def is_of_text(self, mask: Tensor) -> bool:
        """Whether mask [B or 1, tokens], the last of which are text, hides padding and nothing else. It is the same in
        every layer, and to look at it waits for the device, so the answer of the first stands for all."""
        if self.text_mask is None:
            lengths = self.sequence.text_lengths
            assert lengths is not None
            tokens = mask.shape[1]
            valid = torch.tensor(lengths, device=mask.device)[:, None] + (tokens - self.sequence.suffix)
            expected = torch.arange(tokens, device=mask.device) < valid
            self.text_mask = torch.equal(mask.bool().expand(len(lengths), -1), expected)
        return self.text_mask

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
