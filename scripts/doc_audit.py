"""Write the numbers of `docs/what-you-lose.md` from the recorded audit of the bundled model.

python scripts/doc_audit.py            # write them
python scripts/doc_audit.py --check    # fail if the page on disk differs
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from openvsa.evaluate.audit_figures import AuditFigures, SparseRun

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "what-you-lose.md"
AUDIT = ROOT / "benchmarks" / "results" / "audit-bundled-model.json"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def made_by(figures: AuditFigures) -> str:
    settings = figures.settings
    steps = ", ".join(map(str, figures.steps))
    versions = ", ".join(f"{name} {version}" for name, version in settings.versions.items())
    return (
        f"```bash\n{settings.command}\n```\n\n{settings.subject}; {settings.num_tiles} tiles of up to "
        f"{' × '.join(map(str, settings.tile))} tokens in a lattice of {' × '.join(map(str, settings.grid))}; steps "
        f"{steps} of {settings.steps} looked at, {settings.query_blocks} query blocks in each layer. "
        f"{settings.device}, {settings.threads} thread{'s' if settings.threads > 1 else ''}; {versions}.\n"
    )


def summary(figures: AuditFigures) -> str:
    sparse = figures.sparse
    rows = [
        ["share of pairs computed", percent(sparse.density)],
        ["share of exact attention kept (recall)", percent(figures.recall)],
        ["the same for the best plan of that density", percent(figures.oracle_recall)],
        ["PSNR of the clip against full attention", f"{sparse.quality.mean_psnr:.1f} dB"],
        ["SSIM", f"{sparse.quality.mean_ssim:.3f}"],
        *([["VIF", f"{sparse.quality.mean_vif:.3f}"]] if sparse.quality.vif else []),
        ["change of the final latents", percent(sparse.latents_error)],
    ]
    return table(["", f"density {figures.settings.density:g}"], rows)


def by_layer(figures: AuditFigures) -> str:
    columns = ["recall", "oracle_recall", "error", "oracle_error"]
    rows = []
    for layer, name in figures.layers.items():
        recalls = [call.figures.recall for call in figures.calls if call.layer == layer]
        heads = [sum(of_head) / len(recalls) for of_head in zip(*recalls, strict=True)]
        span = f"{100 * min(heads):.0f} to {100 * max(heads):.0f} %"
        rows.append([f"`{name}`", *[percent(figures.layer_mean(layer, what)) for what in columns], span])
    return table(["layer", "recall", "best recall", "output error", "best output error", "recall of its heads"], rows)


def by_density(figures: AuditFigures) -> str:
    return table(["density", "output error"], [[f"{d:.3f}", percent(error)] for d, error in figures.curve()])


def uniform_and_table(figures: AuditFigures) -> str:
    assert figures.budgeted is not None
    with_vif = bool(figures.sparse.quality.vif)

    def row(name: str, run: SparseRun) -> list[str]:
        quality = run.quality
        likeness = [f"{quality.mean_psnr:.2f} dB", f"{quality.mean_ssim:.4f}"]
        likeness += [f"{quality.mean_vif:.4f}"] if with_vif else []
        return [name, percent(run.density), *likeness, f"{100 * run.latents_error:.2f} %"]

    head = ["budget", "density", "PSNR", "SSIM", *(["VIF"] if with_vif else []), "change of the final latents"]
    runs = table(head, [row("uniform", figures.sparse), row("table", figures.budgeted)])
    rows = [[str(f.step), f"{100 * f.error:.2f} %", f"{100 * (f.budgeted or 0):.2f} %"] for f in figures.forwards]
    return runs + "\n" + table(["change of the prediction in step", "uniform", "table"], rows)


def other_runs(_: AuditFigures) -> str:
    """The same comparison in the other recorded audits."""

    def run(found: SparseRun) -> str:
        return f"{100 * found.latents_error:.2f} %, {found.quality.mean_psnr:.2f} dB"

    rows = []
    for path in sorted(AUDIT.parent.glob(f"{AUDIT.stem}-*.json")):
        figures = AuditFigures.from_json(path.read_text())
        assert figures.budgeted is not None
        subject, share = figures.settings.subject, percent(figures.sparse.density)
        rows.append([f"{subject}, `{path.name}`", share, run(figures.sparse), run(figures.budgeted)])
    return table(["clip, file in `benchmarks/results`", "density", "uniform", "table"], rows)


PARTS = {
    "command": made_by,
    "summary": summary,
    "layers": by_layer,
    "densities": by_density,
    "table": uniform_and_table,
    "others": other_runs,
}


def main() -> int:
    figures = AuditFigures.from_json(AUDIT.read_text())
    page = fresh = PAGE.read_text()
    for name, make in PARTS.items():
        begin, end = f"<!-- begin generated: {name} -->\n", f"<!-- end generated: {name} -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if len(pattern.findall(fresh)) != 1:
            raise SystemExit(f"the page must hold the markers of the part {name!r} exactly once")
        content = make(figures)
        fresh = pattern.sub(lambda _, b=begin, c=content, e=end: f"{b}\n{c}\n{e}", fresh)
    if fresh == page:
        return 0
    if "--check" in sys.argv:
        print("docs/what-you-lose.md is stale; run python scripts/doc_audit.py", file=sys.stderr)
        return 1
    PAGE.write_text(fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
