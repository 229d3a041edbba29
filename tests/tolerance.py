"""The one tolerance of this project.

A result of a kernel is judged against the same quantity in fp64, and by how well plain torch does in the same dtype:

    err(kernel, fp64) <= factor * err(naive torch, fp64) + one ulp        factor 2 forward, 3 for gradients

`err` is taken in two norms, and both must hold. The root mean square sees a small loss of accuracy everywhere (a
forgotten fp32 accumulator); the maximum sees one wrong row among a hundred thousand right ones, which no mean would
notice. Both are absolute: entries that cancel to nearly nothing have no meaningful relative error.

"One ulp" is one unit in the last place of the result, in its dtype, plus one of the accumulator (fp32, or fp64 for
fp64) times `terms`: what the result is the difference of, and how it answers to its scores (see helpers.sensitivity).
Without them the rule would judge luck. The score gradients of a row that reads one token are exactly zero; naive torch
happens to hit that zero, and no kernel that subtracts two rounded sums can. And where scores are in the hundreds, an
fp32 lse has a rounding error that shows in every weight of the row, which naive torch, having no lse, does not know.

For a kernel that computes in fp64 there is nothing finer to compare naive torch with. Its error is then that of fp32,
in proportion to their ulps: pass the naive result in fp32.

Entries of the fp64 result that are infinite or NaN (the lse of a row that reads nothing) must be matched exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

FORWARD = 2.0
GRADIENT = 3.0


def excess(kernel: Tensor, naive: Tensor, oracle: Tensor, factor: float, terms: Tensor | None = None) -> list[str]:
    """What is wrong with `kernel`, in words; empty if it is within the tolerance."""
    if kernel.shape != oracle.shape:
        return [f"shape {tuple(kernel.shape)} instead of {tuple(oracle.shape)}"]
    assert oracle.dtype == torch.float64, "the oracle computes in fp64"
    finite = oracle.isfinite()
    special = kernel[~finite].double()
    if not torch.equal(special.nan_to_num(nan=0.5), oracle[~finite].nan_to_num(nan=0.5)):
        return [f"{special[:4].tolist()}... where {oracle[~finite][:4].tolist()}... is expected"]
    wrong = (kernel.double() - oracle)[finite]
    if not wrong.isfinite().all():
        return [f"{int((~wrong.isfinite()).sum())} of {wrong.numel()} entries are not finite"]
    finer = torch.finfo(kernel.dtype).eps / torch.finfo(naive.dtype).eps
    allowed = (naive.double() - oracle)[finite] * finer
    ulp = torch.finfo(kernel.dtype).eps * oracle.abs()[finite]
    if terms is not None:
        accumulator = torch.float64 if kernel.dtype == torch.float64 else torch.float32
        ulp = ulp + torch.finfo(accumulator).eps * terms[finite]
    complaints = []
    for norm in (rms, largest):
        error, naive_error, one_ulp = norm(wrong), norm(allowed), norm(ulp)
        if not error <= factor * naive_error + one_ulp:
            complaints.append(
                f"{norm.__name__} error {error:.3g} > {factor:g} * {naive_error:.3g} + {one_ulp:.3g} (ulp)"
            )
    return complaints


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
