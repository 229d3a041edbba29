"""Write src/openvsa/integrations/break_even.json: the constants of the cost model, from benchmarks/results.

python scripts/fit_break_even.py            # write it
python scripts/fit_break_even.py --check    # fail if the file on disk differs

Of each machine and case the newest file that has it counts. Only forward passes in blocks of 64 x 64 are looked at, and
of GPUs those in half precision. Dense is the fastest that scaled_dot_product_attention has; sparse is the package's
fastest backend.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import torch

from doc_performance import Measured, newest
from openvsa.integrations.break_even import BLOCK_TOKENS

ROOT = Path(__file__).parents[1]
CONSTANTS = ROOT / "src" / "openvsa" / "integrations" / "break_even.json"
SDPA = ("dense-cudnn", "dense-flash")


class Point(NamedTuple):
    """Something that took `ms`, and how much there was of what could have made it do so."""

    ms: float
    amounts: tuple[float, ...]


def fit(points: Sequence[Point], columns: int) -> list[float]:
    """What each amount costs, none of it negative, with the least sum of squared relative errors: the best of all
    choices of columns, of fewer columns where they do as well. No points cost nothing."""
    best, found = float("inf"), [0.0] * columns
    distinct = len({point.amounts for point in points})
    for size in range(1, min(columns, distinct) + 1):
        for chosen in combinations(range(columns), size):
            rows = [[point.amounts[c] / point.ms for c in chosen] for point in points]
            matrix = torch.tensor(rows, dtype=torch.float64)
            scale = matrix.norm(dim=0).clamp_min(1e-300)
            solution = torch.linalg.lstsq(matrix / scale, torch.ones(len(points), 1, dtype=torch.float64)).solution
            costs = (solution[:, 0] / scale).tolist()
            error = float((matrix @ torch.tensor(costs, dtype=torch.float64) - 1).square().sum())
            if min(costs) >= 0 and error < 0.98 * best:
                best, found = error, [0.0] * columns
                for column, cost in zip(chosen, costs, strict=True):
                    found[column] = cost
    return found


def constants(cases: Sequence[Measured], has_host: bool = True) -> dict[str, float] | None:
    """Of cases of one machine and head size; None if nothing of them can be used. On a CPU nothing is enqueued: without
    a host, what Python takes is part of `overhead_ms`."""
    dense, kernels, wholes, hosts = [], [], [], []
    for measured in cases:
        case, rows = measured.case, measured.rows(**{"pass": "forward"})
        elements = case["batch"] * case["tokens"] * case["heads"] * case["head_dim"]
        tiles = case["batch"] * case["heads"] * (case["tokens"] / BLOCK_TOKENS) ** 2
        pairs = case["batch"] * case["heads"] * case["tokens"] ** 2
        times = [row["ms"] for row in rows if row["contender"] in SDPA]
        if not times or case["blocks"] != "64x64" or case["heads"] != case["kv_heads"]:
            continue
        dense.append(Point(min(times), (pairs,)))
        for plan in dict.fromkeys(row["plan"] for row in rows if row["op"] == "attention" and row["plan"] != "-"):
            kernel = measured.best("forward", plan)
            pattern, density = plan.split(" ")
            whole = kernel and measured.best("forward", f"selected {density}", "vsa", kernel["contender"])
            if kernel is None or pattern != "random":
                continue
            kept = case.get("plans", {}).get(plan, {}).get("pairs") or pairs * float(Fraction(density))
            amounts = (kept, elements, tiles, 1.0)
            kernels.append(Point(kernel["ms"], amounts))
            if whole:
                wholes.append(Point(whole["ms"], amounts))
                hosts.append(whole["host_ms"])
    if not dense or not kernels:
        return None
    # Where the whole op was not measured, selection counts as nothing.
    per_kept, per_element, per_tile, overhead = fit(wholes or kernels, 4)
    [per_pair] = fit(dense, 1)
    return {
        "dense_ms_per_pair": per_pair, "sparse_ms_per_pair": per_kept, "ms_per_element": per_element,
        "ms_per_block_pair": per_tile, "overhead_ms": overhead,
        "host_ms": statistics.median(hosts) if hosts and has_host else 0.0,
    }  # fmt: skip


def text() -> str:
    found: dict[str, Any] = {}
    for machine, cases in newest().items():
        by_head_dim: dict[int, list[Measured]] = {}
        for measured in cases.values():
            by_head_dim.setdefault(measured.case["head_dim"], []).append(measured)
        on_cpu = machine.startswith("CPU")
        fitted = {str(dim): constants(mine, not on_cpu) for dim, mine in sorted(by_head_dim.items())}
        fitted = {dim: {k: float(f"{v:.4g}") for k, v in c.items()} for dim, c in fitted.items() if c}
        if fitted:
            kind = "cpu" if on_cpu else machine
            files = sorted({measured.file.name for measured in cases.values()})
            found[kind] = {"device": machine, "files": files, "head_dims": fitted}
    return json.dumps(found, indent=1) + "\n"


def main() -> int:
    fresh = text()
    if CONSTANTS.exists() and CONSTANTS.read_text() == fresh:
        return 0
    if "--check" in sys.argv:
        print(f"{CONSTANTS.name} is stale; run python scripts/fit_break_even.py", file=sys.stderr)
        return 1
    CONSTANTS.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
