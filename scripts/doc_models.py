"""Write what was measured of whole models into README.md, docs/performance.md, docs/presets.md and the families' pages.

python scripts/doc_models.py            # write it
python scripts/doc_models.py --check    # fail if a page on disk differs

Of each machine, model and mode the newest file `benchmarks/results/models-*.json` counts. Runs with settings of their
own (`--config`) are in the table of the presets alone.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import doc_performance
from doc_audit import AUDIT
from doc_tables import table, with_table
from openvsa.bench.model_cases import MODELS
from openvsa.bench.record import MODEL_SCHEMA, load
from openvsa.evaluate.audit_figures import AuditFigures
from openvsa.evaluate.comparison import Figures
from openvsa.integrations.break_even import predict_on
from openvsa.integrations.presets import PRESETS, Preset

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
RESULTS = ROOT / "benchmarks" / "results"
CONSTANTS = ROOT / "src" / "openvsa" / "integrations" / "break_even.json"

# What is asked of the sparse step at this density, in cases that have a target.
TARGET_DENSITY = 0.1
# Families, by the name of their page and preset, and the models that were measured of them.
FAMILIES = {
    "wan": (
        "wan-1.3b-480p",
        "wan-1.3b-720p",
        "wan-14b-720p",
        "wan-i2v-14b-720p",
        "wan-vace-1.3b-480p",
        "wan2.2-5b-720p",
    ),
    "hunyuan_video": ("hunyuan-720p",),
    "hunyuan_video15": ("hunyuan15-720p",),
    "ltx": ("ltx",),
    "ltx2": ("ltx2-1080p",),
    "cogvideox": ("cogvideox-480p",),
    "mochi": ("mochi-480p",),
    "cosmos": ("cosmos-720p",),
    "kandinsky5": ("kandinsky5-512p",),
    "flux": ("flux-2048",),
}
MODES = ("eager", "compiled")

Row = dict[str, Any]


@dataclass(frozen=True)
class MeasuredModel:
    """One model on one machine. Files may have it in one mode or in both: the rows of a mode all come from the newest
    file that has it, all else from the newest file."""

    file: Path
    record: dict[str, Any]
    case: dict[str, Any]
    others: tuple[tuple[Path, dict[str, Any]], ...] = ()

    def and_newer(self, file: Path, record: dict[str, Any], case: dict[str, Any]) -> MeasuredModel:
        rows, profile = [], list(case.get("profile", ()))
        told = {entry["mode"] for entry in profile}
        profile = [entry for entry in self.case.get("profile", ()) if entry["mode"] not in told] + profile
        kept = len(profile) > len(case.get("profile", ()))
        for mode in dict.fromkeys(row["mode"] for row in (*self.case["rows"], *case["rows"])):
            old, new = ([row for row in rows if row["mode"] == mode] for rows in (self.case["rows"], case["rows"]))
            rows += new or old
            kept |= not new
        others = (*self.others, (self.file, self.record)) if kept else ()
        return MeasuredModel(file, record, {**case, "rows": rows, "profile": profile}, others)

    @property
    def sources(self) -> list[tuple[Path, dict[str, Any]]]:
        return [*self.others, (self.file, self.record)]

    @property
    def machine(self) -> str:
        return self.record["machine"]["device"]

    def dense(self, mode: str) -> Row | None:
        rows = [row for row in self.case["rows"] if row["mode"] == mode and row["density"] is None]
        return min(rows, key=lambda row: row["ms"]) if rows else None

    def sparse(self, mode: str) -> dict[float, Row]:
        return {row["density"]: row for row in self.case["rows"] if row["mode"] == mode and row["density"] is not None}


def newest_models(config: str | None = None) -> list[MeasuredModel]:
    """By machine and in the order of the models: those measured with these settings, by default with none."""
    found: dict[tuple[str, str], MeasuredModel] = {}
    files = [(path, load(path, MODEL_SCHEMA)) for path in RESULTS.glob("models-*.json")]
    for path, record in sorted(files, key=lambda pair: pair[1]["date"]):
        for case in record["cases"] if record["settings"].get("config") == config else ():
            # Early records are of a few layers, and say of how many.
            if case["passed"] and case["name"] in MODELS and not case.get("whole"):
                key = record["machine"]["device"], case["name"]
                known = found.get(key)
                found[key] = known.and_newer(path, record, case) if known else MeasuredModel(path, record, case)
    order = list(MODELS)
    return [found[key] for key in sorted(found, key=lambda key: (key[0], order.index(key[1])))]


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def times(row: Row | None) -> str:
    return f"{number(row['ms'])} ({row['faster']:.2f}×)" if row else ""


def steps(found: list[MeasuredModel]) -> str:
    """One row for each model and mode; attention alone is a mode of its own, summed over the layers."""
    densities = sorted({d for one in found for mode in MODES for d in one.sparse(mode)}, reverse=True)
    ways = ["dense, ms", *(f"density {d:g}, ms" for d in densities)]
    head = ["model", "", *ways, "aim", "peak, GiB", "host, ms: dense, sparse"]
    lines = []
    for one in found:
        case, layers = one.case, one.case["layers"]
        for mode in ("attention", *MODES):
            dense, sparse = one.dense(mode), one.sparse(mode)
            if dense is None or not sparse:
                continue
            scale = layers if mode == "attention" else 1
            cells = [times({**sparse[d], "ms": sparse[d]["ms"] * scale}) if d in sparse else "" for d in densities]
            aim = f"{case['target']}× at {TARGET_DENSITY}" if case["target"] and mode != "attention" else ""
            peaks = [row["peak_bytes"] for row in (dense, *sparse.values()) if row.get("peak_bytes")]
            peak = " to ".join(dict.fromkeys(f"{x / 2**30:.1f}" for x in (min(peaks), max(peaks)))) if peaks else ""
            host = hosts(one) if mode == "eager" else ""
            label = f"{layers} × attention" if mode == "attention" else f"step, {mode}"
            kernel = dense["variant"].removeprefix("dense-")
            lines.append(
                [f"`{case['name']}`", label, f"{number(dense['ms'] * scale)} ({kernel})", *cells, aim, peak, host]
            )
    return table(head, lines)


def hosts(one: MeasuredModel) -> str:
    dense, sparse = one.dense("host"), [row["ms"] for row in one.sparse("host").values()]
    if dense is None or not sparse:
        return ""
    found = dict.fromkeys(number(ms) for ms in (min(sparse), max(sparse)))
    return f"{number(dense['ms'])}, {' to '.join(found)}"


def short() -> str:
    """Steps alone, for the README, a row for each model: dense milliseconds, and how many times as fast sparse is."""
    densities = (0.25, TARGET_DENSITY)
    columns = ("dense, ms", *(f"density {density:g}" for density in densities))
    head = [f"{mode}, {column}" for mode in MODES for column in columns]
    lines = []
    for one in newest_models():
        cells = [one.case["note"]]
        for mode in MODES:
            dense, sparse = one.dense(mode), one.sparse(mode)
            cells.append(number(dense["ms"]) if dense else "")
            cells += [f"{sparse[d]['faster']:.2f}×" if d in sparse else "" for d in densities]
        lines.append(cells)
    return table(["one denoising step", *head], lines)


def profiles(found: list[MeasuredModel]) -> str:
    """Where the time of a step goes."""
    entries = [(one, entry) for one in found for entry in one.case.get("profile", ())]
    names: dict[str, float] = {}
    for _, entry in entries:
        for name, milliseconds in entry["groups"].items():
            names[name] = names.get(name, 0.0) + milliseconds
    head = sorted(names, key=lambda name: -names[name])
    lines = [
        [f"`{one.case['name']}`", entry["mode"], entry["variant"], *(number(entry["groups"].get(n, 0.0)) for n in head)]
        for one, entry in entries
    ]
    return table(["model", "", "attention by", *head], lines)


def about(one: MeasuredModel) -> str:
    case, attention = one.case, one.case["attention"]
    grid, tile = ("×".join(map(str, x)) for x in (case["grid"], attention["tile"]))
    return (
        f"- `{case['name']}`: {case['note']}; lattice {grid}, {attention['tokens']:,} tokens in tiles of {tile}, "
        f"{attention['heads']} heads of {attention['head_dim']}, {case['dtype']}\n"
    )


def fa4_shares(machine: str, head_dim: int) -> list[float]:
    """FlashAttention-4's share of cuDNN's time forward, in the kernel cases of a machine and head size."""
    shares = []
    for measured in doc_performance.newest().get(machine, {}).values():
        ms = {row["contender"]: row["ms"] for row in measured.rows(kind="dense", **{"pass": "forward"})}
        if measured.case["head_dim"] == head_dim and {"dense-fa4", "dense-cudnn"} <= ms.keys():
            shares.append(ms["dense-fa4"] / ms["dense-cudnn"])
    return shares


def estimates(found: list[MeasuredModel]) -> str:
    """How many times as fast the sparsest step would be against FlashAttention-4 dense, where the models were measured
    without it: as if it took the least share of cuDNN's time that it takes in a kernel case of this head size."""
    lines = []
    for one in found:
        shares = fa4_shares(one.machine, one.case["attention"]["head_dim"])
        attention = one.dense("attention")
        if not shares or attention is None or attention["variant"] != "dense-cudnn":
            continue
        share = min(shares)
        for mode in MODES:
            dense, sparse = one.dense(mode), one.sparse(mode).get(TARGET_DENSITY)
            if dense and sparse:
                faster = dense["ms"] - one.case["layers"] * attention["ms"] * (1 - share)
                cells = [f"{share:.2f}", number(faster), f"{faster / sparse['ms']:.2f}×"]
                lines.append([f"`{one.case['name']}`", mode, *cells])
    if not lines:
        return ""
    head = ["model", "", "FA4's share of cuDNN's time", "dense with FA4, ms", f"density {TARGET_DENSITY}"]
    note = (
        "These runs had no FlashAttention-4. **Estimated**, not measured: dense steps with it, if it takes the least "
        "share of cuDNN's time that it takes in any kernel case of this head size below.\n\n"
    )
    return note + table(head, lines) + "\n"


def gates(found: list[MeasuredModel]) -> str:
    lines = []
    for one in found:
        changes = one.case["gate"]
        [other] = [name for name in changes if name.startswith("dense-")]
        cells = [f"{changes[other]:.1e} ({other.removeprefix('dense-')})", f"{changes['density 1']:.1e}"]
        lines.append([f"`{one.case['name']}`", *cells])
    return table(["model", "another dense kernel", "density 1"], lines)


def performance() -> str:
    text = ""
    for machine in dict.fromkeys(one.machine for one in newest_models()):
        found = [one for one in newest_models() if one.machine == machine]
        text += f"### {machine}\n\n{steps(found)}\n" + "".join(about(one) for one in found) + "\n"
        text += estimates(found)
        text += f"Change of the output against the dense kernel in use, as a share of its norm:\n\n{gates(found)}\n"
        if any(one.case.get("profile") for one in found):
            text += "Where the milliseconds of a step go, by kernels:\n\n" + profiles(found) + "\n"
        for file, record in sorted(dict(source for one in found for source in one.sources).items()):
            versions = ", ".join(f"{n} {record['versions'][n]}" for n in ("torch", "triton", "cudnn", "diffusers"))
            text += f"- `{file.name}`: {record['date'][:10]}, commit `{record['commit']}`, {versions}: "
            text += f"`{record['command']}`\n"
        text += "\n"
    return text.rstrip() + "\n"


def family(name: str) -> str:
    """The lines of one family, for its page."""
    found = [one for one in newest_models() if one.case["name"] in FAMILIES[name]]
    start = f'Settings to start from: `openvsa.SparsityConfig.preset("{name}")`, see [Presets](../presets.md).\n'
    if not found:
        return f"Not measured yet: `openvsa bench --model {','.join(FAMILIES[name])}` does it.\n\n{start}"
    machines = " and ".join(dict.fromkeys(one.machine for one in found))
    note = f"One denoising step, {machines}, random weights, batch 1. "
    note += "How it was measured: [Performance](../performance.md#whole-models).\n"
    return f"{note}\n{steps(found)}\n{start}"


def generation(preset: Preset, one: MeasuredModel, mode: str) -> float | None:
    """How many times as fast as dense the preset makes all steps of a generation, from measured times of steps and of
    attention calls; None if it was not measured at this density."""
    dense, sparse = one.dense(mode), one.sparse(mode).get(preset.density)
    calls = one.dense("attention"), one.sparse("attention").get(preset.density)
    if dense is None or sparse is None or None in calls:
        return None
    back = len(preset.dense_layers) * (calls[0]["ms"] - calls[1]["ms"])  # pyright: ignore[reportOptionalSubscript]
    first = preset.settings(None)["dense_first_steps"]
    total = first * dense["ms"] + (preset.steps - first) * (sparse["ms"] + back)
    return preset.steps * dense["ms"] / total


def speed_of(preset: Preset, one: MeasuredModel, mode: str) -> str:
    """Of all steps; empty if it was not measured."""
    factor = generation(preset, one, mode)
    return f"{factor:.2f}× (`{one.case['name']}`, {mode}, {one.machine})" if factor else ""


def speeds_with(config: str) -> list[str]:
    """Of sparse steps with a preset that makes all steps and layers sparse, measured with that preset."""
    return [
        f"{step['faster']:.2f}× (`{one.case['name']}`, {mode}, {one.machine})"
        for one in newest_models(config)
        for mode in MODES
        for step in one.sparse(mode).values()
    ]


def on_the_bundled_model(preset: Preset) -> str:
    """What the settings of a preset cost the bundled model, and gain there: means over the clips that were made by this
    preset, or by one with the same settings."""
    clips = []
    for path in sorted(RESULTS.glob("generate-*-preset-*.json")):
        figures = Figures.from_json(path.read_text())
        made_with = PRESETS[figures.settings.command.partition("--config ")[2].split()[0]]
        if isinstance(made_with, Preset) and replace(made_with, steps=preset.steps) == preset:
            clips.append(figures)
    if not clips:
        return ""
    psnr, ssim, vif = (fmean(getattr(x.quality, f"mean_{name}") for x in clips) for name in ("psnr", "ssim", "vif"))
    return f"PSNR {psnr:.1f} dB, SSIM {ssim:.3f}, VIF {vif:.3f}; {fmean(x.speedup for x in clips):.2f}×"


def presets() -> str:
    measured = newest_models()
    lines = []
    for name, preset in PRESETS.items():
        if isinstance(preset, Preset):
            first = preset.settings(None)["dense_first_steps"]
            layers = ", ".join(map(str, preset.dense_layers))
            what = [f"{preset.density:g}", f"{first} of {preset.steps}", layers]
            mine = [one for one in measured if one.case["name"] in FAMILIES.get(name, ())]
            speeds = [speed for one in mine for mode in MODES if (speed := speed_of(preset, one, mode))]
            bundled = on_the_bundled_model(preset)
        else:
            what, speeds, bundled = [f"{1 - preset.sparsity:g}", "none", "none"], speeds_with(name), ""
        lines.append([f"`{name}`", *what, "<br>".join(speeds) or "not measured", bundled or "not measured"])
    figures = AuditFigures.from_json(AUDIT.read_text())
    told = f"{figures.sparse.quality} ([what you lose](what-you-lose.md))"
    lines.append(["no preset", f"{figures.settings.density:g}", "none", "none", "", told])
    settings = ("density", "dense first steps", "dense layers")
    return table(["preset", *settings, "all steps, against dense", "on the bundled model"], lines)


def break_even() -> str:
    """From how many tokens on sparse attention is expected to pay, by machine, heads and density."""
    densities = (0.5, 0.25, 0.1)
    lines = []
    for machine in json.loads(CONSTANTS.read_text()):
        for heads, head_dim, whose in ((12, 128, "Wan 1.3B"), (40, 128, "Wan 14B"), (32, 64, "LTX-Video")):
            cells = [first_paying(machine, heads, head_dim, density) for density in densities]
            lines.append([machine, f"{heads} of {head_dim} ({whose})", *cells])
    return table(["machine", "heads", *(f"density {d:g}" for d in densities)], lines)


def first_paying(machine: str, heads: int, head_dim: int, density: float) -> str:
    """In steps of 128 tokens."""
    counts = range(128, 131073, 128)
    found = next((n for n in counts if predict_on(machine, n, heads, head_dim, density).pays), None)
    return "never" if found is None else "any" if found == counts[0] else f"{found:,}"


def pages() -> dict[Path, tuple[str, str]]:
    """The generated part of each page: its marker and what it holds."""
    found = {DOCS / "performance.md": ("models", performance()), DOCS / "presets.md": ("presets", presets())}
    found[ROOT / "README.md"] = ("models", short())
    found[DOCS / "how-to" / "diffusers.md"] = ("break-even", break_even())
    for name in FAMILIES:
        found[DOCS / "families" / f"{name}.md"] = ("speed", family(name))
    return found


def main() -> int:
    stale = []
    for path, (marker, content) in pages().items():
        old = path.read_text()
        fresh = with_table(old, marker, content)
        if fresh != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(fresh)
    if stale and "--check" in sys.argv:
        print(f"stale pages: {', '.join(stale)}; run python scripts/doc_models.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
