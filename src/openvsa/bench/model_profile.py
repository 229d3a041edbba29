"""Which kernels the time of a step goes to, by the profiler of PyTorch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["GROUPS", "group_of", "kernel_times"]

# The first whose pattern is found in a kernel's name. Selection is told apart where its kernels are this package's
# own; the few elementwise kernels of a selection count as elementwise. One kernel makes the means of tiles, in every
# sparse layer, and moves tokens, where they enter and leave the layers.
GROUPS = {
    "pooling and permutation": r"^_gather_kernel|^_scatter_kernel",
    "selection": r"^_scores_kernel|^_top_kernel|^_mark_kernel|^_starts_kernel|^_readers_kernel|radixSort|topk|bitonic",
    "attention": r"^forward$|^forward_wide$|^_forward_kernel|flash|fmha|cudnn.*sdpa|sdpa|attention|mha",
    "linear": r"gemm|nvjet|cutlass|cublas|splitK|\bmm\b|addmm|conv",
    "copy and cast": r"memcpy|memset|CatArray|direct_copy",
    "norm, rope, activation": r"elementwise|triton_|norm|reduce|softmax|gelu|index|vectorized",
}
_SHOWN = 15


def kernel_times(call: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """One call under the profiler: milliseconds by group, those of no kernel ("idle", with the profiler's own cost in
    it), and the kernels that take most. On a CPU the groups are of operators."""
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    times: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    first, last = float("inf"), 0.0
    for event in profiler.events() or ():
        if on_gpu != (event.device_type == torch.autograd.DeviceType.CUDA):
            continue
        milliseconds = (event.device_time if on_gpu else event.self_cpu_time_total) / 1e3
        times[event.name] += milliseconds
        counts[event.name] += 1
        first, last = min(first, event.time_range.start), max(last, event.time_range.end)
    groups: dict[str, float] = defaultdict(float)
    for name, milliseconds in times.items():
        groups[group_of(name)] += milliseconds
    if on_gpu:
        groups["idle"] = max(0.0, (last - first) / 1e3 - sum(times.values()))
    top = sorted(times, key=lambda name: -times[name])[:_SHOWN]
    return {
        "groups": {name: round(value, 3) for name, value in sorted(groups.items(), key=lambda item: -item[1])},
        "top": [[name[:120], counts[name], round(times[name], 3)] for name in top],
    }


def group_of(kernel: str) -> str:
    """The group of a kernel by its name."""
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE)), "other")
