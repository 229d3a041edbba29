"""Whole Diffusers pipelines, tiny and with random weights, made without a network."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLMochi,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

WORDS = ["<pad>", "</s>", "<unk>", "a", "cat", "plays", "the", "piano"]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def text_encoder(dim: int = 16) -> UMT5EncoderModel:
    config = UMT5Config(vocab_size=len(WORDS), d_model=dim, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def wan(folder: Path) -> Path:
    """Saves a Wan pipeline to the folder: a pixel is a latent of 1/8, a frame but the first one of 1/4."""
    return _save_wan(WanPipeline, 16, folder)


def wan_from_picture(folder: Path) -> Path:
    """Saves a Wan 2.2 image-to-video pipeline, which has no image encoder."""
    return _save_wan(WanImageToVideoPipeline, 36, folder)  # latents, a mask of four frames, and the picture's latents


def _save_wan(pipeline: type, in_channels: int, folder: Path) -> Path:
    transformer, vae = _wan_parts(in_channels)
    pipeline(
        tokenizer=tokenizer(),
        text_encoder=text_encoder(),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def mochi(folder: Path) -> Path:
    """Saves a Mochi pipeline: a pixel is a latent of 1/8, a frame but the first one of 1/6."""
    torch.manual_seed(0)
    transformer = MochiTransformer3DModel(
        patch_size=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=12,
        out_channels=None,
        text_embed_dim=16,
        time_embed_dim=4,
        max_sequence_length=16,
    )
    channels = (32, 32, 32, 32)
    vae = AutoencoderKLMochi(
        latent_channels=12,
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        layers_per_block=(1, 1, 1, 1, 1),
    )
    config = T5Config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    encoder = T5EncoderModel(config).eval()
    MochiPipeline(
        FlowMatchEulerDiscreteScheduler(invert_sigmas=True), vae, encoder, tokenizer(), transformer
    ).save_pretrained(folder)
    return folder


def _wan_parts(in_channels: int) -> tuple[WanTransformer3DModel, AutoencoderKLWan]:
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    return transformer, vae
