"""Variants of the Hopper kernels side by side, for work on them: other shapes, or sources of another folder.

    python benchmarks/hopper_variants.py compare          # our backends against cuDNN's dense attention
    python benchmarks/hopper_variants.py variants         # what VARIANTS lists, each checked against the first

It prints TFLOP/s of computed pairs (backward: 2.5 times forward) at B=1 H=12 S=32768 bf16, density 1/8, plans and
transposes made before. `local` lists are drawn eight query blocks at a time with noise, `random` ones for each block.
docs/dev/kernel-log.md has figures from it and from drafts of it; those of docs/performance.md are from `openvsa bench`,
which also checks against the oracle.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.resources import files
from pathlib import Path
from unittest import mock

import torch
from cuda.core import Program, ProgramOptions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from openvsa import BlockPlan, block_sparse_attention
from openvsa.ops.backends.hopper import compiler
from openvsa.ops.backends.hopper.compiler import Variant, _Shape

HEADS, TOKENS, DENSITY = 12, 32768, 1 / 8

# (kernel, head_dim): (label, folder with sources that replace the package's, shape); None keeps what the package has.
VARIANTS: dict[tuple[str, int], list[tuple[str, str | None, _Shape | None]]] = {
    ("forward", 128): [
        ("as it is", None, None),
        ("two teams with more tiles", None, _Shape(2, 1, {"KEY_STAGES": 3, "VALUE_STAGES": 3})),
    ],
    ("dkv", 128): [
        ("as it is", None, None),
        ("a team of two shares tiles", None, _Shape(1, 2, {"STAGES": 5}, 24, 240)),
    ],
}


def inputs(head_dim: int) -> list[Tensor]:
    """q, k, v and the gradient of out."""
    return [torch.randn(1, TOKENS, HEADS, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def make_plan(q_block: int, kv_block: int, *, local: bool) -> BlockPlan:
    """A plan of the wanted density, with its transpose."""
    draw = torch.Generator("cuda").manual_seed(0)
    num_q, num_kv = TOKENS // q_block, TOKENS // kv_block
    scores = torch.rand(1, HEADS, num_q, num_kv, device="cuda", generator=draw)
    if local:
        base = torch.rand(1, HEADS, -(-num_q // 8), num_kv, device="cuda", generator=draw)
        scores = base.repeat_interleave(8, 2)[:, :, :num_q] + 0.3 * scores
    picks = scores.topk(int(num_kv * DENSITY), -1).indices
    mask = torch.zeros(scores.shape, dtype=torch.bool, device="cuda").scatter_(-1, picks, True)
    plan = BlockPlan.from_block_mask(mask, list(range(0, TOKENS + 1, q_block)), list(range(0, TOKENS + 1, kv_block)))
    plan.transpose_csr()
    return plan


def seconds(run: Callable[[], object], rounds: int = 7) -> float:
    """Median, by events; the GPU is kept busy first, so that the host's time stays outside."""
    run(), run()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_500_000)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def backward_of(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone, again and again."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*leaves)
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def compare() -> None:
    for head_dim in (128, 64):
        q, k, v, grad = inputs(head_dim)
        across = [x.transpose(1, 2).contiguous() for x in (q, k, v, grad)]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            dense = 4 * HEADS * TOKENS**2 * head_dim / 1e12
            forward = dense / seconds(partial(scaled_dot_product_attention, *across[:3]))
            backward = 2.5 * dense / seconds(backward_of(scaled_dot_product_attention, *across))
        print(f"head_dim {head_dim} cuDNN dense: forward {forward:.0f}, backward {backward:.0f}", flush=True)
        for q_block, kv_block in ((64, 64), (128, 64), (128, 128)):
            for local in (True, False):
                plan = make_plan(q_block, kv_block, local=local)
                work = DENSITY * dense
                for backend in ("hopper", "triton"):
                    attend = partial(block_sparse_attention, plan=plan, backend=backend)
                    with torch.no_grad():
                        rate = work / seconds(partial(attend, q, k, v))
                    back = 2.5 * work / seconds(backward_of(attend, q, k, v, grad))
                    lists = "local" if local else "random"
                    print(
                        f"head_dim {head_dim} {q_block}x{kv_block} {lists:6} {backend}: "
                        f"forward {rate:.0f} ({rate / forward:.2f}), backward {back:.0f} ({back / backward:.2f})",
                        flush=True,
                    )


@contextmanager
def replaced(key: tuple[str, int], folder: str | None, shape: _Shape | None) -> Iterator[None]:
    """The package's kernels with other sources and another shape."""

    def compile_variant(variant: Variant) -> object:
        source = ""
        for name in compiler._SOURCES[variant.kernel]:
            own = Path(folder or ".") / name
            source += own.read_text() if folder and own.exists() else (files(compiler.__package__) / name).read_text()
        macros = [(name, str(value)) for name, value in variant.macros.items()]
        return Program(source, "c++", ProgramOptions(std="c++17", arch="sm_90a", define_macro=macros)).compile("cubin")

    compiler._function.cache_clear()
    with (
        mock.patch.object(compiler, "compile_variant", compile_variant),
        mock.patch.dict(compiler._SHAPES, {key: shape} if shape else {}),
    ):
        yield
    compiler._function.cache_clear()


def variants() -> None:
    for key, tried in VARIANTS.items():
        kernel, head_dim = key
        q, k, v, grad = inputs(head_dim)
        for local in (True, False):
            plan = make_plan(64, 64, local=local)
            work = 4 * HEADS * TOKENS**2 * DENSITY * head_dim / 1e12
            first: list[Tensor] = []
            for label, folder, shape in tried:
                with replaced(key, folder, shape):
                    attend = partial(block_sparse_attention, plan=plan, backend="hopper")
                    back = backward_of(attend, q, k, v, grad)
                    if kernel == "forward":
                        with torch.no_grad():
                            results, rate = [attend(q, k, v)], work / seconds(partial(attend, q, k, v))
                    else:
                        results, rate = list(back()), 2.5 * work / seconds(back)
                first = first or results
                same = all(torch.equal(a, b) for a, b in zip(results, first, strict=True))
                print(
                    f"{kernel} {head_dim} {'local' if local else 'random':6} {label}: {rate:.0f}"
                    f"{'' if same else ' DIFFERENT RESULT'}",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("compare", "variants"))
    torch.manual_seed(0)
    {"compare": compare, "variants": variants}[parser.parse_args().what]()
