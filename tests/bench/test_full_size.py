"""Whole released models take a step at full size, on a GPU that is not there: what they would do to a real one."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import openvsa
from fake_gpu import GPU, FakeGPU, fake_gpu
from openvsa import SparsityConfig, TileLayout
from openvsa.bench.model_cases import ModelCase, find_models
from openvsa.integrations.families import family_of

CPU = torch.device("cpu")
# A layer takes a core some 0.04 seconds, of LTX-2 0.12: models that ran whole on a GPU, or differ from another one here
# in their size alone, have fewer.
FEWER = {
    "wan-1.3b-720p": {"num_layers": 2}, "wan-14b-720p": {"num_layers": 2}, "wan2.2-5b-720p": {"num_layers": 2},
    "wan-vace-1.3b-480p": {"num_layers": 4, "vace_layers": [0, 2]},
    "hunyuan-720p": {"num_layers": 2, "num_single_layers": 2}, "cogvideox-480p": {"num_layers": 2},
    "mochi-480p": {"num_layers": 3}, "cosmos-720p": {"num_layers": 2},
    "flux-2048": {"num_layers": 2, "num_single_layers": 2},
}  # fmt: skip
CASES = {
    case.name: replace(case, config={**case.config, **FEWER.get(case.name, {})})
    for case in find_models(["all"], "cuda")
}
# Tokens of text among those of the self-attention: before the lattice, and after it.
TEXT = {
    "hunyuan-720p": (0, 256), "hunyuan15-720p": (0, 256 + 64 + 729), "cogvideox-480p": (226, 0),
    "mochi-480p": (0, 256), "flux-2048": (512, 0),
}  # fmt: skip
# GiB that a dense step took on an H200: benchmarks/results.
MEASURED = {"wan-1.3b-480p": 4.20, "hunyuan15-720p": 42.35, "ltx": 4.07, "kandinsky5-512p": 7.02}
SPARSE = SparsityConfig(density=0.1, min_tokens=0, backend="triton")


def build(case: ModelCase, gpu: FakeGPU) -> Any:
    """The model of a case, whose blocks say that they run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", lambda devices: nullcontext())
        patch.setattr(Tensor, "any", lambda parameter: True)  # none has values that could be zero
        model = case.build(GPU)
    for name in block_names(model):
        block = model.get_submodule(name)
        block.register_forward_pre_hook(lambda *_, name=name: setattr(gpu, "layer", name))
        block.register_forward_hook(lambda *_: setattr(gpu, "layer", ""))
    return model


def block_names(model: Any) -> list[str]:
    return [name.rpartition(".")[0] for name, _ in family_of(model).attentions(model)]


@pytest.mark.parametrize("name", CASES)
def test_a_step(name: str) -> None:
    case = CASES[name]
    with fake_gpu() as gpu:
        model = build(case, gpu)
        given = gpu.put(lambda: case.arguments(model, CPU))
        attentions = [attn for _, attn in family_of(model).attentions(model)]
        processors = [attn.processor for attn in attentions]
        expected, dense = gpu.watch(lambda: model(**given, return_dict=False)[0])
        with openvsa.sparsify(model, config=SPARSE):
            out, sparse = gpu.watch(lambda: model(**given, return_dict=False)[0])
        assert all(attn.processor is processor for attn, processor in zip(attentions, processors, strict=True))
        assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, GPU)
        assert not dense.ops
        stacks = ("num_layers", "num_single_layers", "num_visual_blocks")
        layers = sum(model.config.get(stack, 0) for stack in stacks) + len(model.config.get("vace_layers", ()))

    # Each layer is sparse once, over the lattice and the text, at the density that was asked for.
    layout = TileLayout.fit(case.grid, 64, *TEXT.get(name, (0, 0)))
    heads, head_dim = family_of(model).heads(model)
    calls = [(layer, shapes) for layer, op, shapes in sparse.ops if op == "block_sparse_attention"]
    assert len(calls) == layers
    assert [layer for layer, _ in calls] == block_names(model)
    kept = math.ceil(0.1 * layout.num_tiles)
    blocks = layout.num_blocks
    for _, (q, k, v, q_offsets, kv_offsets, counts, indices) in calls:
        assert q == k == v == (1, layout.num_tokens, heads, head_dim)
        assert q_offsets == kv_offsets == (blocks + 1,)
        assert counts == (1, heads, blocks)
        assert indices == (1, heads, blocks, blocks if name in TEXT else kept)
    # Their tokens are in block order when they come.
    assert {op for layer, op, _ in sparse.ops if layer} == {
        "two_means", "block_scores", "top_blocks", "block_sparse_attention"
    }  # fmt: skip

    # The host waits for nothing in a layer, but for a look at the mask of text in the first.
    first = block_names(model)[0]
    assert [layer for layer in sparse.waits if layer not in ("", first)] == [
        layer for layer in dense.waits if layer not in ("", first)
    ]
    looks = 2 if name.startswith("hunyuan") else 0  # its lengths go to the device, and the answer comes back
    assert sparse.waits.count(first) - dense.waits.count(first) <= looks

    # Nothing is made that grows with the square of the tokens.
    hidden = layout.num_tokens * heads * head_dim * case.dtype.itemsize
    assert sparse.largest <= 12 * hidden
    assert sparse.peak <= 1.01 * dense.peak
    if name in MEASURED:
        assert dense.peak / 2**30 == pytest.approx(MEASURED[name], rel=0.02)


@pytest.mark.parametrize(("name", "suffixes"), [
    ("hunyuan-720p", (100, 256)), ("hunyuan15-720p", (100 + 64 + 729, 256 + 64 + 729)), ("mochi-480p", (100, 256)),
])  # fmt: skip
def test_texts_of_two_lengths(name: str, suffixes: tuple[int, int]) -> None:
    case = CASES[name]
    case = replace(case, config={**case.config, "num_layers": 2})

    def two_samples() -> dict[str, Any]:
        given = case.arguments(model, CPU)
        given = {key: x.repeat(2, *[1] * (x.dim() - 1)) if isinstance(x, Tensor) else x for key, x in given.items()}
        given["encoder_attention_mask"][0, 100:] = 0
        return given

    with fake_gpu() as gpu:
        model = build(case, gpu)
        given = gpu.put(two_samples)
        expected, _ = gpu.watch(lambda: model(**given, return_dict=False)[0])
        with openvsa.sparsify(model, config=SPARSE):
            out, sparse = gpu.watch(lambda: model(**given, return_dict=False)[0])
        assert (out.shape, out.dtype, out.device) == (expected.shape, expected.dtype, GPU)
    tokens = [math.prod(case.grid) + suffix for suffix in suffixes]
    calls = [(layer, shapes[0][:2]) for layer, op, shapes in sparse.ops if op == "block_sparse_attention"]
    assert calls == [(layer, (1, count)) for layer in block_names(model) for count in tokens]
