"""The command `openvsa bench --model`: one denoising step of whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from openvsa.bench.model_cases import MODELS, find_models
from openvsa.bench.model_run import ModelOptions, by_density, one_step, run_models
from openvsa.bench.record import commit as this_commit
from openvsa.cli.bench import find_device, make_console, print_end
from openvsa.cli.generate_pair import sparsity
from openvsa.errors import BudgetError, OpenVSAError, require
from openvsa.integrations.branch import check_settings
from openvsa.integrations.presets import PRESETS

__all__ = ["list_models", "parse_options", "run_bench_models"]


def parse_options(
    densities: list[str] | None, modes: list[str] | None, profile: bool, config: str | None
) -> ModelOptions:
    """From what was typed; None for the default.

    Raises:
        BudgetError: a density is out of range, or is not for these settings.
        OpenVSAError: it is no number, there is no such mode, or no such file or preset.
    """
    given: dict[str, Any] = {"profile": profile}
    if modes is not None:
        given["modes"] = tuple(modes)
    try:
        shares = None if densities is None else [float(text) for text in densities]
    except ValueError:
        raise OpenVSAError(f"--density must be numbers with commas between, got {','.join(densities or ())}") from None
    if config is None:
        return ModelOptions(**given) if shares is None else ModelOptions(**given, sparse=by_density(shares))

    name = config if config in PRESETS else Path(config).stem
    base = one_step(sparsity(None, config, 1))
    sparse = {name: base}
    if shares is not None:
        if base.layers:
            raise BudgetError(f"the settings {config} have densities by layer; leave out --density, or these")
        sparse = {f"{name}, density {share:g}": replace(base, density=share, budget=None) for share in shares}
        for one in sparse.values():
            check_settings(one, branch=False)
    return ModelOptions(**given, sparse=sparse, config=name)


def run_bench_models(
    *,
    models: list[str],
    device: str | None,
    options: ModelOptions,
    out: Path | None,
    seconds: float | None,
    commit: str | None,
    command: str,
    console: Console | None = None,
) -> int:
    """Measure and print; the exit status: 1 if a model failed its gate.

    Raises:
        OpenVSAError: a case or device does not exist, or Diffusers is not installed.
    """
    console = console or make_console()
    where = find_device(device)
    chosen = find_models(models, where.type)
    require("diffusers", extra="diffusers")

    def say(text: str) -> None:
        if console.is_terminal:
            console.print(text, style="dim", highlight=False)

    record, path = run_models(
        chosen, where, options, out=out, command=command, commit=commit or this_commit(), seconds=seconds, say=say,
        on_case=lambda found: print_model(found, console),
    )  # fmt: skip
    print_end(record, path, console)
    return 0 if all(case["passed"] for case in record["cases"]) else 1


def list_models(console: Console | None = None) -> None:
    """Print the models that can be measured."""
    console = console or make_console()
    table = Table("model", "what", "lattice", title="models (--model)", box=None, title_justify="left")
    for case in MODELS.values():
        table.add_row(case.name, f"{case.device_type}: {case.note}", "x".join(map(str, case.grid)))
    console.print(table, highlight=False)


def print_model(found: dict[str, Any], console: Console) -> None:
    """The results of one model as a table, and where the time went."""
    about = found.get("attention")
    if about is None:
        console.print(f"{found['name']} FAILED: {'; '.join(found['failed'])}", markup=False, highlight=False)
        return
    q_tiles = f"query blocks of {'x'.join(map(str, about['q_tiles']))} tiles, " if max(about["q_tiles"]) > 1 else ""
    console.print(
        f"[bold]{found['name']}[/bold]  {found['note']}; {found['layers']} layers, {found['parameters'] / 1e9:.3g} B "
        f"parameters; {about['tokens']} tokens, tile {'x'.join(map(str, about['tile']))}, {about['tiles']} tiles, "
        f"{q_tiles}H={about['heads']} D={about['head_dim']} {found['dtype']}; {found['seconds']:g} s",
        highlight=False,
    )
    gate = ", ".join(f"{name} {change:.1e}" for name, change in found["gate"].items())
    console.print(f"  change of the output against dense-{about['dense']}: {gate}", highlight=False)
    for left in found["left_out"]:
        console.print(f"  without {left['what']}: {'; '.join(left['reasons'])}", markup=False, highlight=False)
    for why in found["failed"]:
        console.print(f"  FAILED: {why}", markup=False, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("mode", no_wrap=True)
    table.add_column("variant", no_wrap=True)
    for head in ("ms", "quartiles", "faster", "host ms", "peak GiB", "first s"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in found["rows"]:
        peak, first = row.get("peak_bytes"), row.get("first_seconds")
        table.add_row(
            row["mode"], row["variant"], f"{row['ms']:.3f}", f"{row['low']:.3f} {row['high']:.3f}",
            f"{row['faster']:.2f}x" if row["faster"] else "", f"{row['host_ms']:.2f}",
            f"{peak / 2**30:.2f}" if peak else "", f"{first:.2f}" if first else "",
        )  # fmt: skip
    console.print(table)
    stages = ", ".join(f"{stage} {spent:.1f}" for stage, spent in found["stages"])
    console.print(f"  seconds: {stages}", highlight=False, soft_wrap=True)
    for profile in found.get("profile", ()):
        groups = ", ".join(f"{name} {value:.1f}" for name, value in profile["groups"].items())
        console.print(f"  {profile['mode']}, {profile['variant']}: {groups} ms", highlight=False, soft_wrap=True)
        for name, count, milliseconds in profile["top"][:10]:
            console.print(f"    {milliseconds:9.2f} ms {count:5d} x {name[:100]}", markup=False, highlight=False)
