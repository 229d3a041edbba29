"""The page of results says what the files say: the newest ones, and every table that there is data for."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

import doc_performance
from doc_performance import break_even
from openvsa.bench.record import SCHEMA


def row(op: str, contender: str, plan: str, what: str, ms: float, times: float, share: float) -> dict[str, Any]:
    kind = "dense" if contender.startswith("dense") else "openvsa"
    return {
        "op": op, "contender": contender, "kind": kind, "plan": plan, "pass": what, "ms": ms, "tflops": 100.0,
        "peak_bytes": 2**30 * ms if what == "both" else None,
        "of": {"dense-fa4": share, "dense-flash": 2 * share}, "faster": {"dense-fa4": times, "dense-flash": 2 * times},
    }  # fmt: skip


def record(date: str, name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    case = {"name": name, "grid": [32, 32, 32], "prefix": 0, "tokens": 32768, "blocks": "64x64", "heads": 12,
            "kv_heads": 12, "head_dim": 128, "dtype": "bfloat16", "passed": True, "rows": rows}  # fmt: skip
    return {"schema": SCHEMA, "date": date, "command": "openvsa bench", "commit": "abc", "versions": {"torch": "2"},
            "machine": {"device": "GPU"}, "cases": [case]}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(doc_performance, "RESULTS", tmp_path)
    dense = [row("attention", name, "-", p, 2.0, 1.0, 1.0) for name in ("dense-flash", "dense-fa4")
             for p in ("forward", "both")]  # fmt: skip
    slow = row("attention", "triton", "random 1/8", "forward", 9.0, 1.0, 0.11)
    fast = [
        row("attention", "triton", "random 1/8", "forward", 0.5, 4.0, 0.61),
        row("attention", "hopper", "random 1/8", "forward", 0.4, 5.0, 0.81),
        row("attention", "hopper", "random 1/8", "both", 1.0, 5.0, 0.8),
        row("attention", "hopper", "model 1/8", "both", 1.5, 4.0, 0.7),
        row("attention", "hopper", "model 1/8", "forward", 0.5, 4.25, 0.79),
        row("vsa", "hopper", "selected 1/8", "forward", 0.4, 4.75, 0.6),
    ]
    sweep = [
        row("attention", "hopper", f"random 1/{n}", "forward", 1.0, t, 0.5) for n, t in ((16, 8), (8, 4), (2, 0.8))
    ]
    for file, made in {
        "bench-old.json": record("2026-01-01T00:00:00+00:00", "s32k", [slow, *dense]),
        "bench-new.json": record("2026-02-01T00:00:00+00:00", "s32k", [*fast, *dense]),
        "bench-sweep.json": record("2026-01-15T00:00:00+00:00", "s32k-densities", [*sweep, *dense]),
    }.items():
        (tmp_path / file).write_text(json.dumps(made))
    return tmp_path


def test_the_newest_file_counts(results: Path) -> None:
    page = doc_performance.page()
    assert "| 64×64 forward | 0.62 | 0.75 | 0.85 | 0.81 (hopper) |" in page
    assert "| 64×64 forward, Triton | 0.59 | 0.60 | 0.65 | 0.61 (triton) |" in page
    assert "4.75× (hopper)" in page
    assert "0.11" not in page
    assert "bench-old.json" not in page
    assert "against dense-fa4" in page


def test_memory_and_densities(results: Path) -> None:
    page = doc_performance.page()
    # The list that takes most counts.
    assert "| `s32k` | attention | hopper | 1.50 | 0.75 | 2026-02-01 |" in page
    [line] = [line for line in page.splitlines() if line.startswith("| 32,768 | 128 | attention | forward")]
    # Times as shares of dense: 0.25 at 1/8 and 1.25 at 1/2, so 1 at 1/8 + 3/8 * 3/4.
    assert line == "| 32,768 | 128 | attention | forward | 8.00× | 4.00× |  | 0.80× |  | 0.41 |"


def test_the_readme_has_the_op_by_the_newest_files(results: Path) -> None:
    table = doc_performance.short()
    assert "| attention | 32×32×32 | 64×64 | `hopper` | 100 (0.79) | 4.2× |  |  |" in table
    assert "| whole VSA op | 32×32×32 | 64×64 | `hopper` | 100 (0.60) | 4.8× |  |  |" in table
    assert "GPU, against dense-fa4 in the same run; from `bench-new.json`." in table


def test_break_even_beyond_what_was_measured() -> None:
    assert break_even({1 / 8: 0.5, 1 / 2: 0.2}) == "below 0.125"
    assert break_even({1 / 8: 4.0}) == "above 0.125"
    # Times of .25 and .75 of dense: a line reaches 1 at 1/2 + (1/2 - 1/4) / 2.
    assert break_even({1 / 8: 8.0, 1 / 4: 4.0, 1 / 2: 4 / 3}) == "about 0.62"


def test_a_stale_page_is_noticed(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text("<!-- begin generated: results -->\n<!-- end generated: results -->\n")
    readme = tmp_path / "README.md"
    readme.write_text("<!-- begin generated: op -->\n<!-- end generated: op -->\n")
    monkeypatch.setattr(doc_performance, "PAGE", page)
    monkeypatch.setattr(doc_performance, "README", readme)
    monkeypatch.setattr(sys, "argv", ["doc_performance.py", "--check"])
    assert doc_performance.main() == 1
    monkeypatch.setattr(sys, "argv", ["doc_performance.py"])
    assert doc_performance.main() == 0
    monkeypatch.setattr(sys, "argv", ["doc_performance.py", "--check"])
    assert doc_performance.main() == 0
