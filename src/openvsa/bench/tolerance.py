"""The one tolerance of this project.

A result of a kernel is judged against the same quantity in fp64, and by how well plain torch does in the same dtype:

    err(kernel, fp64) <= factor * err(naive torch, fp64) + one ulp        factor 2 forward, 3 for gradients

`err` is taken in two norms, and both must hold. The root mean square sees a small loss of accuracy everywhere (a
forgotten fp32 accumulator); the maximum sees one wrong row among a hundred thousand right ones, which no mean would
notice. Both are absolute: entries that cancel to nearly nothing have no meaningful relative error.

"One ulp" is one unit in the last place of the result, in its dtype, plus one of the accumulator (fp32, or fp64 for
fp64) times `terms`: what the result is the difference of, and how it answers to its scores (see oracle.sensitivity).
Without them the rule would judge luck. The score gradients of a row that reads one token are exactly zero; naive torch
happens to hit that zero, and no kernel that subtracts two rounded sums can. And where scores are in the hundreds, an
fp32 lse has a rounding error that shows in every weight of the row, which naive torch, having no lse, does not know.

For a kernel that computes in fp64 there is nothing finer to compare naive torch with. Its error is then that of fp32,
in proportion to their ulps: pass the naive result in fp32.

Entries of the fp64 result that are infinite or NaN (the lse of a row that reads nothing) must be matched exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from openvsa.errors import ShapeError

__all__ = ["FORWARD", "GRADIENT", "Verdict", "excess", "judge", "naive_dtype"]

FORWARD = 2.0
GRADIENT = 3.0


class Verdict(NamedTuple):
    """What is wrong, in words, and the error as a share of what is allowed (the larger of the two norms)."""

    complaints: list[str]
    share: float


def excess(kernel: Tensor, naive: Tensor, oracle: Tensor, factor: float, terms: Tensor | None = None) -> list[str]:
    """What is wrong with `kernel`, in words; empty if it is within the tolerance."""
    return judge(kernel, naive, oracle, factor, terms).complaints


def judge(kernel: Tensor, naive: Tensor, oracle: Tensor, factor: float, terms: Tensor | None = None) -> Verdict:
    """The tolerance, applied to a result of a kernel, of plain torch in its dtype, and of the oracle in fp64."""
    wrong_at_all = float("inf")
    if kernel.shape != oracle.shape:
        return Verdict([f"shape {tuple(kernel.shape)} instead of {tuple(oracle.shape)}"], wrong_at_all)
    if oracle.dtype != torch.float64:
        raise ShapeError(f"the oracle computes in fp64, got {oracle.dtype}")
    kernel, naive = kernel.detach(), naive.detach()
    finite = oracle.isfinite()
    special = kernel[~finite].double()
    if not torch.equal(special.nan_to_num(nan=0.5), oracle[~finite].nan_to_num(nan=0.5)):
        what = f"{special[:4].tolist()}... where {oracle[~finite][:4].tolist()}... is expected"
        return Verdict([what], wrong_at_all)
    wrong = (kernel.double() - oracle)[finite]
    if not wrong.isfinite().all():
        return Verdict([f"{int((~wrong.isfinite()).sum())} of {wrong.numel()} entries are not finite"], wrong_at_all)
    finer = torch.finfo(kernel.dtype).eps / torch.finfo(naive.dtype).eps
    allowed = (naive.double() - oracle)[finite] * finer
    ulp = torch.finfo(kernel.dtype).eps * oracle.abs()[finite]
    if terms is not None:
        accumulator = torch.float64 if kernel.dtype == torch.float64 else torch.float32
        ulp = ulp + torch.finfo(accumulator).eps * terms[finite]
    complaints, share = [], 0.0
    for norm in (rms, largest):
        error, naive_error, one_ulp = norm(wrong), norm(allowed), norm(ulp)
        limit = factor * naive_error + one_ulp
        share = max(share, error / limit if limit else float(error > 0))
        if not error <= limit:
            complaints.append(
                f"{norm.__name__} error {error:.3g} > {factor:g} * {naive_error:.3g} + {one_ulp:.3g} (ulp)"
            )
    return Verdict(complaints, share)


def naive_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which dtype plain torch computes what results in `dtype` are judged by."""
    # There is nothing finer to compare fp64 with.
    return torch.float32 if dtype == torch.float64 else dtype


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
