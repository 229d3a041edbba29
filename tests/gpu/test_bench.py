"""The benchmark on a GPU: events, memory, dense kernels beside ours, and the gate on the timed problem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from openvsa.bench.cases import Case, PlanSpec
from openvsa.bench.contenders import find_contenders
from openvsa.bench.run import run

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)
SMALL = Case("small", (9, 16, 18), (4, 4, 4), heads=4, plans=(PlanSpec("random", 0.25), PlanSpec("model", 0.25)))


@pytest.mark.parametrize(
    "case",
    [SMALL, replace(SMALL, q_tiles=(2, 1, 1), head_dim=64), replace(SMALL, prefix=70, kv_heads=2)],
    ids=["video", "mixed-tiles", "text"],
)
def test_a_case_is_gated_and_timed(case: Case) -> None:
    chosen = find_contenders(["triton", "dense-cudnn", "dense-flash"], "cuda")
    record, _ = run([case], chosen, DEVICE, out=None, command="test", commit=None, case_seconds=0.1)
    [found] = record["cases"]
    assert found["failed"] == []
    timed = {(row["op"], row["contender"], row["pass"]) for row in found["rows"]}
    for what in ("forward", "backward", "both"):
        assert {("attention", "triton", what), ("vsa", "triton", what), ("attention", "dense-flash", what)} <= timed
    for row in found["rows"]:
        assert row["ms"] > 0
        assert (row["peak_bytes"] is not None) == (row["pass"] == "both")
    assert torch.cuda.get_device_name() == record["machine"]["device"]
