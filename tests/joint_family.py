"""What every family with text in the same attention must do, as tests that a family's own test class inherits."""

from __future__ import annotations

import inspect
import math
from typing import Any, ClassVar

import pytest
import torch
from diffusers import __version__ as diffusers_version
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import openvsa
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.diffusers import observe
from openvsa.integrations.families import family_of
from openvsa.integrations.report import AttentionEvent


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-5)


def perturbed(model: nn.Module) -> nn.Module:
    """The model in eval mode with every parameter moved, so that gates and biases that start at 0 take part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def check_hoist(
    model: nn.Module,
    inputs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    entering: int = 3,
    tile: tuple[int, ...] = (1, 2, 2),
) -> None:
    """Tokens change their order at entry and exit alone; the output is that of every layer doing it for itself.

    `entering` tensors do at the entry: as a rule cosines, sines and the embedded video.
    """
    reorders: list[bool] = []
    original = openvsa.TileLayout._reorder

    def counted(self: openvsa.TileLayout, x: Tensor, dim: int, *, inverse: bool) -> Tensor:
        reorders.append(inverse)
        return original(self, x, dim, inverse=inverse)

    monkeypatch.setattr(openvsa.TileLayout, "_reorder", counted)
    with openvsa.sparsify(model, density=0.3, tile=tile):
        hoisted = run(model, inputs)
    assert reorders == [False] * entering + [True]
    family = type(family_of(model))
    monkeypatch.setattr(family, "hoist", lambda self, transformer: None)
    with openvsa.sparsify(model, density=0.3, tile=tile):
        close(hoisted, run(model, inputs))
    assert len(reorders) - entering - 1 >= 4 * len(family_of(model).attentions(model))


def check_mask_is_refused(model: nn.Module, inputs: dict[str, Any]) -> None:
    """A caller's own mask is refused, and with strict=False leaves the exact dense result."""
    dense = run(model, inputs)
    with openvsa.sparsify(model, density=0.3), pytest.raises(openvsa.UnsupportedError, match="attention mask"):
        run(model, inputs)
    lenient = SparsityConfig(density=0.3, strict=False, min_tokens=0)
    with openvsa.sparsify(model, config=lenient), pytest.warns(UserWarning, match="dense attention instead of sparse"):
        assert torch.equal(run(model, inputs), dense)


def run(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


class Masked(TorchFunctionMode):
    """Inside, the n-th self-attention over a video is dense under the token mask of the n-th event's plan."""

    def __init__(self, events: list[AttentionEvent]) -> None:
        super().__init__()
        self.events = list(events)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.scaled_dot_product_attention or not self.events:
            return func(*args, **(kwargs or {}))
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
        event, tokens = self.events[0], query.shape[-2]
        if tokens < event.layout.num_tokens:
            return func(*args, **(kwargs or {}))
        assert event.plan is not None
        self.events.pop(0)
        lens = torch.tensor(event.layout.block_lens)
        mask = event.plan.block_mask().repeat_interleave(lens, -1).repeat_interleave(lens, -2)
        valid, back = event.layout.num_tokens, event.layout.inverse_permutation
        whole = torch.eye(tokens, dtype=torch.bool).repeat(*mask.shape[:2], 1, 1)  # padded text reads itself alone
        whole[..., :valid, :valid] = mask[..., back, :][..., back]
        return func(query, key, value, attn_mask=whole)


class JointFamilyTests:
    """A subclass says how its model is built and called; `text` of `inputs` gives each sample's valid text tokens."""

    grids: ClassVar[tuple[tuple[int, ...], ...]] = ((3, 4, 6), (5, 7, 9), (1, 1, 1), (2, 5, 3))
    layers: ClassVar[tuple[str, ...]]
    dense_attentions: ClassVar[int] = 0  # attention modules beside the video's own, which keep their processors
    forward: ClassVar[tuple[str, ...]]  # arguments of the transformer's forward that the family reads
    fullgraph: ClassVar[bool] = True  # whether a block compiles into one graph
    config: ClassVar[tuple[str, ...]] = ()  # entries of the transformer's config that the family reads
    steps: ClassVar[tuple[float, ...]] = (900.0, 800.0, 700.0, 600.0)  # timesteps as the pipeline gives them
    texts: ClassVar[tuple[int, int]] = (7, 7)  # valid text tokens of the two samples of a batch

    def model(self) -> nn.Module:
        raise NotImplementedError

    def inputs(self, grid: tuple[int, ...], text: tuple[int, ...] = (7,)) -> dict[str, Any]:
        raise NotImplementedError

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        """A Diffusers pipeline around the model, and arguments that make it generate without encoders."""
        raise NotImplementedError

    def large(self) -> tuple[int, ...]:
        return self.grids[1]

    def test_density_one_equals_dense(self) -> None:
        model = self.model()
        cases = [self.inputs(grid) for grid in self.grids]
        dense = [run(model, inputs) for inputs in cases]
        with openvsa.sparsify(model, density=1.0):
            for inputs, expected in zip(cases, dense, strict=True):
                close(run(model, inputs), expected)

    def test_a_batch_of_samples_with_their_own_text(self) -> None:
        model, inputs = self.model(), self.inputs(self.large(), self.texts)
        dense = run(model, inputs)
        with openvsa.sparsify(model, density=1.0):
            close(run(model, inputs), dense)

    def test_gradients_at_density_one_equal_dense(self) -> None:
        model, inputs = self.model(), self.inputs(self.grids[0], self.texts)
        attn: Any = model.get_submodule(self.layers[0])
        latents = inputs["hidden_states"] = inputs["hidden_states"].requires_grad_()
        dense = torch.autograd.grad(model(**inputs)[0].square().sum(), (latents, attn.to_k.weight))
        with openvsa.sparsify(model, density=1.0):
            ours = torch.autograd.grad(model(**inputs)[0].square().sum(), (latents, attn.to_k.weight))
        for mine, theirs in zip(ours, dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))

    def test_guidance_in_one_batch_equals_guidance_in_two_calls(self) -> None:
        model, both = self.model(), self.inputs(self.large(), self.texts)
        halves = [_sample(both, index) for index in (0, 1)]
        with openvsa.sparsify(model, density=0.3):
            together = run(model, both)
            apart = torch.cat([run(model, half) for half in halves])
        close(together, apart)

    def test_sizes_in_a_row_and_detach(self) -> None:
        model = self.model()
        small, large = self.inputs(self.grids[0]), self.inputs(self.large(), self.texts)
        dense = run(model, small), run(model, large)
        handle = openvsa.sparsify(model, density=0.2)
        sparse = run(model, large)
        assert not torch.equal(sparse, dense[1])
        assert not torch.equal(run(model, small), dense[0])
        assert torch.equal(run(model, large), sparse)
        handle.detach()
        assert torch.equal(run(model, small), dense[0])
        assert torch.equal(run(model, large), dense[1])

    def test_only_the_video_becomes_sparse(self) -> None:
        model, events = self.model(), list[AttentionEvent]()
        before = _processors(model)
        handle = openvsa.sparsify(model, density=0.2)
        handle.on_attention(events.append)
        run(model, self.inputs(self.large(), self.texts))
        assert [layer.name for layer in handle.report().layers] == list(self.layers)
        changed = [name for name, processor in _processors(model).items() if processor is not before[name]]
        assert changed == list(self.layers)
        assert len(before) - len(changed) == self.dense_attentions
        assert {event.layout.grid for event in events} == {self.large()}
        for event in events:
            assert event.plan is not None
            mask = event.plan.block_mask()
            text = list(event.layout.text_blocks)
            assert mask[..., text, :].all()
            assert mask[..., text].all()
            tiles = event.layout.tile_blocks
            kept = max(1, math.ceil(0.2 * event.layout.num_tiles))
            assert (mask[..., tiles, tiles].sum(-1) == kept).all()
            assert kept < event.layout.num_tiles
        assert any(event.layout.text_blocks for event in events)

    def test_observing_leaves_every_bit(self) -> None:
        model, inputs = self.model(), self.inputs(self.grids[0], self.texts)
        dense = run(model, inputs)
        with observe(model):
            assert torch.equal(run(model, inputs), dense)

    def test_observing_shows_the_valid_tokens_of_every_call(self) -> None:
        """Also where padded text is masked: an audit looks at dense attention."""
        model, inputs, events = self.model(), self.inputs(self.large(), self.texts), list[AttentionEvent]()
        with observe(model) as handle:
            handle.on_attention(events.append)
            run(model, inputs)
            report = handle.report()
        assert {layer.sparse_calls for layer in report.layers} == {0}
        calls = [(event.name, event.layout.suffix + event.layout.prefix) for event in events]
        assert list(dict.fromkeys(name for name, _ in calls)) == list(self.layers)
        for name in self.layers:
            lengths = {length for layer, length in calls if layer == name}
            assert len(lengths) == len(set(self.texts))
            assert max(lengths) - min(lengths) == max(self.texts) - min(self.texts)
        for event in events:
            assert event.plan is None
            assert {x.shape[1] for x in (event.q, event.k, event.v)} == {event.layout.num_tokens}

    def test_blocks_compile(self) -> None:
        model, inputs = self.model(), self.inputs(self.grids[0])
        with openvsa.sparsify(model, density=0.3):
            eager = run(model, inputs)
            for block in _blocks(model, self.layers):
                block.compile(backend="aot_eager", fullgraph=self.fullgraph)
            close(run(model, inputs), eager)

    def test_sparse_attention_is_dense_attention_under_the_mask_of_its_plan(self) -> None:
        model, inputs, events = self.model(), self.inputs(self.large()), list[AttentionEvent]()
        with openvsa.sparsify(model, density=0.3) as handle:
            handle.on_attention(events.append)
            sparse = run(model, inputs)
        with Masked(events):
            close(run(model, inputs), sparse)

    def test_steps_and_plan_reuse(self) -> None:
        model, events, inputs = self.model(), list[AttentionEvent](), self.inputs(self.grids[0], self.texts)
        steps = [{**inputs, "timestep": torch.full_like(inputs["timestep"], timestep)} for timestep in self.steps]
        dense = [run(model, step) for step in steps]
        config = SparsityConfig(density=0.3, tile=(2,) * len(self.grids[0]), dense_first_steps=2, reuse_steps=2)
        with openvsa.sparsify(model, config=config) as handle:
            handle.on_attention(events.append)
            got = [run(model, step) for step in steps]
        assert [torch.equal(one, other) for one, other in zip(got, dense, strict=True)] == [True, True, False, False]
        plans = [event.plan for event in events if event.plan is not None]
        assert len(plans) == 2 * len({id(plan) for plan in plans}) > 0

    def test_its_pipeline(self) -> None:
        """The real pipeline calls the transformer as the family expects, step by step and branch by branch."""
        pipe, arguments = self.pipeline()
        pipe.set_progress_bar_config(disable=True)

        def generate() -> Tensor:
            noise = torch.Generator().manual_seed(4)
            return pipe(**arguments, num_inference_steps=5, generator=noise, output_type="latent", return_dict=False)[0]

        events, dense = list[AttentionEvent](), generate()
        config = SparsityConfig(density=0.3, tile=(2,) * len(self.grids[0]), dense_first_steps=2, reuse_steps=2)
        with openvsa.sparsify(pipe, config=config) as handle:
            handle.on_attention(events.append)
            sparse = generate()
            report = handle.report()
            assert torch.equal(generate(), sparse)  # a new generation begins anew
        assert not torch.equal(sparse, dense)
        assert torch.equal(generate(), dense)
        each_step = report.layers[0].calls // 5
        assert {(layer.calls, layer.sparse_calls) for layer in report.layers} == {(5 * each_step, 3 * each_step)}
        plans = [id(event.plan) for event in events if event.plan is not None]
        assert len(plans) == 2 * 3 * each_step * len(self.layers)
        assert len(set(plans)) == 2 * 2 * each_step * len(self.layers)  # steps 2 and 3 share theirs

    def test_attention_outside_a_forward_is_refused(self) -> None:
        model = self.model()
        block = next(_blocks(model, self.layers))
        caught: list[tuple[Any, Any]] = []
        hook = block.register_forward_pre_hook(lambda _, a, k: caught.append((a, k)), with_kwargs=True)
        run(model, self.inputs(self.grids[0]))
        hook.remove()
        [(args, kwargs)] = caught
        openvsa.sparsify(model, density=0.3)
        with pytest.raises(openvsa.OpenVSAError, match="lattice is not known"):
            block(*args, **kwargs)

    def test_diffusers_still_has_what_the_family_reads(self) -> None:
        model = self.model()
        parameters = inspect.signature(type(model).forward).parameters
        missing = [name for name in self.forward if name not in parameters]
        missing += [name for name in self.config if name not in model.config]  # pyright: ignore[reportOperatorIssue]
        assert not missing, f"Diffusers {diffusers_version} no longer has {missing} in {type(model).__name__}"
        for name in self.layers:
            assert callable(model.get_submodule(name).processor)


def _sample(inputs: dict[str, Any], index: int) -> dict[str, Any]:
    """One sample of a batch of two; tensors without a batch (position ids) stay whole."""
    return {
        name: value[index : index + 1] if isinstance(value, Tensor) and value.ndim and len(value) == 2 else value
        for name, value in inputs.items()
    }


def _processors(model: nn.Module) -> dict[str, Any]:
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}


def _blocks(model: nn.Module, layers: tuple[str, ...]) -> Any:
    return (model.get_submodule(name.rpartition(".")[0]) for name in layers)
