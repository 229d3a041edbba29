"""Sparse attention where it pays: predictions, the constants behind them, and what a model does with them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import cost_model
import fit_break_even
import openvsa
from openvsa import Budget, SparsityConfig
from openvsa.integrations import break_even
from openvsa.integrations.break_even import objection, predict, share_of
from tiny_wan import run, tiny_wan


@pytest.fixture(autouse=True)
def sparse_however_small() -> None:
    """Not here: the constants are those of the package."""


@pytest.fixture
def slow_host(tmp_path: Path) -> Iterator[None]:
    """A machine where a sparse call costs a second before it has done anything, and a dense pair a microsecond."""
    with cost_model.machine(tmp_path, dense_ms_per_pair=1e-3, sparse_ms_per_pair=1e-3, host_ms=1000.0):
        yield


def test_long_sequences_pay_and_short_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "_name", lambda device: "NVIDIA H200")
    long, short = (predict("cuda:0", tokens, 12, 128, 0.1) for tokens in (75600, 1024))
    assert long.pays
    assert not short.pays
    assert not long.assumed
    # Dense attention of 32,760 tokens in 12 heads of 128 took 9.6 ms.
    assert predict("cuda:0", 32760, 12, 128, 0.1).dense_ms == pytest.approx(9.6, rel=0.1)
    assert not predict("cuda:0", 32760, 12, 128, 1.0).pays


def test_on_a_cpu_a_short_call_costs_more_than_what_it_saves() -> None:
    # Whole ops of 8 heads of 64 at density 1/8 took 6.7 ms against 13.4 dense for 1,024 tokens, 797 against 3,589 for
    # 16,384.
    assert predict("cpu", 1024, 8, 64, 1 / 8).sparse_ms == pytest.approx(6.7, rel=0.1)
    assert predict("cpu", 16384, 8, 64, 1 / 8).sparse_ms == pytest.approx(797, rel=0.1)
    assert predict("cpu", 16384, 8, 64, 1 / 8).dense_ms == pytest.approx(3589, rel=0.1)
    assert not predict("cpu", 105, 2, 24, 0.5).pays
    # The bundled model: 6,912 tokens in 4 heads of 64.
    assert all(predict("cpu", 6912, 4, 64, density).pays for density in (0.1, 0.25, 0.5))


def test_a_tiny_model_stays_dense_and_says_why() -> None:
    model = tiny_wan()
    dense = run(model)
    with openvsa.sparsify(model, density=0.25) as handle:
        with pytest.warns(UserWarning, match=r"stays dense: 105 tokens .* SparsityConfig\(min_tokens=0\) makes it"):
            assert (run(model) == dense).all()
        report = handle.report()
    assert report.executed_density == 1.0
    assert all("105 tokens at density 0.5 would not be faster" in layer.why_dense for layer in report.layers)
    assert "dense calls of 2 layers, blocks.0.attn1 to blocks.1.attn1: 105 tokens" in str(report)


def test_an_unknown_gpu_is_taken_for_a_known_one_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(break_even, "_name", lambda device: "Some GPU")
    assert predict("cuda:0", 75600, 40, 128, 0.1).assumed
    assert "assuming it is like NVIDIA H200" in objection("cuda:0", 512, 4, 64, 0.5)


def test_the_share_of_a_budget() -> None:
    assert share_of(Budget(keep_ratio=0.25), 100) == 0.25
    assert share_of(Budget(top_k=5), 20) == 0.25
    assert share_of(Budget(top_k=50), 20) == 1.0
    assert share_of(Budget(keep_ratio=0.1, min_blocks=4), 8) == 0.5
    assert share_of(Budget(top_p=0.6), 20) == 0.6
    assert share_of((Budget(keep_ratio=0.25), Budget(keep_ratio=0.75)), 100) == 0.5


@pytest.mark.usefixtures("slow_host")
def test_what_does_not_pay_stays_dense_and_says_why() -> None:
    model = tiny_wan()  # 105 tokens are two tiles, of which a quarter is one
    dense = run(model)
    with openvsa.sparsify(model, density=0.25) as handle:
        with pytest.warns(UserWarning, match="attention stays dense: 105 tokens at density 0.5 would not be faster"):
            assert (run(model) == dense).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(model)
        report = handle.report()
    assert report.executed_density == 1.0
    assert [layer.sparse_calls for layer in report.layers] == [0, 0]
    assert report.layers[0].why_dense == (
        "105 tokens at density 0.5 would not be faster: predicted 22.1 ms dense and 1e+03 ms sparse, as measured on X"
    )
    assert "dense calls of 2 layers, blocks.0.attn1 to blocks.1.attn1: 105 tokens" in str(report)


@pytest.mark.usefixtures("slow_host")
@pytest.mark.parametrize("least", [0, 105])
def test_a_number_wins_over_the_prediction(least: int) -> None:
    model = tiny_wan()
    with openvsa.sparsify(model, density=0.25, min_tokens=least) as handle:
        run(model)
        assert [layer.sparse_calls for layer in handle.report().layers] == [1, 1]


@pytest.mark.usefixtures("slow_host")
def test_density_one_is_not_held_back() -> None:
    model = tiny_wan()
    with openvsa.sparsify(model, density=1.0) as handle:
        run(model)
        assert handle.report().layers[0].sparse_calls == 1


def test_reasons_of_the_settings_are_told_too() -> None:
    model = tiny_wan(3)
    config = SparsityConfig(density=0.25, dense_layers=(0,), layers={"blocks.1.attn1": 1.0}, min_tokens=10)
    with openvsa.sparsify(model, config=config) as handle:
        run(model)
        reasons = [layer.why_dense for layer in handle.report().layers]
    assert reasons == ["it is one of dense_layers", "its density in layers is 1", ""]
    with openvsa.sparsify(model, density=0.25, min_tokens=1000) as handle:
        run(model)
        assert handle.report().layers[0].why_dense == "min_tokens is 1000"


def test_the_constants_are_those_of_the_newest_results() -> None:
    assert fit_break_even.text() == fit_break_even.CONSTANTS.read_text()


def test_a_cpu_has_no_host() -> None:
    """A result file of a CPU has as the host's time that of the whole call, which is no least time of shorter ones."""
    known = json.loads(fit_break_even.CONSTANTS.read_text())
    assert [of["host_ms"] for of in known["cpu"]["head_dims"].values()] == [0.0]
    assert all(of["host_ms"] > 0 for of in known["NVIDIA H200"]["head_dims"].values())


def test_costs_are_found_again() -> None:
    amounts = [(1e9, 3.0, 1.0), (2e9, 1.0, 1.0), (5e9, 7.0, 1.0), (1e10, 2.0, 1.0), (3e9, 9.0, 1.0)]
    costs = (2e-9, 0.5, 0.25)
    points = [fit_break_even.Point(sum(a * c for a, c in zip(x, costs, strict=True)), x) for x in amounts]
    assert fit_break_even.fit(points, 3) == pytest.approx(costs, rel=1e-6)
    # Nothing is made faster by being there.
    points = [fit_break_even.Point(10 - x, (1.0, x)) for x in (1.0, 2.0, 3.0)]
    assert min(fit_break_even.fit(points, 2)) >= 0
    assert fit_break_even.fit([fit_break_even.Point(3.0, (6.0, 1.0))], 2) == pytest.approx([0.5, 0.0])
    assert fit_break_even.fit([], 2) == [0.0, 0.0]
