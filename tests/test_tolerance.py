"""The tolerance lets rounding pass and nothing else."""

from __future__ import annotations

import pytest
import torch

from tolerance import FORWARD, excess

torch.manual_seed(0)
EXACT = torch.randn(64, 32, dtype=torch.float64)
NAIVE = (EXACT * (1 + 1e-2 * torch.randn_like(EXACT))).bfloat16()


def test_rounding_passes() -> None:
    assert excess(EXACT.bfloat16(), NAIVE, EXACT, FORWARD) == []
    assert excess(EXACT.bfloat16(), EXACT.bfloat16(), EXACT, FORWARD) == []
    assert excess(EXACT.float(), EXACT.float(), EXACT, FORWARD) == []


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_one_wrong_entry_is_seen(value: float) -> None:
    wrong = EXACT.bfloat16()
    wrong[3, 5] = value if value != 2.0 else wrong[3, 5] + 0.5
    assert excess(wrong, NAIVE, EXACT, FORWARD)


def test_a_small_error_everywhere_is_seen() -> None:
    wrong = (EXACT * 1.03).bfloat16()
    assert any("rms" in why for why in excess(wrong, NAIVE, EXACT, FORWARD))


def test_a_worse_dtype_is_seen() -> None:
    assert excess(EXACT.bfloat16().float(), EXACT.float(), EXACT, FORWARD)


def test_infinities_must_match() -> None:
    exact = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert excess(exact.float(), exact.float(), exact, FORWARD) == []
    assert excess(torch.tensor([1.0, -1e30]), exact.float(), exact, FORWARD)
    assert excess(torch.tensor([1.0, float("nan")]), exact.float(), exact, FORWARD)


def test_cancelled_terms_have_an_ulp_of_their_accumulator() -> None:
    exact, terms = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    noise = torch.full((4,), 1e-8)
    assert excess(noise, torch.zeros(4), exact, FORWARD)
    assert excess(noise, torch.zeros(4), exact, FORWARD, terms) == []
    assert excess(100 * noise, torch.zeros(4), exact, FORWARD, terms)
    assert excess((100 * noise).bfloat16(), torch.zeros(4).bfloat16(), exact, FORWARD, terms)


def test_shapes_must_match() -> None:
    assert excess(torch.zeros(3), torch.zeros(4), torch.zeros(4, dtype=torch.float64), FORWARD)
