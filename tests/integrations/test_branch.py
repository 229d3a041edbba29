"""Branch weights on a tiny random Wan transformer: released ones, zero ones, and none."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import ceil, prod
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from diffusers.models.transformers import transformer_wan
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import linear

import openvsa
from openvsa.integrations.branch import add_branch, load_branch, remove_branch
from openvsa.integrations.checkpoint import convert
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.diffusers import SparseHandle
from openvsa.select import ReleasedVSA
from vsa_contract import contract, slots_of

LAYERS, DIM = 2, 48
GRID = (5, 7, 9)


@pytest.fixture
def model() -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=64, num_layers=LAYERS,
    ).eval()  # fmt: skip


def run(
    model: nn.Module, grid: tuple[int, int, int] = GRID, batch: int = 2, dtype: torch.dtype = torch.float32
) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, 4, grid[0], 2 * grid[1], 2 * grid[2], generator=generator).to(dtype)
    text = torch.randn(batch, 3, 16, generator=generator).to(dtype)
    with torch.no_grad():
        return model(hidden_states=latents, timestep=torch.full((batch,), 500.0), encoder_hidden_states=text)[0]


@pytest.fixture
def released(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A file of branch weights as published, and its tensors."""
    generator = torch.Generator().manual_seed(2)
    tensors = {
        f"blocks.{i}.to_gate_compress.{part}": torch.randn(shape, generator=generator)
        for i in range(LAYERS)
        for part, shape in (("weight", (DIM, DIM)), ("bias", (DIM,)))
    }
    path = tmp_path / "released.safetensors"
    save_file(tensors, path)
    return path, tensors


def sparsify_released(model: nn.Module, method: ReleasedVSA) -> SparseHandle:
    return openvsa.sparsify(model, budget=method.budget, selector=method, tile=method.tile)


@contextmanager
def authors(
    model: WanTransformer3DModel, weights: dict[str, Tensor], grid: tuple[int, int, int], kept: int
) -> Iterator[None]:
    """Diffusers' own code with the contract in place of self-attention; branch weights straight from the file."""
    current: dict[str, Tensor] = {}
    dense = transformer_wan.dispatch_attention_fn

    def remember(index: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            weight, bias = (
                weights[f"blocks.{index}.to_gate_compress.{part}"].to(hidden) for part in ("weight", "bias")
            )
            current["weight"] = linear(hidden, weight, bias).unflatten(-1, (2, -1))

        return hook

    def attention(query: Tensor, key: Tensor, value: Tensor, **kwargs: object) -> Tensor:
        if query.shape[1] != key.shape[1]:
            return dense(query, key, value, **kwargs)
        return contract(query, key, value, current["weight"], grid, kept).out

    hooks = [
        block.attn1.register_forward_pre_hook(remember(i), with_kwargs=True) for i, block in enumerate(model.blocks)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer_wan, "dispatch_attention_fn", attention)
        yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("counted", ["tiles", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [GRID, (4, 8, 8)], ids=str)
def test_a_released_model_is_the_contract(
    model: WanTransformer3DModel, released: tuple, grid: tuple[int, int, int], dtype: torch.dtype, counted: str
) -> None:
    path, tensors = released
    model.to(dtype)
    tiles = len(slots_of(grid)[0])
    kept = ceil(0.5 * (tiles if counted == "tiles" else prod(grid) / 64))
    with authors(model, tensors, grid, kept):
        expected = run(model, grid, dtype=dtype)
    load_branch(model, path)
    handle = sparsify_released(model, ReleasedVSA(0.5, counted))  # pyright: ignore[reportArgumentType]
    found = run(model, grid, dtype=dtype)
    assert [layer.delivered_density for layer in handle.report().layers] == pytest.approx([kept / tiles] * LAYERS)
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.02)
    with authors(model, tensors, grid, min(kept + 1, tiles)):
        handle.detach()
        other = run(model, grid, dtype=dtype)
    assert (found - expected).norm() < 0.2 * (other - expected).norm()


def test_zero_branch_weights_change_nothing(model: WanTransformer3DModel) -> None:
    dense = run(model)
    with openvsa.sparsify(model, density=0.3):
        sparse = run(model)
    add_branch(model)
    assert torch.equal(run(model), dense)
    with openvsa.sparsify(model, density=1.0):
        torch.testing.assert_close(run(model), dense, rtol=1e-5, atol=2e-6)
    with openvsa.sparsify(model, density=0.3):
        torch.testing.assert_close(run(model), sparse, rtol=1e-5, atol=2e-6)
    with sparsify_released(model, ReleasedVSA(0.0)):
        torch.testing.assert_close(run(model), dense, rtol=1e-5, atol=2e-6)
    assert torch.equal(run(model), dense)


def test_zero_branch_weights_from_the_converter(model: WanTransformer3DModel, tmp_path: Path) -> None:
    dense = run(model)
    model.save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "vsa", "fastvideo", branch="zero")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "vsa").eval()
    load_branch(again, tmp_path / "vsa")
    with sparsify_released(again, ReleasedVSA(0.0)):
        torch.testing.assert_close(run(again), dense, rtol=1e-5, atol=2e-6)


def test_layers_that_stay_dense_have_no_branch(model: WanTransformer3DModel, released: tuple) -> None:
    dense = run(model)
    load_branch(model, released[0])
    with openvsa.sparsify(model, config=SparsityConfig(density=0.5, dense_layers=tuple(range(LAYERS)))):
        assert torch.equal(run(model), dense)


def test_of_two_transformers_one_may_have_a_branch(model: WanTransformer3DModel, released: tuple) -> None:
    class Pipe:
        transformer, transformer_2 = model, copy.deepcopy(model)

    method = ReleasedVSA(0.5)
    absent = r"only the sparse part is computed.*load_branch puts them in"
    with pytest.warns(UserWarning, match=absent), sparsify_released(Pipe.transformer_2, method):
        without = run(Pipe.transformer_2)
    load_branch(model, released[0])
    with sparsify_released(model, method):
        having = run(model)
    assert not torch.allclose(having, without)
    with pytest.warns(UserWarning, match=absent):
        sparsify_released(Pipe(), method)  # pyright: ignore[reportArgumentType]
    assert torch.equal(run(Pipe.transformer), having)
    assert torch.equal(run(Pipe.transformer_2), without)


def test_a_lost_branch_is_told_of_once(model: WanTransformer3DModel) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        for sparsity in (0.8, 0.5, 0.0):
            sparsify_released(model, ReleasedVSA(sparsity)).detach()
    assert len(told) == 1
    assert "ReleasedVSA is for weights that were trained with VSA" in str(told[0].message)


def test_any_selector_and_a_density_for_each_head(model: WanTransformer3DModel, released: tuple) -> None:
    """At density 1 every selector gives dense + weight * compressed, however the density is said."""
    load_branch(model, released[0])
    with sparsify_released(model, ReleasedVSA(0.0)):
        expected = run(model)
    assert not torch.allclose(run(model), expected)

    def everything(q: Tensor, k: Tensor, layout: openvsa.TileLayout, budget: openvsa.Budget) -> openvsa.BlockPlan:
        return openvsa.BlockPlan.dense(layout.q_blocks, layout.blocks)

    tile = (4, 4, 4)
    layers = {f"blocks.{i}.attn1": (1.0, 0.999) for i in range(LAYERS)}
    for config in (
        SparsityConfig(density=1.0, tile=tile),
        SparsityConfig(density=0.3, tile=tile, layers=layers),
        SparsityConfig(density=0.3, tile=tile, selector=everything),
    ):
        with openvsa.sparsify(model, config=config):
            torch.testing.assert_close(run(model), expected, rtol=1e-5, atol=2e-6)


def test_zero_branch_weights_learn(model: WanTransformer3DModel) -> None:
    add_branch(model)
    openvsa.sparsify(model, density=0.3)
    latents = torch.randn(1, 4, 5, 14, 18)
    model(latents, torch.tensor([500.0]), torch.randn(1, 3, 16))[0].square().sum().backward()
    for block in model.blocks:
        assert block.attn1.to_gate_compress.weight.grad.abs().sum() > 0


def test_lattices_in_a_row_and_an_exact_detach(model: WanTransformer3DModel, released: tuple) -> None:
    dense = run(model)
    load_branch(model, released[0])
    one = {}
    for grid in (GRID, (2, 4, 4)):
        with sparsify_released(model, ReleasedVSA(0.5)):
            one[grid] = run(model, grid)
    handle = sparsify_released(model, ReleasedVSA(0.5))
    for grid in (GRID, (2, 4, 4), GRID):
        assert torch.equal(run(model, grid), one[grid])
    handle.detach()
    assert torch.equal(run(model), dense)
    remove_branch(model)
    remove_branch(model)
    assert not any("to_gate_compress" in name for name in model.state_dict())


def test_saved_and_loaded_again(model: WanTransformer3DModel, released: tuple, tmp_path: Path) -> None:
    load_branch(model, released[0])
    model.save_pretrained(tmp_path / "saved", max_shard_size="30KB")
    again = WanTransformer3DModel.from_pretrained(tmp_path / "saved")
    assert not hasattr(again.blocks[0].attn1, "to_gate_compress")
    load_branch(again, tmp_path / "saved")
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_compiled_blocks_trace_without_graph_breaks(model: WanTransformer3DModel, released: tuple) -> None:
    load_branch(model, released[0])
    eager = {}
    methods = (ReleasedVSA(0.5), ReleasedVSA(0.7, "tokens"))
    for method in methods:
        with sparsify_released(model, method):
            eager[method] = run(model)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for method in methods:
        with sparsify_released(model, method):
            torch.testing.assert_close(run(model), eager[method])


def test_the_settings_are_kept_in_a_file(tmp_path: Path) -> None:
    method = ReleasedVSA(0.8, "tokens")
    config = SparsityConfig(budget=method.budget, selector=method, tile=method.tile)
    config.save(tmp_path / "vsa.json")
    assert SparsityConfig.load(tmp_path / "vsa.json") == config


def test_settings_that_a_released_model_cannot_have(model: WanTransformer3DModel, released: tuple) -> None:
    load_branch(model, released[0])
    method = ReleasedVSA(0.5)
    with pytest.raises(openvsa.BudgetError, match=r"decides how many tiles are kept; give Budget\(.*0.5"):
        openvsa.sparsify(model, density=0.2, selector=method, tile=method.tile)
    with sparsify_released(model, method) as handle, pytest.raises(openvsa.BudgetError, match="decides how many"):
        handle.density = 0.3
    for table in ({"steps": {0: 0.3}}, {"layers": {"blocks.0.attn1": 0.3}}):
        config = SparsityConfig(budget=method.budget, selector=method, tile=method.tile, **table)
        with pytest.raises(openvsa.BudgetError, match="keeps alike in all steps and layers"):
            openvsa.sparsify(model, config=config)
    with openvsa.sparsify(model, budget=method.budget, selector=method, tile=(2, 4, 4)):
        with pytest.raises(openvsa.ShapeError, match=r"tiles of \(4, 4, 4\)"):
            run(model)
    with pytest.raises(openvsa.UnsupportedError, match="cannot be reused"):
        openvsa.sparsify(model, config=SparsityConfig(density=0.5, reuse_steps=2))


def test_branch_weights_that_do_not_belong(model: WanTransformer3DModel, released: tuple, tmp_path: Path) -> None:
    path, tensors = released
    save_file({"blocks.0.attn1.to_q.bias": torch.ones(DIM)}, tmp_path / "dense.safetensors")
    with pytest.raises(openvsa.OpenVSAError, match="no branch weights"):
        load_branch(model, tmp_path / "dense.safetensors")
    for change in (
        {"blocks.2.to_gate_compress.weight": torch.ones(DIM, DIM), "blocks.2.to_gate_compress.bias": torch.ones(DIM)},
        {"blocks.1.to_gate_compress.weight": torch.ones(DIM, 2)},
    ):
        save_file(tensors | change, tmp_path / "other.safetensors")
        with pytest.raises(openvsa.ShapeError, match=r"do not fit the transformer, such as blocks\.[12]"):
            load_branch(model, tmp_path / "other.safetensors")
    assert not hasattr(model.blocks[0].attn1, "to_gate_compress")
    load_branch(model, path)
    with pytest.raises(openvsa.OpenVSAError, match="has branch weights already"):
        load_branch(model, path)
    del model.blocks[1].attn1.to_gate_compress
    with pytest.raises(openvsa.OpenVSAError, match="1 of 2 self-attentions have branch weights"):
        openvsa.sparsify(model, density=0.5)


def test_models_that_cannot_have_branch_weights(model: WanTransformer3DModel) -> None:
    with openvsa.sparsify(model, density=0.5), pytest.raises(openvsa.OpenVSAError, match="is attached: detach"):
        add_branch(model)
    with pytest.raises(openvsa.UnsupportedError, match="got WanVACETransformer3DModel"):
        add_branch(WanVACETransformer3DModel.__new__(WanVACETransformer3DModel))
    with pytest.raises(openvsa.OpenVSAError, match="on meta; add branch weights"):
        add_branch(model.to("meta"))
