"""An audit of settings: dense steps and layers, tables, other selectors, tiles that choose together, branch weights."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

import tiny_pipelines
from openvsa import Budget, TileLayout, sparsify
from openvsa.errors import BudgetError, OpenVSAError, UnsupportedError
from openvsa.evaluate.audit import CURVE, Audit, Measured
from openvsa.evaluate.audit_attention import audit_call
from openvsa.evaluate.audit_config import at_step, check_table, dense_steps, uniform, which_steps
from openvsa.evaluate.audit_figures import AuditFigures, AuditSettings, DenseCall
from openvsa.evaluate.audit_page import heatmaps, write_audit
from openvsa.integrations.branch import add_branch
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.diffusers import observe
from openvsa.integrations.report import AttentionEvent
from openvsa.select import PooledTopK, ReleasedVSA

TILE = (2, 2, 2)
STEPS = 4


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.manual_seed(0)
    found = WanPipeline.from_pretrained(tiny_pipelines.wan(tmp_path_factory.mktemp("wan")))
    for name, weight in found.transformer.named_parameters():
        if "attn1.norm_q" in name or "attn1.norm_k" in name:
            weight.data.mul_(3)  # random attention is nearly even; this makes it choose
    found.set_progress_bar_config(disable=True)
    return found


def make_clip(pipe: Any, **arguments: Any) -> Tensor:
    """Latents as a picture, twice as large, as its likeness takes windows of 11 x 11; this spares the decoder."""
    options = {"prompt": "a cat", "height": 80, "width": 112, "num_frames": 9, "output_type": "latent"}
    latents = pipe(**options, generator=torch.Generator().manual_seed(0), **arguments).frames
    pixels = latents[0, :3].permute(1, 2, 3, 0).repeat_interleave(2, 1).repeat_interleave(2, 2)
    return (pixels.clamp(-2, 2) * 60 + 128).to(torch.uint8)


def audit(pipe: Any, config: SparsityConfig, audited: tuple[int, ...] = (2,)) -> Measured:
    return Audit(pipe, partial(make_clip, pipe), config=config, steps=STEPS, audited=audited).run(with_table=False)


def events(pipe: Any, tile: tuple[int, ...] = TILE) -> list[AttentionEvent]:
    """The calls of the dense generation: two layers, two branches of guidance a step."""
    found: list[AttentionEvent] = []
    with observe(pipe, tile=tile) as handle:
        handle.on_attention(found.append)
        make_clip(pipe, num_inference_steps=STEPS)
    assert len(found) == 4 * STEPS
    return found


def figures_of(found: Measured, config: SparsityConfig) -> AuditFigures:
    settings = AuditSettings(
        model="noise", subject="a cat", command="openvsa audit", seed=0, steps=STEPS, density=config.base.keep_ratio,
        grid=found.layout.grid, tile=found.layout.tile, num_tiles=found.layout.num_tiles, query_blocks=64,
        device="CPU", threads=1, versions={}, config=config, branch=found.branch,
    )  # fmt: skip
    return AuditFigures(
        settings, found.calls, found.forwards, found.dense, found.sparse, found.dense_forward, found.times, found.table,
        found.budgeted, found.dense_steps, found.dense_calls,
    )  # fmt: skip


PRESET = SparsityConfig.preset("wan", steps=5, tile=TILE, min_tokens=0)


@pytest.fixture(scope="module")
def preset(pipe: Any) -> Measured:
    return audit(pipe, PRESET, audited=(1, 3))


def test_what_a_preset_leaves_dense_is_no_loss_and_is_told(preset: Measured) -> None:
    assert preset.dense_steps == {0: "dense_first_steps is 1"}
    why = "it is one of dense_layers"
    assert preset.dense_calls == tuple(DenseCall(step, 0, "blocks.0.attn1", why) for step in (1, 3))
    assert [(call.step, call.layer) for call in preset.calls] == [(1, 1), (3, 1)]
    assert all(call.error > 0.001 for call in preset.calls)
    assert all(forward.error > 0 for forward in preset.forwards)


def test_requested_delivered_and_executed_densities_are_apart(preset: Measured) -> None:
    run = preset.sparse
    assert run.requested == pytest.approx(0.25)
    kept = Budget(keep_ratio=0.25).blocks(preset.layout.num_tiles) / preset.layout.num_tiles
    assert run.delivered == pytest.approx(kept)
    # Three of four steps, one of two layers.
    assert run.density == pytest.approx(1 - 3 / 8 * (1 - kept), abs=0.01)


def test_the_sparse_generation_is_that_of_the_settings(pipe: Any, preset: Measured) -> None:
    with sparsify(pipe, config=PRESET):
        clip = make_clip(pipe, num_inference_steps=STEPS)
    assert torch.equal(preset.sparse_clip, clip)


def test_the_page_and_the_numbers_tell_what_stays_dense(preset: Measured, tmp_path: Path) -> None:
    figures = figures_of(preset, PRESET)
    assert AuditFigures.from_json(figures.to_json()) == figures
    found = json.loads(figures.to_json())
    assert found["dense_steps"] == {"0": "dense_first_steps is 1"}
    assert [call["why"] for call in found["dense_calls"]] == ["it is one of dense_layers"] * 2
    assert found["settings"]["config"] == PRESET.to_dict()
    assert figures.layers == {0: "blocks.0.attn1", 1: "blocks.1.attn1"}
    for found in heatmaps(figures):
        assert set(found.rows[0][1]) == {("dense", 0.0)}, "no number, and no shade"
        assert all(cell is not None and cell[0].endswith("%") for cell in found.rows[1][1])
    text = " ".join(write_audit(figures, tmp_path).read_text().split())
    assert "<li>All layers in step 0 of the generation: dense_first_steps is 1.</li>" in text
    assert "<li>blocks.0.attn1 in steps 1, 3 of those looked at: it is one of dense_layers.</li>" in text
    assert "dense: it is one of dense_layers</td>" in text
    assert "compressed branch" not in text
    assert "serves" not in text


def test_tables_and_dense_layers_of_a_step(pipe: Any) -> None:
    """In step 1 the layer without a table has the step's density; in step 2 it stays dense."""
    config = SparsityConfig(
        density=0.2, tile=TILE, min_tokens=0, steps={1: 0.5, 2: 1.0}, layers={"blocks.1.attn1": (0.1, 0.9)}
    )
    found = audit(pipe, config, audited=(1, 2))
    assert found.dense_steps == {}
    assert found.dense_calls == (DenseCall(2, 0, "blocks.0.attn1", "the density of step 2 is 1"),)
    tiles = found.layout.num_tiles
    by_call = {(call.step, call.layer): call.figures.density for call in found.calls}
    kept = {share: Budget(keep_ratio=share).blocks(tiles) / tiles for share in (0.1, 0.5, 0.9)}
    assert by_call[1, 0] == pytest.approx((kept[0.5],) * 2)
    assert by_call[1, 1] == by_call[2, 1] == pytest.approx((kept[0.1], kept[0.9]))
    assert found.sparse.density < 1


def test_what_a_selector_does_with_tiles_that_choose_together(pipe: Any) -> None:
    """Against the same measured from the calls of a dense generation."""
    selector = PooledTopK(length_bias=True)
    config = SparsityConfig(density=0.2, tile=(2, 2, 3), q_tiles=(1, 2, 1), selector=selector, min_tokens=0)
    found = audit(pipe, config)
    calls = events(pipe, config.tile or ())[4 * 2 :][:2]
    for ours, event in zip(found.calls, calls, strict=True):
        layout = TileLayout(event.layout.grid, (2, 2, 3), q_tiles=(1, 2, 1))
        assert layout.q_blocks.num_blocks < layout.num_blocks
        assert found.layout == layout
        blocks = [layout.permute(event.layout.unpermute(x)) for x in (event.q, event.k, event.v)]
        densities = (*CURVE, 0.1, 0.2)
        expected = audit_call(*blocks, layout, selector, config.base, densities=densities, max_rows=64)
        assert ours.figures == expected


@pytest.mark.parametrize("budget", [Budget(top_k=5), Budget(top_p=0.7, keep_self=True)], ids=["top_k", "top_p"])
def test_a_budget_that_is_no_share(pipe: Any, budget: Budget, tmp_path: Path) -> None:
    config = SparsityConfig(budget=budget, tile=TILE, min_tokens=0)
    found = audit(pipe, config)
    assert [point.asked for point in found.calls[0].figures.curve] == list(CURVE)
    figures = figures_of(found, config)
    assert figures.settings.density is None
    assert figures.sparse.requested is None
    assert AuditFigures.from_json(figures.to_json()) == figures
    text = write_audit(figures, tmp_path).read_text()
    assert "<h1>What noise loses</h1>" in text
    assert 'class="asked"' not in text


def test_plans_that_serve_several_steps(pipe: Any, tmp_path: Path) -> None:
    config = SparsityConfig(density=0.2, tile=TILE, min_tokens=0, reuse_steps=3)
    found = audit(pipe, config, audited=(1, 2))
    with sparsify(pipe, config=config):
        clip = make_clip(pipe, num_inference_steps=STEPS)
    assert torch.equal(found.sparse_clip, clip)
    assert "in the generation one serves 3 steps" in write_audit(figures_of(found, config), tmp_path).read_text()


def test_settings_that_leave_every_layer_dense(pipe: Any) -> None:
    config = SparsityConfig(density=0.2, tile=TILE, dense_layers=(0, 1))
    with pytest.raises(OpenVSAError, match=r"every layer stays dense .*blocks.0.attn1 \(it is one of dense_layers\)"):
        audit(pipe, config)
    config = SparsityConfig(density=0.2, tile=TILE, min_tokens=10**6)
    with pytest.raises(OpenVSAError, match=r"every layer stays dense .*\(min_tokens is 1000000\)"):
        audit(pipe, config)


def test_settings_that_do_not_fit_are_refused_before_any_work(pipe: Any) -> None:
    def refused(**_: Any) -> Tensor:
        raise AssertionError("it works already")

    config = SparsityConfig(density=0.2, layers={"blocks.7.attn1": 0.5})
    with pytest.raises(OpenVSAError, match=r"the model has no layers blocks\.7\.attn1"):
        Audit(pipe, refused, config=config, steps=STEPS, audited=(1,)).run(with_table=False)
    with pytest.raises(OpenVSAError, match="would lose dense_first_steps, dense_layers of these settings"):
        Audit(pipe, refused, config=PRESET, steps=STEPS, audited=(1,)).run(with_table=True)


# -- weights with a compressed branch -----------------------------------------------------------------------------


@pytest.fixture
def branched(tmp_path: Path) -> Any:
    found = WanPipeline.from_pretrained(tiny_pipelines.wan(tmp_path))
    found.set_progress_bar_config(disable=True)
    add_branch(found.transformer)
    torch.manual_seed(1)
    for block in found.transformer.blocks:
        torch.nn.init.normal_(block.attn1.to_gate_compress.weight, std=0.5)
    return found


@pytest.mark.parametrize(
    "config",
    [
        SparsityConfig.preset("vsa-1.3b", min_tokens=0),
        SparsityConfig(budget=Budget(keep_ratio=1 - 0.6), selector=ReleasedVSA(0.6, "tokens"), tile=(4, 4, 4)),
        SparsityConfig(density=0.4, tile=TILE, min_tokens=0),
    ],
    ids=["released", "tokens", "ours"],  # the authors' count in tokens / 64 keeps half of the tiles at sparsity 0
)
def test_weights_with_a_branch_are_compared_with_all_tiles_and_the_branch(
    branched: Any, config: SparsityConfig, tmp_path: Path
) -> None:
    found = audit(branched, config)
    assert found.branch
    looked: list[AttentionEvent] = []
    with sparsify(branched, density=1.0, tile=config.tile, min_tokens=0) as handle:
        handle.on_attention(looked.append)
        make_clip(branched, num_inference_steps=STEPS)
    without = events(branched, config.tile or ())
    for ours, event, other in zip(found.calls, looked[4 * 2 :][:2], without[4 * 2 :][:2], strict=True):
        of = [(one.q, one.k, one.v, one.layout, config.selector, config.base) for one in (event, other)]
        expected, wrong = (audit_call(*call) for call in of)
        assert ours.figures.density == expected.density
        for name in ("recall", "oracle_recall", "error", "oracle_error"):
            assert getattr(ours.figures, name) == pytest.approx(getattr(expected, name), rel=1e-3), name
        assert ours.layer == 0 or ours.figures.output != pytest.approx(wrong.output, rel=1e-2)
    text = " ".join(write_audit(figures_of(found, config), tmp_path).read_text().split())
    assert "This model was trained with a compressed branch" in text


def test_weights_with_a_branch_lose_nothing_at_density_one(branched: Any) -> None:
    found = audit(branched, SparsityConfig(density=1.0, tile=TILE, min_tokens=0))
    assert found.forwards[0].error < 1e-5
    assert found.sparse.latents_error < 1e-5


def test_settings_that_a_branch_cannot_have(branched: Any) -> None:
    config = SparsityConfig(density=0.5, tile=TILE, min_tokens=0, reuse_steps=2)
    with pytest.raises(UnsupportedError, match="plans cannot be reused with a compressed branch"):
        audit(branched, config)


# -- settings alone -----------------------------------------------------------------------------------------------


def test_the_steps_to_look_at_are_sparse_ones() -> None:
    plain = SparsityConfig(density=0.5)
    assert which_steps(plain, 8) == (1, 4, 6)
    assert which_steps(plain, 1) == (0,)
    preset = SparsityConfig.preset("wan", steps=30)
    assert list(dense_steps(preset, 30)) == list(range(6))
    assert which_steps(preset, 30) == (10, 18, 26)
    both = SparsityConfig(density=0.5, dense_first_steps=2, dense_last_steps=1, steps={3: 1.0})
    assert dense_steps(both, 6) == {
        0: "dense_first_steps is 2",
        1: "dense_first_steps is 2",
        3: "the density of step 3 is 1",
        5: "dense_last_steps is 1",
    }
    assert which_steps(both, 6) == (2, 4)
    assert which_steps(both, 6, [4, 2, 4]) == (2, 4)
    with pytest.raises(OpenVSAError, match=r"step 3 stays dense \(the density of step 3 is 1\).* which are 2, 4"):
        which_steps(both, 6, [2, 3])
    with pytest.raises(OpenVSAError, match=r"all 2 steps stay dense \(dense_first_steps is 2\)"):
        which_steps(both, 2)


def test_what_holds_in_a_step() -> None:
    config = SparsityConfig(
        density=0.5, dense_first_steps=2, dense_last_steps=1, steps={3: 0.2}, layers={"a": 0.1}, dense_layers=(0,),
        reuse_steps=2, selector=PooledTopK(length_bias=True),
    )  # fmt: skip
    here = at_step(config, 3)
    assert here.at("b", 0, None, 100) == config.at("b", 3, 6, 100)
    assert here.at("a", 0, None, 100) == config.at("a", 3, 6, 100)
    assert at_step(config, 2).at("b", 0, None, 100) == config.base
    assert (here.selector, here.dense_layers, here.reuse_steps) == (config.selector, (0,), 1)


def test_the_same_selection_at_another_density() -> None:
    base = Budget(top_k=4, max_blocks=9, keep_first=2, keep_self=True)
    found = uniform(SparsityConfig(budget=base, steps={1: 0.5}, dense_layers=(0,), dense_first_steps=3), 1 / 64)
    assert found == SparsityConfig(
        budget=Budget(keep_ratio=1 / 64, min_blocks=3, keep_first=2, keep_self=True), min_tokens=0
    )
    assert found.base.blocks(64) == 3, "those that must be kept"
    released = uniform(SparsityConfig.preset("vsa-1.3b"), 0.5)
    assert released.selector == ReleasedVSA(0.5)
    assert released.base == ReleasedVSA(0.5).budget
    with pytest.raises(BudgetError):
        uniform(SparsityConfig(density=0.5), 0.0)


@pytest.mark.parametrize(
    ("config", "lost"),
    [
        (SparsityConfig.preset("wan"), "dense_first_steps, dense_layers"),
        (SparsityConfig.preset("vsa-1.3b", tile=None), "selector"),
        (SparsityConfig(budget=Budget(top_k=8)), "budget"),
        (SparsityConfig(density=0.5, steps={1: 0.3}, layers={"a": 0.2}), "steps, layers"),
        (SparsityConfig(density=0.5, q_tiles=(1, 1, 2), reuse_steps=2), "q_tiles, reuse_steps"),
    ],
)
def test_a_table_holds_a_density_and_a_tile(config: SparsityConfig, lost: str) -> None:
    with pytest.raises(OpenVSAError, match=f"and would lose {lost} of these settings"):
        check_table(config)
    check_table(SparsityConfig(density=0.5, tile=(2, 2, 2), min_tokens=0))
    check_table(SparsityConfig(budget=Budget(keep_ratio=0.5)))
