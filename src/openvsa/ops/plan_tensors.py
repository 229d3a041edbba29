"""The tensors of a plan, as kernels receive them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PlanTensors(NamedTuple):
    """A block plan taken apart for a kernel. Bp is B or 1, Hp is H (query heads) or 1.

    The transpose is in compressed form because its longest row is not known on the host: a key block can be
    read by every query block, and a padded table would be as large as the dense mask.
    """

    q_offsets: Tensor  # int32 [NQ + 1], token offsets of the query blocks
    kv_offsets: Tensor  # int32 [NK + 1]
    kv_num_blocks: Tensor  # int32 [Bp, Hp, NQ]
    kv_indices: Tensor  # int32 [Bp, Hp, NQ, K], ascending; entries past the count are never read
    q_starts: Tensor | None  # int32 [Bp, Hp, NK + 1]; only for the backward pass
    q_indices: Tensor | None  # int32 [Bp, Hp, NQ * K]; readers of key block j: q_indices[q_starts[j] : q_starts[j + 1]]
    max_q_block: int  # tokens in the longest query block
    max_kv_block: int
