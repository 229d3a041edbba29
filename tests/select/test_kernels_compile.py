"""The kernels of selection compile for every kind of GPU on a machine that has none, and Triton has nothing to say."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from absent_gpu import SHARED_MEMORY, absent_gpu
from openvsa.layout import kernels as layout_kernels
from openvsa.plan import kernels as plan_kernels
from openvsa.select import kernels as select_kernels

FLOATS, INTS = torch.float32, torch.int32
FUSED = plan_kernels._FUSED
ROW = {"FORCED": True, "KEEP_SELF": True, **FUSED}


def top(num_kv: int) -> Any:
    block, rest = plan_kernels._pieces(num_kv)
    options = {**ROW, "BLOCK_N": block, "BLOCK_REST": rest, "num_warps": 1 if num_kv < 2048 else 4}
    arguments = [FLOATS, torch.uint8, INTS, INTS, num_kv, 512, num_kv, 64, 1, 0]
    return plan_kernels._top_kernel.warmup(*arguments, grid=(1,), **options)


def mark() -> Any:
    return plan_kernels._mark_kernel.warmup(INTS, INTS, INTS, 512, 512, 64, 17, grid=(1,), BLOCK_K=64, **FUSED)


def starts() -> Any:
    return plan_kernels._starts_kernel.warmup(INTS, INTS, 512, 17, grid=(1,), BLOCK_C=1024, **FUSED)


def readers() -> Any:
    return plan_kernels._readers_kernel.warmup(INTS, INTS, INTS, 512, 512, 64, 17, grid=(1,), BLOCK_R=512, **FUSED)


def scores() -> Any:
    strides = (65536, 128, 1536, 1)
    return select_kernels._scores_kernel.warmup(
        FLOATS, FLOATS, FLOATS, strides, strides, 512, 12, 512, 512, 0.1, grid=(1,),
        GROUP=1, HEAD_DIM=128, BLOCK=64, BLOCK_D=32, **select_kernels._LAUNCH,
    )  # fmt: skip


KERNELS = {
    "top-64": lambda: top(64), "top-1215": lambda: top(1215), "top-16384": lambda: top(16384),
    "mark": mark, "starts": starts, "readers": readers, "scores": scores,
}  # fmt: skip


@pytest.fixture(params=[80, 120, "gfx942"])
def arch(request: pytest.FixtureRequest) -> Iterator[int | str]:
    kernels = [getattr(plan_kernels, f"_{name}_kernel") for name in ("top", "mark", "starts", "readers")]
    with absent_gpu(request.param, [*kernels, select_kernels._scores_kernel]):
        yield request.param


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_compiles_in_silence(arch: int | str, kernel: Callable[[], Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "AnnAssign")  # Triton 3.7 on Python 3.13, of itself
        assert kernel().metadata.shared <= SHARED_MEMORY[arch] * 1024


def test_layouts_say_whether_products_are_fused() -> None:
    assert layout_kernels._options(128, 64)["enable_fp_fusion"] is True
