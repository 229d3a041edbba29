"""What one forward of an attached model is about."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from threading import get_ident

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, UnsupportedError
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
    step: int = 0  # the denoising step, where something asks
    over: bool = False  # its layers are not to run any more; of one with a backward pass nobody knows
    entered: TileLayout | None = None  # of what the entries put in block order; None where the order stays
    left: TileLayout | None = None  # of what the exit puts back
    valid: Tensor | None = field(init=False, default=None)  # [B, S], False for padded text; None without any to mask
    text_mask: Tensor | None = field(init=False, default=None)  # one that was found to be that of padded text
    foreign: Tensor | None = field(init=False, default=None)  # whether compiled layers were given another one
    unread: bool = field(init=False, default=False)  # compiled layers were given masks, and `foreign` was not looked at

    def __post_init__(self) -> None:
        sequence, lengths = self.sequence, self.sequence.text_lengths
        if lengths is None or sequence.per_sample:
            return
        before = sequence.prefix + math.prod(sequence.grid)
        ends = torch.tensor(lengths, device=self.device)[:, None] + before
        self.valid = torch.arange(before + sequence.suffix, device=self.device) < ends
        self.foreign = torch.zeros((), dtype=torch.bool, device=self.device)

    @property
    def hoisted(self) -> bool:
        """Whether all layers have their tokens in block order."""
        return self.entered is not None

    def is_of_text(self, mask: Tensor) -> bool:
        """Whether mask [B or 1, ..., tokens], for the last tokens of the sequence, hides padded text and nothing else.

        To look at it waits for the device, so one that all layers share is looked at once. Inside torch.compile it is
        taken for such a mask, and `check_masks` says at the end of the forward if that was wrong.
        """
        assert self.valid is not None
        compiling = torch.compiler.is_compiling()
        if not compiling and mask is self.text_mask:
            return True
        rows = mask.bool().flatten(1)
        if rows.shape[0] not in (1, len(self.valid)) or rows.shape[1] > self.valid.shape[1]:
            return False
        expected = self.valid[:, -rows.shape[1] :].to(mask.device)
        if compiling:
            assert self.foreign is not None
            self.foreign = self.foreign | (rows != expected).any().to(self.foreign.device)
            self.unread = True
            return True
        if not torch.equal(rows.expand_as(expected), expected):
            return False
        self.text_mask = mask
        return True

    def check_masks(self) -> None:
        """Refuse masks that compiled layers were given, if they were not those of padded text. Waits for the device.

        Raises:
            UnsupportedError: one was another.
        """
        if self.unread and self.foreign is not None and bool(self.foreign):
            raise UnsupportedError(
                "a compiled layer got an attention mask that is not that of padded text with "
                f"{self.sequence.text_lengths} valid tokens, so the output of this forward is wrong; only masks of "
                "padded text can be honoured by sparse attention. Leave such layers dense with dense_layers"
            )

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
