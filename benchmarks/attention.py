"""Correctness, then speed, of the op's own kernels: Triton on a GPU, the cpu backend on a CPU.

    python benchmarks/attention.py --device cuda --out benchmarks/results

First every gradient and output is compared with the fp64 oracle on ragged lattices; nothing is timed if that fails
(exit status 1). Then forward and backward are timed (by CUDA events on a GPU), each round running every contender
once, beside dense attention as PyTorch ships it. Plans and their transposes are made before the clock starts. One
JSON file holds all figures, with the machine, the versions and the commit. Takes about a minute on a GPU, most of it
compilation, and several on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import openvsa
from openvsa.ops.reference import reference_attention

# (lattice, tile, heads, key heads, head_dim, dtype): ragged borders, grouped heads, blocks of 64 and 128 tokens.
GATE = [
    ((5, 7, 9), (4, 4, 4), 4, 4, 64, torch.float32),
    ((5, 7, 9), (4, 4, 4), 4, 2, 80, torch.float16),
    ((13, 15, 17), (4, 4, 4), 4, 1, 64, torch.bfloat16),
    ((13, 15, 17), (4, 4, 4), 4, 4, 128, torch.bfloat16),
    ((9, 14, 26), (4, 4, 8), 2, 2, 128, torch.bfloat16),
]
NAMES = ("out", "lse", "dq", "dk", "dv")

BLOCK, DENSITY = 64, 1 / 8


@dataclass(frozen=True)
class Case:
    """What is timed on a device, and the dense attention beside it."""

    backend: str
    heads: int
    tokens: int
    head_dims: tuple[int, ...]
    dtype: torch.dtype
    dense: dict[str, SDPBackend]
    rounds: int


CASES = {
    "cuda": Case(
        "triton", 12, 32768, (128, 64), torch.bfloat16,
        {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}, 20,
    ),
    "cpu": Case("cpu", 8, 16384, (64,), torch.float32, {"flash": SDPBackend.FLASH_ATTENTION}, 3),
}  # fmt: skip
# Products of a token pair per head: q·k and p·v forward; those of the exact backward are 2.5 times as many.
FLOP_PER_PAIR = 4
PASSES = {"forward": 1, "backward": 2.5, "both": 3.5}


def oracle(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor, dlse: Tensor, plan: openvsa.BlockPlan, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """out, lse, dq, dk, dv by the reference, computed in `dtype`."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (q, k, v))
    lists = (plan.q_offsets, plan.kv_offsets, plan.kv_num_blocks, plan.kv_indices)
    out, lse = reference_attention(q, k, v, *lists, q.shape[-1] ** -0.5)
    reads = lse.isfinite()
    loss = (out * do).sum() + (lse * dlse)[reads].sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, (q, k, v))


def gate_case(
    device: str,
    grid: tuple[int, ...],
    tile: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Errors of the kernels and of plain torch in the same dtype against the oracle in fp64, as the largest
    difference over the largest value. The kernels may err twice as much forward and three times backward, plus one
    unit in the last place."""
    torch.manual_seed(0)
    layout = openvsa.TileLayout(grid, tile)
    blocks = layout.num_blocks
    mask = torch.rand(2, heads, blocks, blocks, device=device) < 0.4
    mask[:, :, blocks // 2] = False
    plan = openvsa.BlockPlan.from_block_mask(mask, layout.blocks, layout.blocks)

    def tokens(count: int) -> Tensor:
        return torch.randn(2, layout.num_tokens, count, head_dim, device=device).to(dtype)

    q, k, v, do = tokens(heads), tokens(kv_heads), tokens(kv_heads), tokens(heads)
    dlse = torch.randn(2, heads, layout.num_tokens, device=device)
    exact = oracle(q, k, v, do, dlse, plan, torch.float64)
    plain = oracle(q, k, v, do, dlse, plan, dtype)

    q, k, v = (x.requires_grad_() for x in (q, k, v))
    out, lse = openvsa.block_sparse_attention(q, k, v, plan, backend=CASES[device].backend, return_lse=True)
    runs = [torch.autograd.grad((out, lse), (q, k, v), (do, dlse), retain_graph=True) for _ in range(2)]
    kernel = (out.detach(), lse.detach(), *runs[0])

    errors, passed = {}, all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for name, got, naive, true in zip(NAMES, kernel, plain, exact, strict=True):
        reads = true.isfinite()
        passed &= bool((got.isfinite() == reads).all())
        size = true[reads].abs().max()
        error, naive_error = (float((x[reads].double() - true[reads]).abs().max() / size) for x in (got, naive))
        allowed = (2 if name in ("out", "lse") else 3) * naive_error + torch.finfo(got.dtype).eps
        errors[name] = {"error": error, "naive_error": naive_error, "allowed": allowed}
        passed &= error <= allowed
    case = {"grid": grid, "tile": tile, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return {**case, "dtype": str(dtype).removeprefix("torch."), "passed": passed, "errors": errors}


def block_lists(device: str, pattern: str) -> openvsa.BlockPlan:
    """The same number of key blocks for every query block. "random": chosen independently. "clustered": eight
    neighbouring query blocks draw on one ranking with a little noise each, as neighbours in real maps do."""
    case = CASES[device]
    generator = torch.Generator(device).manual_seed(0)
    blocks = case.tokens // BLOCK
    scores = torch.rand(1, case.heads, blocks, blocks, generator=generator, device=device)
    if pattern == "clustered":
        shared = torch.rand(1, case.heads, blocks // 8, blocks, generator=generator, device=device)
        scores = shared.repeat_interleave(8, dim=2) + 0.1 * scores
    offsets = range(0, case.tokens + 1, BLOCK)
    return openvsa.BlockPlan.from_scores(scores, openvsa.Budget(keep_ratio=DENSITY), offsets, offsets)


def shared_with_neighbour(plan: openvsa.BlockPlan) -> float:
    """The mean share of a query block's key blocks that the next query block reads too."""
    mask = plan.block_mask()
    both = (mask[:, :, 1:] & mask[:, :, :-1]).sum(-1)
    return float((both / mask[:, :, 1:].sum(-1)).mean())


def contenders(
    device: str, head_dim: int, plans: dict[str, openvsa.BlockPlan]
) -> dict[tuple[str, str], Callable[[], object]]:
    """What is timed, by (name, direction). Dense attention gets its tensors in the order it likes best, BHSD."""
    torch.manual_seed(0)
    case = CASES[device]
    shape = (1, case.tokens, case.heads, head_dim)
    q, k, v, do = (torch.randn(shape, device=device, dtype=case.dtype) for _ in range(4))
    calls: dict[tuple[str, str], Callable[[], object]] = {}

    def add(name: str, run: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = run(*leaves)
        calls[name, "forward"] = lambda: run(*inputs)
        calls[name, "backward"] = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

    for pattern, plan in plans.items():

        def sparse(q: Tensor, k: Tensor, v: Tensor, plan: openvsa.BlockPlan = plan) -> Tensor:
            return openvsa.block_sparse_attention(q, k, v, plan, backend=case.backend)

        add(f"{case.backend} {pattern}", sparse, (q, k, v), do)
    for name, backend in case.dense.items():

        def dense(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v)

        add(f"dense {name}", dense, tuple(x.transpose(1, 2).contiguous() for x in (q, k, v)), do.transpose(1, 2))
    return calls


def time_interleaved(device: str, calls: dict[Any, Callable[[], object]], rounds: int) -> dict[Any, float]:
    """Median milliseconds of each call; a round runs all of them once, so that drift of the clock meets all alike."""
    times: dict[Any, list[Callable[[], float]]] = {key: [] for key in calls}
    for turn in range(-1 if device == "cpu" else -3, rounds):  # rounds to warm up first
        for key, call in calls.items():
            took = timed(device, call)
            if turn >= 0:
                times[key].append(took)
    return {key: statistics.median(took() for took in found) for key, found in times.items()}


def timed(device: str, call: Callable[[], object]) -> Callable[[], float]:
    """Run `call`; the result says how many milliseconds it took, and may wait for the device to do so."""
    if device == "cpu":
        begin = time.perf_counter()
        call()
        milliseconds = (time.perf_counter() - begin) * 1e3
        return lambda: milliseconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()

    def elapsed() -> float:
        end.synchronize()
        return start.elapsed_time(end)

    return elapsed


def measure(device: str, rounds: int) -> dict[str, Any]:
    """All timings. TFLOP/s count computed work only; `of_best_dense` is its ratio to the faster dense kernel."""
    case = CASES[device]
    plans = {pattern: block_lists(device, pattern) for pattern in ("random", "clustered")}
    rows = []
    for head_dim in case.head_dims:
        times = time_interleaved(device, contenders(device, head_dim, plans), rounds)
        for name, _ in [key for key in times if key[1] == "forward"]:
            times[name, "both"] = times[name, "forward"] + times[name, "backward"]
        found = []
        for (name, direction), ms in times.items():
            pattern = name.split()[1]
            pairs = plans[pattern].cost if pattern in plans else case.heads * case.tokens**2
            flop = FLOP_PER_PAIR * head_dim * pairs * PASSES[direction]
            found.append(
                {"name": name, "direction": direction, "head_dim": head_dim, "ms": ms, "tflops": flop / ms / 1e9}
            )
        for row in found:
            rivals = [r for r in found if r["name"].startswith("dense") and r["direction"] == row["direction"]]
            row["of_best_dense"] = row["tflops"] / max(r["tflops"] for r in rivals)
            row["speedup_over_best_dense"] = min(r["ms"] for r in rivals) / row["ms"]
        rows += found
    return {
        "case": {
            "batch": 1,
            "heads": case.heads,
            "tokens": case.tokens,
            "block": BLOCK,
            "dtype": str(case.dtype).removeprefix("torch."),
            "rounds": rounds,
        },
        "lists": {
            name: {"density": plan.density, "shared_with_neighbour": shared_with_neighbour(plan)}
            for name, plan in plans.items()
        },
        "rows": rows,
    }


def commit() -> str | None:
    """The commit of this checkout, with a + if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--device", choices=CASES, required=True, help="where to measure")
    parser.add_argument("--rounds", type=int, help="timed calls of each contender")
    parser.add_argument("--commit", default=commit(), help="recorded commit, where this is not a git checkout")
    args = parser.parse_args()

    gate = [gate_case(args.device, *case) for case in GATE]
    for case in gate:
        worst = max(e["error"] / e["allowed"] for e in case["errors"].values())
        what = " ".join(f"{key} {case[key]}" for key in ("grid", "tile", "heads", "kv_heads", "head_dim", "dtype"))
        print(f"gate {'passed' if case['passed'] else 'FAILED'}, at {worst:.2f} of the allowed error: {what}")
    if not all(case["passed"] for case in gate):
        print(json.dumps([case for case in gate if not case["passed"]], indent=1))
        return 1

    results = measure(args.device, args.rounds or CASES[args.device].rounds)
    for row in results["rows"]:
        print(f"{row['name']:17} {row['direction']:8} D={row['head_dim']:<3} {row['ms']:9.3f} ms "
              f"{row['tflops']:7.3f} TFLOP/s  {row['of_best_dense']:.2f} of best dense, "
              f"{row['speedup_over_best_dense']:.2f}x as fast")  # fmt: skip
    now = datetime.datetime.now(datetime.timezone.utc)
    on_gpu = args.device == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU {platform.machine()} {torch.get_num_threads()} threads"
    capability = torch.cuda.get_device_capability() if on_gpu else torch.backends.cpu.get_cpu_capability()
    record = {
        "benchmark": "attention",
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": args.commit,
        "machine": {"device": device, "capability": capability},
        "versions": {
            "openvsa": openvsa.__version__,
            "torch": torch.__version__,
            "triton": metadata.version("triton") if on_gpu else None,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        },
        "gate": gate,
        **results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"attention-{device.lower().replace(' ', '-')}-{now:%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
