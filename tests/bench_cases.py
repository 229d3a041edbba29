"""A case of the benchmark that is measured in a moment, for its tests."""

from __future__ import annotations

from openvsa.bench.cases import Case, PlanSpec

SMALL = Case(
    "small", (3, 6, 7), (2, 4, 4), heads=2, kv_heads=1, head_dim=16, dtype="float32", device_type="cpu",
    plans=(PlanSpec("random", 0.25),),
)  # fmt: skip
