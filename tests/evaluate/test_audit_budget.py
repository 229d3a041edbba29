"""The division of a total density over heads."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openvsa.errors import BudgetError
from openvsa.evaluate.audit_budget import Curve, allocate, between, convex_hull


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
        ((), "ascending"),
        (((0.5, 1.0), (0.4, 2.0), (1.0, 0.0)), "ascending"),
        (((0.1, 1.0), (0.5, 0.0)), "the last of them 1"),
    ],
)
def test_a_curve_that_is_none(points: tuple[tuple[float, float], ...], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        Curve(points)


@pytest.mark.parametrize(("density", "message"), [(0.0, r"in \(0, 1\], got 0"), (0.1, "below the first measured")])
def test_a_density_that_cannot_be_spent(density: float, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        allocate({"a": [Curve(((0.5, 1.0), (1.0, 0.0)))]}, density, 12)


def test_the_way_from_one_table_to_another_keeps_the_total() -> None:
    start, end = {"a": (0.5, 0.5), "b": (0.5, 0.5)}, {"a": (0.1, 0.9), "b": (0.4, 0.6)}
    assert between(start, end, 1.0, 10) == end
    assert between(start, end, 0.0, 10) == start
    half = between(start, end, 0.5, 10)
    assert half == {"a": (0.3, 0.7), "b": (0.5, 0.5)}, "4.5 and 5.5 blocks: the first of equals is rounded up"
    for share in (0.25, 0.3, 0.9):
        assert sum(round(10 * one) for heads in between(start, end, share, 10).values() for one in heads) == 20


def test_a_single_tile_is_read_whole() -> None:
    assert allocate({"a": [Curve(((1.0, 0.0),))] * 2}, 0.5, 1) == {"a": (1.0, 1.0)}
