"""An audit of a model whose attention masks padded text, under guidance with prompts of two lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel
from torch import Tensor

from openvsa.evaluate.audit import Audit
from openvsa.integrations.config import SparsityConfig

TEXT, VALID, NEGATIVE = 11, 5, 3
SETTINGS = SparsityConfig(density=0.3, min_tokens=0)


def pipeline() -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, mlp_ratio=2.0, patch_size=2, patch_size_t=1, text_embed_dim=16,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    ).eval()  # fmt: skip
    pipe = HunyuanVideoPipeline(None, None, transformer, None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_clip_of(pipe: HunyuanVideoPipeline, valid: tuple[int, int]) -> Any:
    generator = torch.Generator().manual_seed(3)
    prompt, negative = (torch.randn(1, TEXT, 16, generator=generator) for _ in range(2))
    pooled = torch.randn(1, 8, generator=generator)
    masks = [(torch.arange(TEXT)[None] < count).long() for count in valid]

    def make_clip(**arguments: Any) -> Tensor:
        latents = pipe(
            prompt_embeds=prompt, prompt_attention_mask=masks[0], pooled_prompt_embeds=pooled,
            negative_prompt_embeds=negative, negative_prompt_attention_mask=masks[1],
            negative_pooled_prompt_embeds=pooled, true_cfg_scale=3.0, height=96, width=128, num_frames=9,
            output_type="latent", return_dict=False, generator=torch.Generator().manual_seed(4), **arguments,
        )[0]  # fmt: skip
        frames = latents[0, :3].permute(1, 2, 3, 0).clamp(-2, 2) * 60 + 128
        return frames.to(torch.uint8)

    return make_clip


@pytest.mark.parametrize("valid", [(VALID, NEGATIVE), (TEXT, TEXT)], ids=["padded", "whole"])
def test_every_layer_is_looked_at(valid: tuple[int, int]) -> None:
    pipe = pipeline()
    audit = Audit(pipe, make_clip_of(pipe, valid), config=SETTINGS, steps=3, audited=[0, 2], by="layer")
    measured = audit.run(with_table=True)
    assert measured.layout.suffix == valid[0]
    names = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    assert [(call.step, call.name) for call in measured.calls] == [(step, name) for step in (0, 2) for name in names]
    for call in measured.calls:
        assert all(
            0 < recall <= best <= 1
            for recall, best in zip(call.figures.recall, call.figures.oracle_recall, strict=True)
        )
        assert all(error > 0 for error in call.figures.error)
    assert measured.attention is not None
    assert len(measured.attention.calls) == 4
