"""Time by events on a GPU and by the clock on a CPU, every contender once a round, so that drift meets all alike."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

__all__ = ["Timing", "gpu_clocks", "measure", "peak_bytes", "summary", "time_interleaved"]

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

# The GPU idles before each call for twice what the host took for it in the first round, and a millisecond more: the
# host enqueues the whole call meanwhile, so that the events enclose the device's work and not Python's.
_CYCLES_PER_MS = 2_000_000
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 30
_CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_event_reasons.active")


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call over several rounds: median, first and third quartile, and the median of the host's
    share (what Python took to enqueue it; on a CPU the whole)."""

    ms: float
    low: float
    high: float
    host_ms: float
    rounds: int


def time_interleaved(calls: dict[Key, Call], device: torch.device, seconds: float) -> dict[Key, Timing]:
    """The timing of each call. Rounds are as many as fit in `seconds`, within 3 to 30 (2 at least on a CPU); one round
    before them measures how long a round takes."""
    if device.type == "cuda":
        for call in calls.values():
            call()  # compiling would count as the host's time
    begin = time.perf_counter()
    host = {key: measure(call, device, 0.0)[1] for key, call in calls.items()}
    a_round = max(time.perf_counter() - begin, 1e-6)
    fewest = _FEWEST_ROUNDS if device.type == "cuda" else 2
    rounds = max(fewest, min(_MOST_ROUNDS, int(seconds / a_round)))
    found: dict[Key, list[tuple[float, float]]] = {key: [] for key in calls}
    keys = list(calls)
    for n in range(rounds):
        # Every round begins elsewhere: the call after one that takes much power gets a lower clock.
        first = n * len(keys) // rounds
        for key in keys[first:] + keys[:first]:
            found[key].append(measure(calls[key], device, host[key]))
    return {key: summary(times) for key, times in found.items()}


def peak_bytes(call: Call, device: torch.device, inputs: int) -> int | None:
    """Most device memory in use during `call` beyond what was in use before, plus the bytes of its `inputs`; None on a
    CPU. Call it once before, so that compiled code and workspaces that stay are not counted."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before + inputs


def gpu_clocks(device: torch.device) -> dict[str, Any] | None:
    """What nvidia-smi says about the GPU now: clocks in MHz, temperature, power and throttling; None without it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    values = [value.strip() for value in answer.strip().split(",")]
    return {name: _number(value) for name, value in zip(_CLOCKS, values, strict=False)}


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def measure(call: Call, device: torch.device, host_ms: float) -> tuple[float, float]:
    """How many milliseconds `call` took, and the host for it, of which `host_ms` are expected."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        milliseconds = (time.perf_counter() - begin) * 1e3
        return milliseconds, milliseconds
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(int((2 * host_ms + 1) * _CYCLES_PER_MS))
    start.record()
    begin = time.perf_counter()
    call()
    host = (time.perf_counter() - begin) * 1e3
    end.record()
    end.synchronize()
    return start.elapsed_time(end), host


def summary(found: list[tuple[float, float]]) -> Timing:
    """Of what `measure` has found in two rounds or more."""
    times = [ms for ms, _ in found]
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), low, high, statistics.median(host for _, host in found), len(times))
