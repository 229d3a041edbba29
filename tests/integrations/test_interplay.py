"""Attached models together with what else people do to a model: compile, save, LoRA, offload, other backends."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import io
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, WanPipeline, WanTransformer3DModel
from diffusers.hooks import apply_first_block_cache, apply_pyramid_attention_broadcast
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional

import openvsa
from openvsa import SparsityConfig
from openvsa.integrations.families.wan import Wan
from openvsa.integrations.intercept import Interception
from openvsa.integrations.report import AttentionEvent
from openvsa.layout import shelf
from tiny_wan import run, text, tiny_wan


def attach(model: Any, **changes: Any) -> Any:
    return openvsa.sparsify(model, config=SparsityConfig(density=0.2, tile=(1, 2, 2), **changes))


# -- torch.compile ----------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Any:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def graphs() -> tuple[Any, list[int]]:
    """A backend for torch.compile that runs graphs eagerly and notes each."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        made.append(len(graph.graph.nodes))
        return graph.forward

    return backend, made


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_share_one_graph_through_steps_settings_and_layers() -> None:
    model, prompt = tiny_wan(6), text()
    handle = attach(model, dense_first_steps=1, layers={"blocks.2.attn1": 0.5})
    levels = (900.0, 700.0, 500.0)
    eager = [run(model, level, prompt) for level in levels]
    backend, made = graphs()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for level, expected in zip(levels, eager, strict=True):
        torch.testing.assert_close(run(model, level, prompt), expected)
    # Dense, sparse, and sparse at another density: not one for each layer or step.
    assert len(made) <= 3
    handle.density = 0.4
    handle.detach()
    torch.testing.assert_close(run(model, 900.0, prompt), eager[0])


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_have_one_graph_for_each_lattice() -> None:
    """torch gives up after eight: the first layer must not need one of its own."""
    model, twin = tiny_wan(3), tiny_wan(3)
    attach(model)
    attach(twin)
    backend, made = graphs()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    for number, grid in enumerate([(3, 5, 7), (2, 4, 4), (3, 4, 6), (3, 5, 7)]):
        torch.testing.assert_close(run(model, grid=grid), run(twin, grid=grid))
        assert len(made) == min(number + 1, 3)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_whole_compiled_model() -> None:
    model = tiny_wan()
    attach(model)
    eager = run(model)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(whole), eager)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("dynamic", [None, True])
def test_a_whole_model_whose_first_forward_is_compiled(dynamic: bool | None) -> None:
    """Its layouts are made while it is traced; also those of other lattices later on."""
    grids = [(3, 5, 7), (2, 4, 4), (3, 5, 7), (3, 4, 6)]
    model, twin = tiny_wan(), tiny_wan()
    whole = torch.compile(model, fullgraph=True, backend="eager", dynamic=dynamic)
    with attach(twin):
        eager = [run(twin, grid=grid) for grid in grids]
    shelf._NAMES.clear()
    with attach(whole):
        for grid, expected in zip(grids, eager, strict=True):
            torch.testing.assert_close(run(whole, grid=grid), expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_what_torch_compile_has_wrapped_is_attached_and_detached() -> None:
    model = tiny_wan()
    dense = run(model)
    with attach(model):
        sparse = run(model)
    whole = torch.compile(model, backend="eager")
    run(whole)
    for given in (whole, SimpleNamespace(transformer=whole)):
        with attach(given):
            torch.testing.assert_close(run(whole), sparse)
            with pytest.raises(openvsa.OpenVSAError, match="attached already"):
                attach(model)
        torch.testing.assert_close(run(whole), dense)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("min_tokens", [None, 0])
@pytest.mark.parametrize("settings", [{"dense_first_steps": 1}, {"steps": {0: 0.5}}, {"reuse_steps": 2}])
def test_a_whole_compiled_model_has_no_steps(settings: dict[str, Any], min_tokens: int | None) -> None:
    model = tiny_wan()
    attach(model, min_tokens=min_tokens, **settings)
    with pytest.raises(openvsa.UnsupportedError, match="compile_repeated_blocks"):
        run(torch.compile(model, backend="eager"))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="compile_repeated_blocks"):
        run(torch.compile(model, backend="eager", fullgraph=True))


@pytest.mark.usefixtures("fresh_compiler")
def test_plans_are_reused_in_compiled_blocks() -> None:
    model, prompt = tiny_wan(3), text()
    attach(model, reuse_steps=2)
    levels = (900.0, 700.0, 500.0, 300.0)
    eager = [run(model, level, prompt) for level in levels]
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for level, expected in zip(levels, eager, strict=True):
        torch.testing.assert_close(run(model, level, prompt), expected)


# -- saving, adapters, offload ------------------------------------------------------------------------------------


def test_saving_an_attached_model_saves_the_model(tmp_path: Path) -> None:
    model = tiny_wan()
    dense, names = run(model), set(model.state_dict())
    attach(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path)
    assert torch.equal(run(WanTransformer3DModel.from_pretrained(tmp_path)), dense)


def test_a_copy_of_an_attached_model_is_attached_on_its_own() -> None:
    model = tiny_wan()
    dense = run(model)
    handle = attach(model)
    sparse = run(model)
    twin = copy.deepcopy(model)
    handle.detach()
    assert torch.equal(run(model), dense)
    assert torch.equal(run(twin), sparse)


def test_an_attached_model_cannot_be_pickled_and_says_so() -> None:
    model = tiny_wan()
    with attach(model) as handle:
        for what in (model, handle):
            with pytest.raises(openvsa.OpenVSAError, match="cannot be pickled: detach its handle first"):
                torch.save(what, io.BytesIO())
    torch.save(model, io.BytesIO())


def test_adapters_before_and_after_attaching() -> None:
    lora = LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    plain = tiny_wan()
    attach(plain)
    without = run(plain)

    torch.manual_seed(1)
    before = tiny_wan()
    torch.manual_seed(1)
    before.add_adapter(lora, "style")
    attach(before)
    expected = run(before)
    assert not torch.allclose(expected, without, atol=1e-3)

    after = tiny_wan()
    handle = attach(after)
    torch.manual_seed(1)
    after.add_adapter(lora, "style")
    assert torch.equal(run(after), expected)
    after.disable_adapters()
    assert torch.equal(run(after), without)
    after.enable_adapters()
    after.fuse_lora()
    torch.testing.assert_close(run(after), expected, rtol=1e-4, atol=1e-5)
    after.unfuse_lora()
    torch.testing.assert_close(run(after), expected, rtol=1e-4, atol=1e-5)
    handle.detach()
    assert type(after.blocks[0].attn1.processor) is WanAttnProcessor


@pytest.mark.parametrize("module", ["patch_embedding", "proj_out"])
def test_adapters_where_tokens_enter_and_leave(module: str) -> None:
    """An adapter takes the place of the module that has the hook, and adds to what it returns."""
    lora = LoraConfig(r=4, target_modules=[module], init_lora_weights=False)

    def with_adapter(model: Any) -> Any:
        torch.manual_seed(1)
        model.add_adapter(lora, "style")
        return model

    dense = run(with_adapter(tiny_wan()))
    for model in (with_adapter(tiny_wan()), tiny_wan()):
        hoisted = hasattr(model, "peft_config")
        handle = openvsa.sparsify(model, density=1.0)
        if not hoisted:
            with_adapter(model)
        torch.testing.assert_close(run(model), dense, rtol=1e-4, atol=1e-5)
        assert handle._session.forward.hoisted == hoisted


@pytest.mark.parametrize("first", ["offload", "attach"])
def test_offloaded_weights(first: str) -> None:
    model = tiny_wan()
    dense = run(model)
    reference = tiny_wan()
    attach(reference)
    sparse = run(reference)
    if first == "attach":
        handle = attach(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        handle = attach(model)
    assert next(model.blocks.parameters()).is_meta
    assert torch.equal(run(model), sparse)
    handle.detach()
    assert torch.equal(run(model), dense)


def test_a_model_that_is_offloaded_as_a_whole() -> None:
    reference = tiny_wan()
    attach(reference)
    model = tiny_wan()
    attach(model)
    model, hook = accelerate.cpu_offload_with_hook(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model), run(reference))
    hook.remove()


def test_fused_projections_after_attaching() -> None:
    model = tiny_wan()
    attach(model)
    expected = run(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    def gradient(checkpointing: bool) -> Tensor:
        model = tiny_wan()
        attach(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(torch.ones(1, 4, 3, 8, 8), torch.tensor([300.0]), text())[0].square().sum().backward()
        grad = model.blocks[0].attn1.to_k.weight.grad
        assert grad is not None
        return grad

    torch.testing.assert_close(gradient(True), gradient(False))


@pytest.mark.parametrize("hoisted", [True, False])
def test_what_checkpointing_computes_again_is_about_its_own_forward(
    hoisted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two forwards and one backward: the lattices have as many tokens, and one is too small to be sparse."""
    if not hoisted:
        monkeypatch.setattr(Wan, "hoist", lambda self, transformer: None)
    model = tiny_wan().train()
    model.enable_gradient_checkpointing()
    attach(model, min_tokens=50)
    grids = [(2, 10, 14), (2, 14, 10), (3, 8, 8)]
    given = [torch.randn(1, 4, *grid, generator=torch.Generator().manual_seed(1)) for grid in grids]

    def gradient(*latents: Tensor) -> Tensor:
        model.zero_grad()
        losses = [model(one, torch.tensor([300.0]), text())[0].square().mean() for one in latents]
        torch.stack(losses).sum().backward()
        return model.blocks[0].attn1.to_k.weight.grad.clone()

    torch.testing.assert_close(gradient(*given), sum(map(gradient, given)))


def test_what_checkpointing_computes_again_has_the_plans_it_had() -> None:
    """Also those that were made in an earlier step."""
    gradients = []
    for checkpointing in (True, False):
        model, prompt = tiny_wan(), text()
        attach(model, reuse_steps=2, min_tokens=0)
        if checkpointing:
            model.enable_gradient_checkpointing()
        noise = torch.Generator().manual_seed(1)
        for level in (900.0, 300.0):
            out = model(torch.randn(1, 4, 3, 8, 8, generator=noise), torch.tensor([level]), prompt)[0]
        out.square().sum().backward()
        gradients.append(model.blocks[0].attn1.to_k.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_cache_across_steps_keeps_raster_order() -> None:
    """FirstBlockCache adds hidden states of an earlier step, which may have been a dense one."""
    model, prompt = tiny_wan(3), text()
    model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    handle = attach(model, dense_first_steps=1)
    with model.cache_context("cond"):
        run(model, 900.0, prompt)
        assert handle._session.forward.hoisted is False
        run(model, 700.0, prompt)
        assert handle._session.forward.hoisted is False


def first_block_cache(model: Any) -> None:
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=10.0))


def pyramid_attention_broadcast(model: Any) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_block_identifiers=["blocks"],
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(model, config)


@pytest.mark.parametrize("put", [first_block_cache, pyramid_attention_broadcast])
@pytest.mark.parametrize("first", ["cache", "attach"])
def test_a_cache_put_in_place_by_its_function_keeps_raster_order(
    put: Any, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model does not know of it, and says that no cache is enabled."""
    prompt, levels = text(), (700.0, 690.0, 680.0)

    def outputs() -> list[Tensor]:
        model = tiny_wan(3)
        for step in (put, lambda model: attach(model, dense_first_steps=1))[:: 1 if first == "cache" else -1]:
            step(model)
        assert not model.is_cache_enabled
        with model.cache_context("cond"):
            return [run(model, level, prompt) for level in levels]

    ours = outputs()
    monkeypatch.setattr(Wan, "hoist", lambda self, transformer: None)
    for one, apart in zip(ours, outputs(), strict=True):
        torch.testing.assert_close(one, apart)


@pytest.mark.parametrize("first", ["offload", "attach"])
@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_weights_that_are_offloaded_in_groups(first: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are put in order once all the same."""
    # Diffusers 0.40 cannot do so without an accelerator.
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    model, reference, cpu = tiny_wan(), tiny_wan(), torch.device("cpu")
    dense = run(model)
    with attach(reference):
        sparse = run(reference)
    if first == "attach":
        handle = attach(model)
    blocks = 1 if kind == "block_level" else None
    model.enable_group_offload(cpu, cpu, offload_type=kind, num_blocks_per_group=blocks)
    if first == "offload":
        handle = attach(model)
    assert torch.equal(run(model), sparse)
    assert handle._session.forward.hoisted
    handle.detach()
    assert torch.equal(run(model), dense)


# -- attention backends, masks, settings that are not strict -------------------------------------------------------


class Elsewhere(WanAttnProcessor):
    """Attention that does not go through scaled_dot_product_attention."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return attn.to_out[0](attn.to_v(hidden_states))


def test_an_attention_backend_that_cannot_be_seen_is_refused() -> None:
    model = tiny_wan()
    model.blocks[1].attn1.set_processor(Elsewhere())
    attach(model)
    with pytest.raises(openvsa.UnsupportedError, match=r"blocks\.1\.attn1 \(Elsewhere\).*set_attention_backend"):
        run(model)


def test_settings_that_are_not_strict_warn_once_and_stay_dense() -> None:
    model = tiny_wan()
    model.blocks[1].attn1.set_processor(Elsewhere())
    handle = attach(model, strict=False)
    with pytest.warns(UserWarning, match=r"dense attention instead of sparse: blocks\.1\.attn1") as caught:
        run(model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model)
    assert [layer.sparse_calls for layer in handle.report().layers] == [2, 0]
    assert [layer.executed_density for layer in handle.report().layers] == [pytest.approx(0.2, abs=0.1), 1.0]


def test_native_backends_are_seen_and_flex_is_refused() -> None:
    model = tiny_wan()
    handle = attach(model)
    expected = run(model)
    model.set_attention_backend("_native_math")
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert model.blocks[0].attn1.processor.inner._attention_backend == "_native_math"
    model.set_attention_backend("native")
    with attention_backend("flex"):
        model.reset_attention_backend()
        with pytest.raises(openvsa.UnsupportedError, match="attention backend"):
            run(model)
    handle.detach()


def test_context_parallelism_is_refused() -> None:
    model = tiny_wan()
    attach(model)
    model.blocks[0].attn1.processor._parallel_config = object()
    with pytest.raises(openvsa.UnsupportedError, match="context parallelism"):
        run(model)


@pytest.mark.parametrize("strict", [True, False])
def test_a_mask_of_the_caller_is_refused(strict: bool) -> None:
    """Also by settings that are not strict: the tokens are in tile order, and the mask is not."""
    model, states, asked = tiny_wan(), torch.randn(1, 105, 48), []
    handle, attn = attach(model, strict=strict), model.blocks[0].attn1

    def in_between(*_: Any) -> None:
        with pytest.raises(openvsa.UnsupportedError, match="attention mask"):
            attn(states, None, torch.zeros(1, 1, 105, 105))
        with pytest.raises(openvsa.ShapeError, match=r"has 104 tokens, but this forward has 105"):
            attn(states[:, :104])
        asked.append(True)

    model.blocks[1].register_forward_pre_hook(in_between)
    run(model)
    assert asked
    handle.detach()
    attn(states, None, torch.zeros(1, 1, 105, 105))


def test_a_processor_with_weights_is_refused() -> None:
    class Heavy(nn.Module):
        def forward(self) -> None: ...

    model = tiny_wan()
    model.blocks[1].attn1.set_processor(Heavy())
    with pytest.raises(openvsa.UnsupportedError, match="Heavy with weights of its own"):
        attach(model)
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor


# -- attaching and detaching ----------------------------------------------------------------------------------------


def test_a_pipeline_without_its_transformer_says_so() -> None:
    with pytest.raises(
        openvsa.OpenVSAError, match=r"transformer of this WanPipeline is not there yet.*load_components"
    ):
        attach(WanPipeline(None, None, None, None))


def test_attaching_twice_is_refused_and_changes_nothing() -> None:
    model = tiny_wan()
    dense = run(model)
    with attach(model):
        sparse = run(model)
        for again in (lambda: attach(model), lambda: openvsa.integrations.diffusers.observe(model)):
            with pytest.raises(openvsa.OpenVSAError, match="attached already"):
                again()
        assert torch.equal(run(model), sparse)
    with attach(model):
        assert torch.equal(run(model), sparse)
    assert torch.equal(run(model), dense)


def test_a_processor_put_around_ours_stays_and_ours_steps_aside() -> None:
    model = tiny_wan()
    dense = run(model)
    handle = attach(model)
    ours = model.blocks[0].attn1.processor

    def around(*args: Any, **kwargs: Any) -> Tensor:
        return ours(*args, **kwargs)

    model.blocks[0].attn1.set_processor(around)
    assert not torch.equal(run(model), dense)
    handle.detach()
    assert model.blocks[0].attn1.processor is around
    assert torch.equal(run(model), dense)


def test_a_processor_of_diffusers_in_the_place_of_ours_is_refused() -> None:
    """Its layer would be dense, and not even in the report."""
    model = tiny_wan()
    dense = run(model)
    handle = attach(model)
    sparse = run(model)
    ours = model.blocks[1].attn1.processor
    model.blocks[1].attn1.set_processor(WanAttnProcessor())
    with pytest.raises(openvsa.UnsupportedError, match=r"blocks\.1\.attn1 was replaced by WanAttnProcessor"):
        run(model)
    model.blocks[1].attn1.set_processor(ours)
    assert torch.equal(run(model), sparse)
    model.set_attn_processor(WanAttnProcessor())
    handle.config = dataclasses.replace(handle.config, strict=False)
    with pytest.warns(UserWarning, match="was replaced by WanAttnProcessor"):
        torch.testing.assert_close(run(model), dense)
    handle.detach()
    assert torch.equal(run(model), dense)


def test_an_error_in_a_forward_leaves_the_next_one_alone() -> None:
    model = tiny_wan()
    attach(model)
    expected = run(model)
    with pytest.raises(RuntimeError):
        run(model, prompt=torch.ones(1, 3, 5))
    assert torch.equal(run(model), expected)


def test_the_wrapper_shows_the_signature_of_the_processor() -> None:
    model = tiny_wan()
    original = inspect.signature(model.blocks[0].attn1.processor.__call__)
    attach(model)
    assert inspect.signature(model.blocks[0].attn1.processor.__call__) == original


def test_the_interception_sees_attention_however_it_is_called() -> None:
    seen: list[dict[str, Any]] = []

    def answer(index: int, **call: Any) -> Tensor:
        seen.append({"index": index, **call})
        return call["query"] * 0

    q, other = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 4)
    with Interception(answer):
        functional.scaled_dot_product_attention(q, q, q, None, 0.0, False)
        assert not functional.scaled_dot_product_attention(query=q, key=q, value=q, scale=2.0).any()
        crossed = functional.scaled_dot_product_attention(q, other, other)
    assert [call["index"] for call in seen] == [0, 1]
    assert seen[1]["scale"] == 2.0
    assert torch.equal(crossed, functional.scaled_dot_product_attention(q, other, other))


def test_the_report_tells_asked_kept_and_run_apart() -> None:
    model = tiny_wan()
    handle = attach(model, dense_first_steps=1)
    run(model, 900)
    run(model, 700)
    [first, _] = handle.report().layers
    events: list[AttentionEvent] = []
    handle.on_attention(events.append)
    run(model, 500)
    plan = events[0].plan
    assert plan is not None
    mask, lens = plan.block_mask().double(), torch.tensor(plan.q_blocks.lens).double()
    share = float((mask @ lens * lens).sum(-1).mean() / lens.sum() ** 2)
    assert (first.calls, first.sparse_calls, first.requested_density) == (2, 1, 0.2)
    assert first.delivered_density == pytest.approx(plan.density)
    assert first.executed_density == pytest.approx((1 + share) / 2, rel=0.05)
    assert "asked 0.200" in str(handle.report())


def test_processors_that_were_kept_and_put_back_after_detaching_are_as_none() -> None:
    model = tiny_wan()
    dense = run(model)
    with attach(model):
        sparse, kept = run(model), model.attn_processors
    model.set_attn_processor(dict(kept))
    assert torch.equal(run(model), dense)
    with attach(model):
        assert torch.equal(run(model), sparse)
    assert type(model.blocks[0].attn1.processor) is WanAttnProcessor
