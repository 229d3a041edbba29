"""An audit of a small model with random weights, from the first generation to the page."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel

import openvsa
from openvsa.cli.audit import _summary
from openvsa.errors import OpenVSAError
from openvsa.evaluate.audit import CURVE, Audit, Measured, curves_of
from openvsa.evaluate.audit_attention import CallFigures, CurvePoint
from openvsa.evaluate.audit_figures import AuditFigures, AuditSettings, CallAudit, SparseRun, TimedDensity
from openvsa.evaluate.audit_page import heatmaps, write_audit
from openvsa.integrations.config import SparsityConfig
from openvsa.models import ClipPipeline, FilmShots, PatchTokenizer, bundled_scenes
from openvsa.models.shots import ShotTokens
from openvsa.select import BudgetTable

SETTINGS = SparsityConfig(density=0.25, tile=(2, 2, 2), min_tokens=0)


def at(density: float) -> SparsityConfig:
    return SparsityConfig(density=density, min_tokens=0)


def pipeline() -> ClipPipeline:
    torch.manual_seed(0)
    components = 8
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=2 * components,
        out_channels=components, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    ).eval()  # fmt: skip
    for name, weight in transformer.named_parameters():
        if name.endswith(
            (".to_q.weight", ".to_k.weight", ".to_v.weight", "attn1.norm_q.weight", "attn1.norm_k.weight")
        ):
            weight.data.mul_(3)  # random attention is nearly even; this makes it choose
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.5)
    return ClipPipeline(
        transformer,
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        PatchTokenizer(num_components=components, num_time_cells=3),
        ShotTokens(FilmShots.bundled().num_rows, num_tokens=2, dim=8),
        scenes=bundled_scenes(),
        frame_size=(48, 80),
    )


@pytest.fixture(scope="module")
def audited() -> tuple[ClipPipeline, Measured, list[str]]:
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    phases: list[str] = []

    def progress(name: str, parts: int) -> Any:
        phases.append(name)
        return lambda: phases.append(f"{name} done")

    before = [block.attn1.processor for block in pipe.transformer.blocks]
    audit = Audit(
        pipe, partial(pipe, scene="glide", seed=1), config=SETTINGS, steps=4, audited=(0, 2), on_progress=progress,
    )  # fmt: skip
    found = audit.run(with_table=True)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert not pipe.transformer._forward_pre_hooks
    return pipe, found, phases


@pytest.fixture(scope="module")
def figures(audited: tuple[ClipPipeline, Measured, list[str]]) -> AuditFigures:
    found = audited[1]
    settings = AuditSettings(
        model="a model of noise", subject="</script> & sines", command="openvsa audit", seed=1, steps=4, density=0.25,
        grid=found.layout.grid, tile=found.layout.tile, num_tiles=found.layout.num_tiles, query_blocks=64,
        device="CPU", threads=1, versions={"torch": torch.__version__}, config=SETTINGS,
    )  # fmt: skip
    return AuditFigures(
        settings, found.calls, found.forwards, found.dense, found.sparse, found.dense_forward, found.times, found.table,
        found.budgeted,
    )  # fmt: skip


def test_every_layer_is_measured_in_every_audited_step(figures: AuditFigures) -> None:
    assert [(call.step, call.layer) for call in figures.calls] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert figures.layers == {0: "blocks.0.attn1", 1: "blocks.1.attn1"}
    assert figures.steps[0] > figures.steps[2] > 0
    for call in figures.calls:
        assert len(call.figures.recall) == 2
        assert all(0.25 <= share < 0.3 for share in call.figures.density)
        assert all(
            0 < ours <= best + 1e-6 for ours, best in zip(call.figures.recall, call.figures.oracle_recall, strict=True)
        )
        assert 0.001 < call.error < 1
        errors = [sum(point.error) for point in call.figures.curve]
        assert errors[-1] < errors[0]
        assert len(errors) == len({*CURVE, 0.25, 0.125})
    assert figures.oracle_recall > figures.recall


def test_what_one_dense_head_gains(audited: tuple[ClipPipeline, Measured, list[str]], figures: AuditFigures) -> None:
    """The gain of the second head of the first layer in the first step, made again by hand."""
    pipe = audited[0]
    for forward in figures.forwards:
        assert {name: len(heads) for name, heads in forward.gains.items()} == dict.fromkeys(figures.layers.values(), 2)
    uniform = dict.fromkeys(figures.layers.values(), (0.25, 0.25))
    tables = [dict.fromkeys(uniform, (1.0, 1.0)), uniform, uniform | {"blocks.0.attn1": (0.25, 1.0)}]
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    for layers in tables:
        with openvsa.sparsify(pipe, budget=BudgetTable(0.25, layers), tile=(2, 2, 2), min_tokens=0):
            pipe(scene="glide", seed=1, num_inference_steps=4)
    hook.remove()
    change, less = ((seen[at] - seen[0]).square().sum() for at in (4, 8))
    assert figures.forwards[0].gains["blocks.0.attn1"][1] == pytest.approx(float(1 - less / change), abs=2e-3)


def test_curves_are_what_is_gained_and_shrink_as_the_error_does() -> None:
    def call(step: int, errors: tuple[float, float]) -> CallAudit:
        curve = tuple(CurvePoint(d, (d, d), tuple(e * (1 - d) / 0.75 for e in errors)) for d in (0.1, 0.125, 0.25, 0.5))
        ones = (1.0, 1.0)
        return CallAudit(step, 0.0, 0, "a", CallFigures((0.25, 0.25), ones, ones, ones, errors, errors, curve))

    calls = [call(0, (3.0, 1.0)), call(1, (2.0, 2.0))]
    by_head = curves_of(calls, {0: {"a": (0.4, 0.0)}, 1: {"a": (0.2, -0.4)}}, {0: 1.0, 1: 1.0}, 0.25, 8)["a"]
    assert [density for density, _ in by_head[0].points] == [0.125, 0.25, 0.5, 1.0], "from half the density on"
    assert dict(by_head[0].points)[0.25] == pytest.approx(0.3)
    assert dict(by_head[0].points)[0.5] == pytest.approx(0.2)
    assert {loss for _, loss in by_head[1].points} == {0.0}, "a head that does no harm"
    by_layer = curves_of(calls, {0: {"a": (0.4,)}, 1: {"a": (0.2,)}}, {0: 1.0, 1: 3.0}, 0.25, 8)["a"]
    assert [dict(curve.points)[0.25] for curve in by_layer] == pytest.approx([(0.3 + 0.3) / 4, (0.1 + 0.3) / 4])


def test_the_forwards_are_those_of_the_generation(audited: tuple[ClipPipeline, Measured, list[str]]) -> None:
    """The change of the first step's prediction, made again by hand from the very first noise."""
    pipe, found, _ = audited
    seen: list[torch.Tensor] = []
    hook = pipe.transformer.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    for density in (1.0, 0.25):
        with openvsa.sparsify(pipe, density, tile=(2, 2, 2), min_tokens=0):
            pipe(scene="glide", seed=1, num_inference_steps=4)
    hook.remove()
    change = float((seen[4] - seen[0]).norm() / seen[0].norm())
    assert found.forwards[0].error == pytest.approx(change, rel=1e-3)


def test_the_table_spends_what_was_asked_for_and_is_used(audited: tuple[ClipPipeline, Measured, list[str]]) -> None:
    pipe, found, _ = audited
    assert found.table is not None
    assert found.budgeted is not None
    num_tiles = found.layout.num_tiles
    assert found.table.mean == pytest.approx(math.ceil(0.25 * num_tiles) / num_tiles)
    assert found.table.tile == (2, 2, 2)
    assert found.budgeted.density == pytest.approx(found.sparse.density, rel=0.05), "tiles at borders are short"
    uniform = sum((forward.error * forward.moved) ** 2 for forward in found.forwards)
    assert sum(((forward.budgeted or 9) * forward.moved) ** 2 for forward in found.forwards) <= uniform, "never worse"
    with openvsa.sparsify(pipe, budget=found.table, min_tokens=0) as handle:
        pipe(scene="glide", seed=1, num_inference_steps=2)
        for layer in handle.report().layers:
            assert layer.delivered_density == pytest.approx(sum(found.table.layers[layer.name]) / 2, rel=1e-3)


def test_progress_is_told(audited: tuple[ClipPipeline, Measured, list[str]]) -> None:
    phases = audited[2]
    assert phases.count("full attention done") == 4
    assert phases.count("layers done") == 4, "two layers in two forwards"


def test_at_density_one_nothing_is_lost() -> None:
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    audit = Audit(pipe, partial(pipe, scene="glide", seed=1), config=at(1.0), steps=2, audited=(1,))
    found = audit.run(with_table=False)
    assert found.table is None
    for call in found.calls:
        assert call.figures.recall == pytest.approx((1.0, 1.0), abs=1e-5)
        assert call.error < 1e-5
    assert found.forwards[0].error < 1e-4
    assert found.sparse.latents_error < 1e-4


def test_layers_one_by_one() -> None:
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    audit = Audit(pipe, partial(pipe, scene="glide", seed=1), config=at(0.25), steps=2, audited=(1,), by="layer")
    found = audit.run(with_table=True)
    assert {name: len(gain) for name, gain in found.forwards[0].gains.items()} == {
        "blocks.0.attn1": 1,
        "blocks.1.attn1": 1,
    }
    assert found.table is not None
    with pytest.raises(OpenVSAError, match="by must be 'head' or 'layer', got 'token'"):
        Audit(pipe, lambda **_: torch.zeros(0), config=at(0.5), steps=2, audited=(1,), by="token")


@pytest.mark.parametrize("audited", [(), (4,), (-1, 2)])
def test_steps_that_do_not_exist(audited: tuple[int, ...]) -> None:
    with pytest.raises(OpenVSAError, match=r"audited steps must be in 0\.\.3"):
        Audit(None, lambda **_: torch.zeros(0), config=at(0.5), steps=4, audited=audited)


def test_a_pipeline_that_tells_nothing_of_its_steps() -> None:
    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)

    def silent(num_inference_steps: int, callback_on_step_end: Any) -> torch.Tensor:
        return pipe(scene="glide", num_inference_steps=num_inference_steps)

    with pytest.raises(OpenVSAError, match="ClipPipeline did not call callback_on_step_end"):
        Audit(pipe, silent, config=at(0.5), steps=2, audited=(1,)).run(with_table=False)


def test_figures_survive_json(figures: AuditFigures) -> None:
    assert AuditFigures.from_json(figures.to_json()) == figures
    derived = json.loads(figures.to_json())["derived"]
    assert derived["recall"] == pytest.approx(figures.recall)
    assert json.loads(figures.to_json())["version"] == 1


def test_the_numbers_hold_all_that_the_page_shows(figures: AuditFigures) -> None:
    found = json.loads(figures.to_json())
    for call, plain in zip(figures.calls, found["calls"], strict=True):
        assert plain["relative_error"] == call.error
        assert plain["oracle_relative_error"] == call.oracle_error
        assert plain["head_relative_errors"] == list(call.head_errors)
    derived = found["derived"]
    assert derived["density"] == figures.density
    assert [(layer["layer"], layer["name"]) for layer in derived["layers"]] == list(figures.layers.items())
    assert derived["layers"][1]["oracle_relative_error"] == figures.layer_mean(1, "oracle_error")
    assert derived["layers"][1]["density"] == figures.layer_mean(1, "density")


@pytest.mark.parametrize(
    ("psnr", "latents_error", "better"), [(31.0, 0.08, True), (31.0, 0.09, False), (29.0, 0.08, False)]
)
def test_a_table_that_is_no_better_is_told(
    figures: AuditFigures, psnr: float, latents_error: float, better: bool, tmp_path: Path
) -> None:
    def run(psnr: float, latents_error: float) -> SparseRun:
        quality = replace(figures.sparse.quality, psnr=(psnr,) * len(figures.sparse.quality.ssim))
        return replace(figures.sparse, quality=quality, latents_error=latents_error)

    found = replace(figures, sparse=run(30.0, 0.09), budgeted=run(psnr, latents_error))
    assert found.table_is_better is better
    assert json.loads(found.to_json())["derived"]["table_is_better"] is better
    page = write_audit(found, tmp_path)
    assert ("The table is no better than the uniform budget here" in page.read_text()) is not better
    assert (
        "the table is no better than the uniform budget here: PSNR 30.00" in _summary(found, page, None)
    ) is not better
    assert replace(found, table=None, budgeted=None).table_is_better is None


def test_break_even_and_ceiling_by_hand(figures: AuditFigures) -> None:
    times = (TimedDensity(0.25, 2.0), TimedDensity(0.5, 3.0), TimedDensity(1.0, 6.0))
    line = replace(figures, times=times, dense_forward=4.0)
    assert line.break_even == pytest.approx(0.5 + 0.5 / 3), "on the line that the page draws"
    assert replace(line, dense_forward=2.5).break_even == pytest.approx(0.375)
    assert replace(line, dense_forward=9.0).break_even == 1.0
    assert replace(line, dense_forward=2.0).break_even is None
    waves = tuple(TimedDensity(at, seconds) for at, seconds in ((0.25, 1.0), (0.5, 3.0), (0.75, 1.0), (1.0, 3.0)))
    assert replace(figures, times=waves, dense_forward=2.0).break_even == pytest.approx(0.375), "the first of three"
    even = replace(figures, times=(TimedDensity(0.25, 2.0), TimedDensity(0.5, 3.0), TimedDensity(1.0, 5.0)))
    assert even.overhead == pytest.approx(1.0)
    assert replace(even, times=(TimedDensity(0.5, 1.0), TimedDensity(1.0, 4.0))).overhead == 0.0, "no time is negative"
    dense = replace(figures.dense, total_seconds=10.0, attention_seconds=6.0)
    assert replace(figures, dense=dense).ceiling == pytest.approx(2.5)


def test_the_page_holds_everything_and_needs_no_network(
    figures: AuditFigures, audited: tuple[ClipPipeline, Measured, list[str]], tmp_path: Path
) -> None:
    found = audited[1]
    page = write_audit(figures, tmp_path / "new", clip=found.sparse_clip, attention=found.attention)
    assert sorted(path.name for path in page.parent.iterdir()) == ["audit.html", "audit.json"]
    text = page.read_text()
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert "&lt;/script&gt; &amp; sines" in text
    for key in (
        "error-head",
        "recall-head",
        "error-step",
        "recall-step",
        "budget-head",
        "budget-table",
        "picture-data",
    ):
        assert f'id="{key}"' in text
    data = json.loads(text.split('id="picture-data">')[1].split("</script>")[0])
    assert [step["step"] for step in data["steps"]] == [0, 2], "steps are those of the generation"
    assert data["firstStep"] == 0, "and are counted as --at and the tables count them"
    assert text.index('id="budget-head"') < text.index("the more is lost"), "its shades are densities"
    assert AuditFigures.from_json((page.parent / "audit.json").read_text()) == figures


def test_plots_say_what_their_marks_are(figures: AuditFigures, tmp_path: Path) -> None:
    times = (TimedDensity(0.25, 2.0), TimedDensity(0.75, 4.0), TimedDensity(1.0, 6.0))
    found = replace(figures, times=times, dense_forward=3.0)
    text = write_audit(found, tmp_path).read_text()
    assert text.count(">asked for</text>") == 2
    assert '<circle class="meet" cx="300.0" cy="110.0" r="8"/>' in text, "on the drawn line, at density a half"
    assert ">break-even 50\N{NO-BREAK SPACE}%</text>" in text
    assert 'class="meet"' not in write_audit(replace(found, dense_forward=7.0), tmp_path).read_text()
    assert 'class="meet"' not in write_audit(replace(found, dense_forward=1.0), tmp_path).read_text()


def test_a_page_without_picture_and_table(figures: AuditFigures, tmp_path: Path) -> None:
    text = write_audit(replace(figures, table=None, budgeted=None), tmp_path).read_text()
    assert 'id="picture' not in text
    assert 'id="budget' not in text


def test_heatmaps_shade_the_worst_cell_darkest(figures: AuditFigures) -> None:
    maps = {found.key: found for found in heatmaps(figures)}
    for key, best in (("error-head", 0.0), ("recall-head", 1.0)):
        shades = [cell[1] for _, cells in maps[key].rows for cell in cells if cell]
        assert len(shades) == 4, f"two layers by two heads; {best} would be white"
        assert max(shades) == 1.0
        assert min(shades) > 0
    assert maps["error-step"].columns == ("step 0", "step 2")
    assert [name for name, _ in maps["error-step"].rows] == ["0 blocks.0.attn1", "1 blocks.1.attn1"]
