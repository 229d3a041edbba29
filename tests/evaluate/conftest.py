"""A small, plausible generation: moving gradients, and attention that prefers what is near in space and time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from openvsa.config import Budget
from openvsa.evaluate.comparison import Comparison, Figures, LayerFigures, PassTime, Settings
from openvsa.evaluate.quality import compare_clips
from openvsa.evaluate.recorder import AttentionRecord, AttentionRecorder
from openvsa.integrations.report import AttentionEvent
from openvsa.layout import TileLayout
from openvsa.plan import BlockPlan
from openvsa.select.pool import pool_mean


def travelling_waves(frames: int, height: int, width: int, *, phase: float = 0.0) -> Tensor:
    """A clip uint8 [frames, height, width, 3] of waves that travel."""
    t, y, x = torch.meshgrid(
        torch.arange(frames) / 12, torch.arange(height) / height, torch.arange(width) / width, indexing="ij"
    )
    speeds = ((1, 0.4, 1), (0.3, 1.2, 0.7), (1.4, -1, 1.3))
    waves = [torch.sin(6 * (x * a + y * b - t * c) + phase) for a, b, c in speeds]
    return ((torch.stack(waves, -1) + 1) * 127.5).round().to(torch.uint8)


def events(layout: TileLayout, *, heads: int, layers: int, steps: int, density: float) -> Iterator[AttentionEvent]:
    """Attention calls whose queries and keys are waves of place, sharper with layer, head and step."""
    generator = torch.Generator().manual_seed(0)
    axes = [torch.arange(side) / side for side in layout.grid]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    prefix, suffix = (torch.rand(n, places.shape[1], generator=generator) for n in (layout.prefix, layout.suffix))
    places = math.pi * layout.permute(torch.cat([prefix, places, suffix])[None])
    waves = torch.cat([f(places * n) / n for f in (torch.sin, torch.cos) for n in (1, 2)], -1)[:, :, None]
    for step in range(steps):
        for layer in range(layers):
            sharpness = torch.tensor([(1 + head + layer + step) * 3.0 for head in range(heads)])[:, None]
            q = waves * sharpness
            k = v = waves.expand_as(q) + 0.1
            pooled = [pool_mean(x, layout.blocks).transpose(1, 2) for x in (q, k)]
            scores = pooled[0] @ pooled[1].transpose(2, 3)
            plan = BlockPlan.from_scores(scores, Budget(keep_ratio=density), layout.blocks, layout.blocks)
            timestep = 1000 - 900 * step / steps
            yield AttentionEvent(layer, f"blocks.{layer}.attn1", step, timestep, layout, plan, q, k, v, seconds=0.1)


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., Tensor]:
    """make_clip(frames, height, width, phase=..)."""
    return travelling_waves


@pytest.fixture(scope="session")
def make_events() -> Callable[..., Iterator[AttentionEvent]]:
    """make_events(layout, heads=.., layers=.., steps=.., density=..)."""
    return events


@pytest.fixture(scope="session")
def make_record() -> Callable[..., AttentionRecord]:
    """Records a small run: make_record(layout, heads=.., layers=.., steps=.., density=..)."""

    def make(
        layout: TileLayout, *, heads: int = 2, layers: int = 3, steps: int = 3, density: float = 0.25
    ) -> AttentionRecord:
        recorder = AttentionRecorder(range(steps))
        for event in events(layout, heads=heads, layers=layers, steps=steps, density=density):
            recorder(event)
        record = recorder.record()
        assert record is not None
        return record

    return make


@pytest.fixture(scope="session")
def make_comparison() -> Callable[..., Comparison]:
    """A comparison around two clips and a record."""

    def make(dense: Tensor, sparse: Tensor, record: AttentionRecord | None, *, layers: int = 3) -> Comparison:
        figures = Figures(
            settings=Settings(
                scene="Travelling waves",
                seed=7,
                steps=20,
                density=0.25,
                fps=12.0,
                device="cpu",
                threads=2,
                command="openvsa generate --scene waves --density 0.25 --seed 7",
                versions={"openvsa": "0.1.0", "torch": torch.__version__},
                credit="Made of sines </script> & cosines.",
            ),
            dense=PassTime(40.0, 24.0),
            sparse=PassTime(22.0, 6.5),
            layers=tuple(LayerFigures(i, f"blocks.{i}.attn1", 0.25, 4.0, 1.1 + i / 10) for i in range(layers)),
            quality=compare_clips(sparse, dense),
        )
        return Comparison(figures, dense, sparse, record)

    return make


@pytest.fixture(scope="session")
def comparison(make_record: Callable[..., AttentionRecord], make_comparison: Callable[..., Comparison]) -> Comparison:
    """A comparison whose lattice has short tiles at every border and text before and after the video."""
    layout = TileLayout(grid=(7, 9, 14), tile=(3, 4, 4), prefix=60, suffix=5)
    dense, sparse = travelling_waves(24, 72, 112), travelling_waves(24, 72, 112, phase=0.1)
    return make_comparison(dense, sparse, make_record(layout))
