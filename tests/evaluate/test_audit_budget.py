"""The division of a total density over heads."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvsa.errors import BudgetError
from openvsa.evaluate.audit_budget import Curve, allocate, convex_hull


def bowed(loss: float, bend: float) -> Curve:
    return Curve(tuple((n / 6, loss * (1 - n / 6) ** bend) for n in range(1, 7)))


def test_a_bump_is_not_on_the_hull() -> None:
    assert convex_hull([(0.2, 4.0), (0.4, 3.9), (0.6, 1.0), (1.0, 0.0)]) == [(0.2, 4.0), (0.6, 1.0), (1.0, 0.0)]


@given(
    st.lists(st.tuples(st.floats(0.01, 10), st.floats(1, 4)), min_size=3, max_size=3),
    st.integers(1, 6),
)
def test_no_other_division_loses_less(heads: list[tuple[float, float]], blocks: int) -> None:
    curves = {"a": [bowed(*heads[0]), bowed(*heads[1])], "b": [bowed(*heads[2])]}
    table = allocate(curves, blocks / 6, 6)
    spent = [round(6 * share) for of_layer in table.values() for share in of_layer]
    assert sum(spent) == 3 * blocks

    def loss(division: tuple[int, ...]) -> float:
        flat = [curve for of_layer in curves.values() for curve in of_layer]
        return sum(curve.points[n - 1][1] for curve, n in zip(flat, division, strict=True))

    divisions = [d for d in itertools.product(range(1, 7), repeat=3) if sum(d) == 3 * blocks]
    assert loss(tuple(spent)) <= min(map(loss, divisions)) + 1e-9


def test_equal_heads_share_equally() -> None:
    table = allocate({"a": [bowed(1, 2)] * 2, "b": [bowed(1, 2)] * 2}, 0.5, 12)
    assert table == {"a": (0.5, 0.5), "b": (0.5, 0.5)}


def test_a_head_that_loses_nothing_gives_its_blocks_away() -> None:
    idle = Curve(((1 / 12, 0.0), (1.0, 0.0)))
    table = allocate({"a": [idle, bowed(1, 2)]}, 0.25, 12)
    assert table["a"] == pytest.approx((1 / 12, 5 / 12))


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (((0.5, 1.0),), "two or more"),
        (((0.5, 1.0), (0.4, 2.0), (1.0, 0.0)), "ascending"),
        (((0.1, 1.0), (0.5, 0.0)), "the last 1"),
    ],
)
def test_a_curve_that_is_none(points: tuple[tuple[float, float], ...], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Curve(points)


@pytest.mark.parametrize(("density", "message"), [(0.0, r"in \(0, 1\], got 0"), (0.1, "below the first measured")])
def test_a_density_that_cannot_be_spent(density: float, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        allocate({"a": [Curve(((0.5, 1.0), (1.0, 0.0)))]}, density, 12)
