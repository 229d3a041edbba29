"""What the transformers of Diffusers are called with: random latents and text over a lattice, nothing masked."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "Inputs", "Make", "cogvideox", "cosmos", "flux", "hunyuan_video", "hunyuan_video15", "kandinsky5", "ltx", "ltx2",
    "mochi", "wan",
]  # fmt: skip

Inputs = dict[str, Any]
Noise = Callable[..., Tensor]
# The arguments of a forward, from the tokens of the lattice, the config of the transformer, and a maker of random
# tensors of a shape.
Make = Callable[[tuple[int, ...], Mapping[str, Any], Noise], Inputs]

_TEXT = 256


def _ones(tokens: int) -> Tensor:
    """A mask of text that has no padding."""
    return torch.ones(1, tokens, dtype=torch.long)


def wan(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    sides = [n * p for n, p in zip(grid, config["patch_size"], strict=True)]
    return {
        "hidden_states": noise(1, config["in_channels"], *sides),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, 512, config["text_dim"]),
    }


def wan_image_to_video(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    return {**wan(grid, config, noise), "encoder_hidden_states_image": noise(1, 257, config["image_dim"])}


def wan_vace(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    sides = [n * p for n, p in zip(grid, config["patch_size"], strict=True)]
    return {**wan(grid, config, noise), "control_hidden_states": noise(1, config["vace_in_channels"], *sides)}


def wan_by_token(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    return {**wan(grid, config, noise), "timestep": torch.full((1, grid[0] * grid[1] * grid[2]), 500)}


def hunyuan_video(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    p = config["patch_size"]
    return {
        "hidden_states": noise(1, config["in_channels"], grid[0] * config["patch_size_t"], grid[1] * p, grid[2] * p),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": noise(1, _TEXT, config["text_embed_dim"]),
        "encoder_attention_mask": _ones(_TEXT),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "guidance": noise(1).abs() * 6000,
    }


def ltx(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(1, grid[0] * grid[1] * grid[2], config["in_channels"]),
        "encoder_hidden_states": noise(1, 128, config["caption_channels"]),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": _ones(128),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
    }


def ltx2(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    text, level = noise(1, 1024, config["caption_channels"]), torch.tensor([500])
    return {
        "hidden_states": noise(1, grid[0] * grid[1] * grid[2], config["in_channels"]),
        "audio_hidden_states": noise(1, 126, config["audio_in_channels"]),
        "encoder_hidden_states": text,
        "audio_encoder_hidden_states": text,
        "timestep": level,
        "sigma": level,
        "encoder_attention_mask": _ones(1024),
        "audio_encoder_attention_mask": _ones(1024),
        "num_frames": grid[0],
        "height": grid[1],
        "width": grid[2],
        "audio_num_frames": 126,
    }


def hunyuan_video15(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    return {
        "hidden_states": noise(1, config["in_channels"], *grid),
        "timestep": 500 * noise(1).abs(),
        "encoder_hidden_states": noise(1, _TEXT, config["text_embed_dim"]),
        "encoder_attention_mask": _ones(_TEXT),
        "encoder_hidden_states_2": noise(1, 64, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": _ones(64),
        "image_embeds": noise(1, 729, config["image_embed_dim"]),
    }


def cogvideox(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    embeddings = importlib.import_module("diffusers.models.embeddings")
    t, h, w = grid
    p = config["patch_size"]
    return {
        "hidden_states": noise(1, t, config["in_channels"], h * p, w * p),
        "encoder_hidden_states": noise(1, config["max_text_seq_length"], config["text_embed_dim"]),
        "timestep": torch.tensor([500]),
        "image_rotary_emb": embeddings.get_3d_rotary_pos_embed(
            config["attention_head_dim"], ((0, 0), (h, w)), (h, w), t, max_size=(h, w)
        ),
    }


def mochi(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    p = config["patch_size"]
    return {
        "hidden_states": noise(1, config["in_channels"], grid[0], grid[1] * p, grid[2] * p),
        "encoder_hidden_states": noise(1, config["max_sequence_length"], config["text_embed_dim"]),
        "timestep": torch.tensor([500]),
        "encoder_attention_mask": _ones(config["max_sequence_length"]).bool(),
    }


def cosmos(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    sides = [n * p for n, p in zip(grid, config["patch_size"], strict=True)]
    return {
        "hidden_states": noise(1, config["in_channels"], *sides),
        "timestep": noise(1).abs(),
        "encoder_hidden_states": noise(1, 512, config["text_embed_dim"]),
        "fps": 24,
    }


def kandinsky5(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    sides = [n * p for n, p in zip(grid, config["patch_size"], strict=True)]
    return {
        "hidden_states": noise(1, *sides, config["in_visual_dim"]),
        "encoder_hidden_states": noise(1, _TEXT, config["in_text_dim"]),
        "pooled_projections": noise(1, config["in_text_dim2"]),
        "timestep": torch.tensor([500.0]),
        "visual_rope_pos": [torch.arange(side) for side in grid],
        "text_rope_pos": torch.arange(_TEXT),
    }


def flux(grid: tuple[int, ...], config: Any, noise: Noise) -> Inputs:
    table = torch.zeros(*grid, 3)
    table[..., 1] = torch.arange(grid[0])[:, None]
    table[..., 2] = torch.arange(grid[1])
    return {
        "hidden_states": noise(1, grid[0] * grid[1], config["in_channels"]),
        "encoder_hidden_states": noise(1, 512, config["joint_attention_dim"]),
        "pooled_projections": noise(1, config["pooled_projection_dim"]),
        "timestep": noise(1).abs(),
        "img_ids": table.flatten(0, 1),
        "txt_ids": torch.zeros(512, 3),
        "guidance": noise(1).abs() if config["guidance_embeds"] else None,
    }
