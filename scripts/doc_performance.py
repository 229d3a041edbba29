"""Write docs/performance.md, and the table of the op in README.md, from the newest result files in benchmarks/results.

python scripts/doc_performance.py            # write them
python scripts/doc_performance.py --check    # fail if a page on disk differs

Of each machine and case the newest file that has it counts. Tables appear where there is data.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from doc_tables import table, with_table
from openvsa.bench.cases import CASES
from openvsa.bench.plans import PATTERNS
from openvsa.bench.record import load

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"

# What this project asks of itself on a Hopper GPU (B=1, H=12, S=32768, D=128, bf16, density 1/8), as shares of the
# TFLOP/s of FlashAttention-4 dense in the same run: what is measured, the case, whose, the pass, the best kernel that
# could be installed before, the least, the aim.
TARGETS = (
    ("64×64 forward", "s32k", None, "forward", 0.62, 0.75, 0.85),
    ("64×64 backward", "s32k", None, "backward", 0.49, 0.65, 0.80),
    ("128×64 forward", "s32k-128x64", None, "forward", 0.80, 0.82, 0.88),
    ("128×128 forward", "s32k-128x128", None, "forward", 0.88, 0.85, 0.92),
    ("128×128 backward", "s32k-128x128", None, "backward", 0.83, 0.80, 0.88),
    ("64×64 forward, Triton", "s32k", "triton", "forward", 0.59, 0.60, 0.65),
    ("64×64 backward, Triton", "s32k", "triton", "backward", 0.49, 0.55, 0.60),
)
WHOLE_OP = ("whole VSA op, forward", "s32k", "forward", "4.5×", "6×")
MEMORY = 1.15
# What the README shows of a GPU: the op, the case, the backend.
SHORT = (
    ("attention", "s32k", "hopper"),
    ("attention", "s32k", "triton"),
    ("attention", "s32k-128x64", "hopper"),
    ("attention", "s32k-128x128", "hopper"),
    ("attention", "s32k-128x128", "fa4"),
    ("vsa", "s32k", "hopper"),
    ("vsa", "s32k-128x64", "hopper"),
    ("vsa", "wan-480p-fit", "hopper"),
    ("vsa", "wan-480p-fit", "triton"),
)
PASSES = ("forward", "backward", "both")

Row = dict[str, Any]


@dataclass(frozen=True)
class Measured:
    """One case in the newest file that has it."""

    file: Path
    record: dict[str, Any]
    case: dict[str, Any]

    @property
    def date(self) -> str:
        return self.record["date"][:10]

    @property
    def rival(self) -> str | None:
        """The dense kernel that the rest is compared with: FA4, and where it was not measured the fastest forward."""
        dense = [row for row in self.case["rows"] if row["kind"] == "dense" and row["pass"] == "forward"]
        if not dense:
            return None
        names = [row["contender"] for row in dense]
        return "dense-fa4" if "dense-fa4" in names else min(dense, key=lambda row: row["ms"])["contender"]

    def rows(self, **wanted: object) -> list[Row]:
        return [row for row in self.case["rows"] if all(row[key] == value for key, value in wanted.items())]

    def best(self, what: str, plan: str, op: str = "attention", contender: str | None = None) -> Row | None:
        """The fastest of this package's backends for a plan."""
        found = self.rows(kind="openvsa", op=op, plan=plan) if contender is None else self.rows(
            kind="openvsa", op=op, plan=plan, contender=contender
        )  # fmt: skip
        found = [row for row in found if row["pass"] == what]
        return min(found, key=lambda row: row["ms"]) if found else None


def newest() -> dict[str, dict[str, Measured]]:
    """By machine and case name, in the order of the cases."""
    found: dict[str, dict[str, Measured]] = {}
    files = [(path, load(path)) for path in RESULTS.glob("bench-*.json")]
    for path, record in sorted(files, key=lambda pair: pair[1]["date"]):
        for case in record["cases"]:
            if case["passed"] and case["rows"]:
                found.setdefault(record["machine"]["device"], {})[case["name"]] = Measured(path, record, case)
    order = list(CASES)
    return {
        machine: dict(sorted(cases.items(), key=lambda item: order.index(item[0])))
        for machine, cases in sorted(found.items(), key=lambda item: (item[0].startswith("CPU"), item[0]))
    }


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def share(row: Row | None, rival: str | None) -> str:
    return f"{row['of'][rival]:.2f} ({row['contender']})" if row and rival else ""


def targets(cases: dict[str, Measured]) -> str:
    patterns = [f"{pattern} 1/8" for pattern in PATTERNS]
    lines = []
    for label, name, contender, what, before, must, aim in TARGETS:
        if (case := cases.get(name)) is None:
            continue
        found = [share(case.best(what, plan, contender=contender), case.rival) for plan in patterns]
        if any(found):
            lines.append([label, f"{before:.2f}", f"{must:.2f}", f"{aim:.2f}", *found])
    label, name, what, must, aim = WHOLE_OP
    case = cases.get(name)
    row = case.best(what, "selected 1/8", op="vsa") if case else None
    if case and row and case.rival:
        times = f"{row['faster'][case.rival]:.2f}× ({row['contender']})"
        lines.append([f"{label}, times as fast", "", must, aim, "", "", times])
    if not lines:
        return ""
    rivals = {cases[name].rival for _, name, *_ in TARGETS if name in cases}
    head = ["", "best before", "at least", "aim", *(f"`{pattern}` lists" for pattern in PATTERNS)]
    note = (
        f"Share of the TFLOP/s of {' and '.join(sorted(filter(None, rivals)))} in the same run; head size 128, density "
        "1/8, in brackets the backend. The targets are shares of FlashAttention-4 dense on a Hopper GPU; *best before* "
        "is what the best kernel that could be installed reached on an H100 when they were set.\n\n"
    )
    return "#### Against the targets\n\n" + note + table(head, lines)


def every_row(cases: dict[str, Measured]) -> str:
    text = ""
    for name, case in cases.items():
        if "densities" in name:
            continue
        rival, about = case.rival, case.case
        head = ["op", "lists", "kernel", *(f"{p}, {u}" for p in PASSES[:2] for u in ("ms", "TFLOP/s", "share"))]
        head += ["both, ms", "times as fast", "memory, GiB"]
        grouped: dict[tuple[str, ...], dict[str, Row]] = {}
        for row in case.rows():
            if row["kind"] != "ceiling":
                grouped.setdefault((row["op"], row["plan"], row["contender"]), {})[row["pass"]] = row
        lines = []
        for key, by_pass in grouped.items():
            cells: list[str] = []
            for what in PASSES[:2]:
                row = by_pass.get(what)
                known = row is not None and rival is not None
                cells += [number(row["ms"]), number(row["tflops"])] if row else ["", ""]
                cells.append(f"{row['of'][rival]:.2f}" if known else "")
            both = by_pass.get("both")
            cells.append(number(both["ms"]) if both else "")
            cells.append(f"{both['faster'][rival]:.2f}×" if both and rival else "")
            peak = both["peak_bytes"] if both else None
            cells.append(f"{peak / 2**30:.2f}" if peak else "")
            lines.append([*key, *cells])
        text += f"#### `{name}`\n\n{shape(about)} Shares and times as fast are against {rival}. "
        text += f"From `{case.file.name}`.\n\n{table(head, lines)}\n"
    return text


# Of the blocks, in columns.
_SHARES = tuple(Fraction(share) for share in ("1/16", "1/8", "1/4", "1/2", "3/4"))


def sweeps(cases: dict[str, Measured]) -> str:
    lines = []
    for name, case in cases.items():
        if "densities" not in name or case.rival is None:
            continue
        for op, first in (("attention", "random"), ("vsa", "selected")):
            for what in PASSES:
                points = dict(_points(case, op, first, what))
                if points:
                    tokens, dim = f"{case.case['tokens']:,}", str(case.case["head_dim"])
                    cells = [f"{points[d]:.2f}×" if d in points else "" for d in _SHARES]
                    lines.append([tokens, dim, op, what, *cells, break_even(points)])
    if not lines:
        return ""
    head = ["tokens", "head size", "op", "pass", *(str(share) for share in _SHARES), "break-even density"]
    rivals = sorted({case.rival for name, case in cases.items() if "densities" in name and case.rival})
    note = (
        f"How many times as fast as {' and '.join(rivals)} the fastest backend is, by the share of blocks kept (random "
        "lists; `vsa` is the whole op). At the break-even density both take equally long; *about*: beyond what was "
        "measured, by a line through the last two.\n\n"
    )
    return "#### By length and density\n\n" + note + table(head, lines)


def _points(case: Measured, op: str, first: str, what: str) -> Iterator[tuple[float, float]]:
    for plan in dict.fromkeys(row["plan"] for row in case.rows(op=op, kind="openvsa")):
        pattern, share = plan.split(" ")
        row = case.best(what, plan, op=op)
        if pattern == first and row and case.rival:
            yield float(Fraction(share)), row["faster"][case.rival]


def break_even(points: dict[float, float]) -> str:
    """Where the speed-up is 1, by a straight line through the times at the two densities around it, or at the two
    largest ones: then with "about"."""
    known = sorted(points.items())
    if known[0][1] < 1:
        return f"below {known[0][0]:.3g}"
    if len(known) == 1:
        return f"above {known[0][0]:.3g}"
    around = next(((low, high) for low, high in pairwise(known) if high[1] < 1), None)
    (low, fast), (high, slow) = around or known[-2:]
    before, after = 1 / fast, 1 / slow
    found = low + (high - low) * (1 - before) / (after - before)
    return f"{'' if around else 'about '}{found:.2f}"


def memory(cases: dict[str, Measured]) -> str:
    lines = []
    for name, case in cases.items():
        [dense] = case.rows(contender="dense-flash", **{"pass": "both"}) or [None]
        if dense is None or dense["peak_bytes"] is None:
            continue
        most: dict[tuple[str, str], int] = {}  # over the lists, which hardly differ
        for row in case.rows(kind="openvsa", **{"pass": "both"}):
            who = row["op"], row["contender"]
            most[who] = max(most.get(who, 0), row["peak_bytes"])
        for (op, contender), peak in most.items():
            lines.append(
                [f"`{name}`", op, contender, f"{peak / 2**30:.2f}", f"{peak / dense['peak_bytes']:.2f}", case.date]
            )
    if not lines:
        return ""
    head = ["case", "op", "kernel", "GiB", "of dense-flash", "measured"]
    note = (
        f"Most memory in use in a forward and backward pass, inputs and lists included; at most {MEMORY} is asked. "
        "`vsa` is the whole op with a branch weight.\n\n"
    )
    return "#### Memory\n\n" + note + table(head, lines)


def shape(case: dict[str, Any]) -> str:
    """The problem in words."""
    lattice = f"A lattice of {'×'.join(map(str, case['grid']))}" if len(case["grid"]) > 1 else ""
    text = f" after {case['prefix']} text tokens: " if case["prefix"] else ": " if lattice else ""
    grouped = f" over {case['kv_heads']} key heads" if case["kv_heads"] != case["heads"] else ""
    return (
        f"{lattice}{text}{case['tokens']:,} tokens, blocks of "
        f"{case['blocks'].replace('x', '×')}, {case['heads']} heads of {case['head_dim']}{grouped}, {case['dtype']}."
    )


def runs(cases: dict[str, Measured]) -> str:
    lines = []
    for case in {case.file: case for case in cases.values()}.values():
        record = case.record
        versions = [f"{name} {v}" for name, v in record["versions"].items() if v and name in _SHOWN_VERSIONS]
        lines.append(
            [
                f"`{case.file.name}`",
                record["date"][:10],
                f"`{record['commit']}`",
                ", ".join(versions),
                f"`{record['command']}`",
            ]
        )
    return table(["file", "date", "commit", "versions", "command"], lines)


_SHOWN_VERSIONS = ("torch", "triton", "cuda", "cudnn", "flash-attn-4", "fastvideo-kernel")


def page() -> str:
    text = ""
    for machine, cases in newest().items():
        parts = (targets(cases), sweeps(cases), every_row(cases), memory(cases))
        text += f"### {machine}\n\n{runs(cases)}\n" + "\n".join(part for part in parts if part) + "\n"
    return text.rstrip() + "\n"


def short() -> str:
    """For the README: TFLOP/s, in brackets the share of the dense kernel, and how many times as fast as that."""
    machine, cases = next(iter(newest().items()))
    lines, files, rivals = [], {}, set()
    for op, name, contender in SHORT:
        case = cases.get(name)
        if case is None or case.rival is None:
            continue
        plan = "model 1/8" if op == "attention" else "selected 1/8"
        found = {row["pass"]: row for row in case.rows(op=op, plan=plan, contender=contender)}
        if not found:
            continue
        files[case.file.name] = None
        rivals.add(case.rival)
        cells = []
        for what in PASSES[:2]:
            row = found.get(what)
            cells.append(f"{row['tflops']:.0f} ({row['of'][case.rival]:.2f})" if row else "")
            cells.append(f"{row['faster'][case.rival]:.1f}×" if row else "")
        about = case.case
        what = "attention" if op == "attention" else "whole VSA op"
        lattice = "×".join(map(str, about["grid"]))
        lines.append([what, lattice, about["blocks"].replace("x", "×"), f"`{contender}`", *cells])
    head = ["", "lattice", "blocks", "backend", "forward", "", "backward", ""]
    said = ", ".join(f"`{name}`" for name in files)
    note = f"\n{machine}, against {' and '.join(sorted(rivals))} in the same run; from {said}.\n"
    return table(head, lines) + note


def main() -> int:
    stale = []
    for path, name, content in ((PAGE, "results", page()), (README, "op", short())):
        old = path.read_text()
        fresh = with_table(old, name, content)
        if fresh != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"stale: {', '.join(stale)}; run python scripts/doc_performance.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
