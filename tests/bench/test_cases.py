"""The named cases are what their names say."""

from __future__ import annotations

import pytest

from openvsa import OpenVSAError
from openvsa.bench.cases import CASES, SUITES, PlanSpec, find_cases

TOKENS = {
    "s32k": 32768, "s8k-densities": 8192, "s131k-densities-d64": 131072, "wan-480p": 32760, "wan-720p": 75600,
    "hunyuan-129f": 118800, "ltx": 7392, "cogvideox": 17550 + 226, "text-128k": 131072,
}  # fmt: skip


@pytest.mark.parametrize(("name", "tokens"), TOKENS.items())
def test_tokens(name: str, tokens: int) -> None:
    assert CASES[name].layout.num_tokens == tokens


def test_blocks() -> None:
    assert CASES["s32k"].blocks == "64x64"
    assert CASES["s32k-128x64"].blocks == "128x64"
    assert CASES["s32k-128x128"].blocks == "128x128"
    assert CASES["s32k"].layout.blocks.uniform_len == 64
    assert CASES["wan-480p"].layout.blocks.uniform_len is None


@pytest.mark.parametrize(
    ("density", "name"), [(1 / 16, "1/16"), (1 / 3, "1/3"), (3 / 4, "3/4"), (0.1, "1/10"), (1.0, "1")]
)
def test_shares_have_names(density: float, name: str) -> None:
    assert str(PlanSpec("random", density)) == f"random {name}"


def test_the_densities_of_the_sweeps() -> None:
    assert [spec.density for spec in CASES["s65k-densities"].plans] == [1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4]


@pytest.mark.parametrize("device_type", SUITES)
def test_suites_hold_cases_of_their_device(device_type: str) -> None:
    for suite, names in SUITES[device_type].items():
        assert [case.name for case in find_cases((), suite, device_type)] == list(names)
    assert set(SUITES[device_type]["full"]) == {c.name for c in CASES.values() if c.device_type == device_type}


@pytest.mark.parametrize(
    ("names", "suite", "device", "match"),
    [
        (("s32",), "quick", "cuda", "no case 's32'; choose from s32k"),
        (("s32k",), "quick", "cpu", "measured on cuda, not on cpu"),
        ((), "slow", "cuda", "no suite 'slow'; choose one of quick"),
    ],
)
def test_wrong_names(names: tuple[str, ...], suite: str, device: str, match: str) -> None:
    with pytest.raises(OpenVSAError, match=match):
        find_cases(names, suite, device)


def test_a_case_checks_itself() -> None:
    with pytest.raises(OpenVSAError, match="one of random, clustered, model, got 'worst'"):
        PlanSpec("worst")
    with pytest.raises(OpenVSAError, match="density"):
        PlanSpec("random", 0)
