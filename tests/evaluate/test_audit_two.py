"""An audit of a pipeline of two transformers, one for the first steps and one for the rest."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

import tiny_pipelines
from openvsa.evaluate.audit import Audit
from openvsa.integrations.config import SparsityConfig


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_pipelines.wan(tmp_path_factory.mktemp("wan"))
    one, other = (WanPipeline.from_pretrained(folder) for _ in range(2))
    with torch.no_grad():  # the second does next to nothing, so that the first could use all of its tiles
        other.transformer.proj_out.weight.mul_(1e-3)
    both = WanPipeline(**one.components | {"transformer_2": other.transformer}, boundary_ratio=0.6)
    both.set_progress_bar_config(disable=True)
    return both


def test_each_transformer_spends_its_own_density(pipe: Any) -> None:
    """Or a table costs more than its density, as the first transformer has three of the four steps."""
    ran: list[str] = []
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in (("first", pipe.transformer), ("second", pipe.transformer_2))
    ]

    def make_clip(**arguments: Any) -> torch.Tensor:
        options = {"prompt": "a cat", "height": 80, "width": 112, "num_frames": 9, "output_type": "np"}
        frames = pipe(**options, generator=torch.Generator().manual_seed(0), **arguments).frames[0]
        return (255 * torch.as_tensor(frames)).round().to(torch.uint8)

    make_clip(num_inference_steps=4)
    assert (ran.count("first"), ran.count("second")) == (6, 2), "two forwards a step"
    for hook in hooks:
        hook.remove()
    settings = SparsityConfig(density=0.3, tile=(2, 2, 2), min_tokens=0)
    found = Audit(pipe, make_clip, config=settings, steps=4, audited=(0, 3)).run(with_table=True)
    assert found.table is not None
    assert found.budgeted is not None
    assert len(found.table.layers) == 4
    kept = math.ceil(0.3 * found.layout.num_tiles)
    for second in (False, True):
        shares = [of for name, of in found.table.layers.items() if name.startswith("transformer_2.") == second]
        assert sum(map(sum, shares)) * found.layout.num_tiles == pytest.approx(4 * kept)
    assert len({share for heads in found.table.layers.values() for share in heads}) > 1, "a table that is not uniform"
    assert found.budgeted.density == pytest.approx(found.sparse.density, rel=0.05), "tiles at borders are short"
