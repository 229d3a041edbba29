import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import nn

from openvsa.models import ClipPipeline, PatchTokenizer, bundled_scenes
from openvsa.models.shots import ShotTokens


@pytest.fixture
def tiny_pipeline():
    """A random pipeline of 4-frame clips of 16x32 pixels."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=16, out_channels=8,
        text_dim=64, freq_dim=32, ffn_dim=32, num_layers=1, cross_attn_norm=True,
    )  # fmt: skip
    nn.init.normal_(transformer.proj_out.weight, std=0.5)
    return ClipPipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=PatchTokenizer(num_components=8, num_time_cells=2),
        shot_tokens=ShotTokens(num_rows=200),
        scenes=bundled_scenes(),
        frame_size=(16, 32),
    )
