"""The command `openvsa bench`: measure, list, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from openvsa.bench.cases import CASES, SUITES, Case, find_cases
from openvsa.bench.compare import changes, newly_failed, newly_left_out, versions_changed
from openvsa.bench.contenders import Contender, contenders, default_contenders, find_contenders
from openvsa.bench.record import MODEL_SCHEMA, SCHEMA, load
from openvsa.bench.record import commit as this_commit
from openvsa.bench.run import run
from openvsa.errors import OpenVSAError
from openvsa.ops.capability import Problem
from openvsa.plan import BlockPlan

__all__ = ["compare_files", "find_device", "list_all", "make_console", "print_end", "run_bench"]

# The dense kernel that ratios are shown to: the first of these that was measured.
_RIVALS = ("dense-fa4", "dense-cudnn", "dense-flash")
_WIDE = 150


def run_bench(
    *,
    cases: list[str],
    suite: str,
    names: list[str] | None,
    device: str | None,
    out: Path | None,
    seconds: float | None,
    commit: str | None,
    command: str,
    console: Console | None = None,
) -> int:
    """Measure and print; the exit status: 1 if a backend failed its gate, or a contender of `names` was measured in no
    case.

    Raises:
        OpenVSAError: a case, suite, contender or device does not exist, or `out` cannot be a folder.
    """
    console = console or make_console()
    where = find_device(device)
    chosen, who = find_cases(tuple(cases), suite, where.type), find_contenders(names, where.type)
    columns = (MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    # Drawn when something happens: a drawing thread would take its share of the processor from what is being timed.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("cases", total=len(chosen))

        def say(text: str) -> None:
            if console.is_terminal:
                progress.update(task, description=text, refresh=True)

        def show(found: dict[str, Any]) -> None:
            progress.advance(task)
            print_case(found, console)

        record, path = run(
            chosen, who, where, out=out, command=command, commit=commit or this_commit(), seconds=seconds,
            say=say, on_case=show,
        )  # fmt: skip
    print_end(record, path, console)
    failed = [case["name"] for case in record["cases"] if not case["passed"]]
    if failed:
        console.print(f"not timed, because the correctness gate failed: {', '.join(failed)}", highlight=False)
    measured = {row["contender"] for case in record["cases"] for row in case["rows"]}
    absent = [name for name in names or () if name not in measured] if len(failed) < len(record["cases"]) else []
    if absent:
        console.print(f"asked for, but measured in no case: {', '.join(absent)} (why: see above)", highlight=False)
    return 1 if failed or absent else 0


def print_end(record: dict[str, Any], path: Path | None, console: Console) -> None:
    """What a run left out for lack of time, and where its results are."""
    if record["not_run"]:
        spent = record["settings"]["seconds"]
        console.print(f"{spent:g} s are spent; not run: {', '.join(record['not_run'])}", highlight=False)
    if path is not None:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)


def compare_files(before: Path, after: Path, threshold: float, console: Console | None = None) -> int:
    """Print what changed by more than `threshold`; the exit status: 1 if something of ours got slower by more, or fails
    its correctness gate or cannot run that did before.

    Raises:
        OpenVSAError: a file cannot be read, or the two cannot be compared.
    """
    console = console or make_console()
    records = load(before, SCHEMA, MODEL_SCHEMA), load(after, SCHEMA, MODEL_SCHEMA)
    found = changes(*records)
    for path, record in zip((before, after), records, strict=True):
        versions = ", ".join(f"{name} {record['versions'].get(name)}" for name in ("torch", "triton"))
        console.print(
            f"{path.name}: commit {record['commit']}, {versions}", markup=False, highlight=False, soft_wrap=True
        )
    other = versions_changed(*records)
    if other:
        console.print(f"not the package alone has changed: {'; '.join(other)}", highlight=False, soft_wrap=True)
    table = Table("case", "op", "contender", "plan", "pass", "before", "after", "time", "", box=None)
    slower = [change for change in found if change.is_slower(threshold)]
    shown = [c for c in found if c.ratio is not None and abs(c.ratio - 1) > threshold]
    for c in shown:
        verdict = "slower" if c in slower else ("slower (not ours)" if (c.ratio or 0) > 1 else "faster")
        table.add_row(
            c.case, c.op, c.contender, c.plan, c.what, f"{c.before:.3f}", f"{c.after:.3f}", f"x{c.ratio:.3f}", verdict
        )
    if shown:
        console.print(table)
    for path, lacks in ((before, "after"), (after, "before")):
        alone = dict.fromkeys(f"{c.case} {c.contender}" for c in found if getattr(c, lacks) is None)
        if alone:
            console.print(f"only in {path.name}: {', '.join(alone)}", markup=False, highlight=False, soft_wrap=True)
    failed = newly_failed(*records)
    for case, why in failed.items():
        console.print(f"{case} fails its correctness gate now: {'; '.join(why)}", markup=False, highlight=False)
    left_out = newly_left_out(*records)
    for who, why in left_out.items():
        console.print(f"{who} cannot run now: {'; '.join(why)}", markup=False, highlight=False, soft_wrap=True)
    compared = [change for change in found if change.ratio is not None]
    console.print(
        f"{len(compared)} compared, {len(shown)} changed by more than {threshold:.0%}, {len(slower)} of ours slower; "
        f"{len(found) - len(compared)} are in one file only",
        highlight=False,
    )
    return 1 if slower or failed or left_out else 0


def list_all(device: str | None, console: Console | None = None) -> None:
    """Print cases, suites and contenders, these with what keeps them from running here."""
    console = console or make_console()
    where = find_device(device)
    cases = Table("case", "what", "note", title="cases", box=None, title_justify="left")
    for case in CASES.values():
        cases.add_row(case.name, f"{case.device_type}: {case}", case.note)
    suites = Table("suite", "cases", title=f"suites on {where.type}", box=None, title_justify="left")
    for name, members in SUITES[where.type].items():
        suites.add_row(name, ", ".join(members))
    who = Table("contender", "what", "default", "why not", title="contenders", box=None, title_justify="left")
    defaults = default_contenders(where.type)
    typical = find_cases((), "quick", where.type)[0]
    for contender in contenders().values():
        reasons = "; ".join(_reasons(contender, typical, where))
        who.add_row(contender.name, contender.summary, "yes" if contender.name in defaults else "no", escape(reasons))
    console.print(cases, suites, who, highlight=False)


def find_device(name: str | None) -> torch.device:
    """The device of that name, or a GPU if there is one and else the CPU."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise OpenVSAError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in SUITES:
        raise OpenVSAError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise OpenVSAError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def make_console() -> Console:
    """As wide as the terminal; wide enough for a table where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def print_case(found: dict[str, Any], console: Console) -> None:
    """The results of one case as a table, and who is not in it."""
    console.print(
        f"[bold]{found['name']}[/bold]  {'x'.join(map(str, found['grid']))} = {found['tokens']} tokens, blocks "
        f"{found['blocks']}, B={found['batch']} H={found['heads']}/{found['kv_heads']} D={found['head_dim']} "
        f"{found['dtype']}; {found['seconds']:g} s",
        highlight=False,
    )
    for failure in found["failed"]:
        console.print(f"  gate FAILED: {failure['contender']}: {failure['why']}", markup=False, highlight=False)
    if found["rows"]:
        console.print(_table(found["rows"]))
    for left in found["left_out"]:
        text = (
            f"  without {left['contender']} ({left['pass']}; {', '.join(left['plans'])}): {'; '.join(left['reasons'])}"
        )
        console.print(text, markup=False, highlight=False)


def _table(rows: list[dict[str, Any]]) -> Table:
    measured = {row["contender"] for row in rows}
    rival = next((name for name in _RIVALS if name in measured), None)
    table = Table(box=None, pad_edge=False)
    for name in ("op", "contender", "plan"):
        table.add_column(name, no_wrap=True)
    passes = {"forward": "fwd", "backward": "bwd", "both": "both"}
    for short in passes.values():
        heads = [f"{short} ms", "TFLOP/s"] + ([f"of {rival[6:]}", "faster"] if rival else [])
        for head in heads if short != "both" else [heads[0], heads[-1]]:
            table.add_column(head, justify="right", no_wrap=True)
    table.add_column("peak GiB", justify="right", no_wrap=True)
    grouped: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["op"], row["contender"], row["plan"]), {})[row["pass"]] = row
    for key, by_pass in grouped.items():
        cells = []
        for name in passes:
            row = by_pass.get(name)
            width = (2 if name == "both" else 4) if rival else 2
            if row is None:
                cells += [""] * width
                continue
            tflops = f"{row['tflops']:.0f}" if row["tflops"] >= 10 else f"{row['tflops']:.3g}"
            part = [f"{row['ms']:.3f}", tflops]
            if rival:
                of, faster = row["of"].get(rival), row["faster"].get(rival)
                known = of is not None and row["kind"] != "ceiling"
                part += [f"{of:.2f}", f"{faster:.2f}x"] if known else ["", ""]
            cells += part if name != "both" else [part[0], part[-1]]
        peak = by_pass.get("both", {}).get("peak_bytes")
        table.add_row(*key, *cells, "" if peak is None else f"{peak / 2**30:.2f}")
    return table


def _reasons(contender: Contender, case: Case, device: torch.device) -> list[str]:
    """Why a contender cannot run the op of a case here; the tensors take no memory."""
    shape = (case.batch, case.layout.num_tokens, case.heads, case.head_dim)
    q = torch.zeros((), dtype=case.torch_dtype, device=device).expand(shape)
    plan = BlockPlan.dense(case.layout.q_blocks, case.layout.blocks, device)
    return contender.reasons(Problem.of(q, q, q, plan), case)
