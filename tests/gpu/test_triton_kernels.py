"""The Triton kernels as compiled: every head_dim class, by tensor maps and by pointers, over lists of many blocks.

The interpreter runs the same source, but not the same registers: a compiler's fault in a loop shows only here.
"""

from __future__ import annotations

import pytest
import torch

from helpers import Case, equal_lens, expected, make_inputs, random_lens
from openvsa import block_sparse_attention
from tolerance import FORWARD, GRADIENT, excess

pytestmark = pytest.mark.gpu

BLOCKS = {
    "equal-64": equal_lens(640, 64),
    "equal-128": equal_lens(1024, 128),
    "equal-16": equal_lens(320, 16),
    "last-short": equal_lens(620, 64),
    "ragged": random_lens(14, 1, 64, seed=5),
    "ragged-128": random_lens(9, 1, 128, seed=6),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [32, 64, 72, 128, 256])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_against_the_oracle(blocks: str, head_dim: int, dtype: torch.dtype) -> None:
    lens = BLOCKS[blocks]
    case = Case(f"kernels-{blocks}", lens, lens, heads=4, kv_heads=2, head_dim=head_dim, plan_heads=4, share=0.7)
    inputs = make_inputs(case, dtype)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    out, lse = block_sparse_attention(q, k, v, inputs.plan, backend="triton", return_lse=True)
    dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (inputs.grad_out, inputs.grad_lse))
    exact, naive, terms = expected(case, dtype)
    assert excess(out.detach(), naive.out, exact.out, FORWARD, terms.out) == []
    assert excess(lse.detach(), naive.lse, exact.lse, FORWARD, terms.lse) == []
    assert excess(dq, naive.dq, exact.dq, GRADIENT, terms.dq) == []
    assert excess(dk, naive.dk, exact.dk, GRADIENT, terms.dk) == []
    assert excess(dv, naive.dv, exact.dv, GRADIENT, terms.dv) == []
