"""Whole models on the CPU, in tiny configurations: what is measured is right, and what is wrong is not timed."""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch.nn import functional

from openvsa.bench import model_dense, model_run
from openvsa.bench.model_cases import MODELS, ModelCase, find_models
from openvsa.bench.model_dense import DenseBy, dense_kernels
from openvsa.bench.model_profile import group_of
from openvsa.bench.model_run import ModelOptions, by_density, measure_model, one_step, run_models
from openvsa.bench.peers import missing
from openvsa.bench.record import MODEL_SCHEMA, load
from openvsa.config import Budget
from openvsa.errors import OpenVSAError
from openvsa.integrations.config import SparsityConfig
from openvsa.integrations.diffusers import sparsify
from openvsa.integrations.families import family_of

CPU = torch.device("cpu")
QUICK = ModelOptions(by_density([0.5, 0.25]), case_seconds=0.1)
ONE = replace(QUICK, sparse=by_density([0.25]))


def tiny(name: str, grid: tuple[int, ...], **config: Any) -> ModelCase:
    return replace(MODELS[name], grid=grid, config=config, device_type="cpu")


_WAN = {key: value for key, value in MODELS["tiny-wan"].config.items() if key != "in_channels"}
TINY = {
    "wan": MODELS["tiny-wan"],
    "wan-i2v": tiny("wan-i2v-14b-720p", (3, 10, 12), **_WAN, in_channels=12, image_dim=16, added_kv_proj_dim=48),
    "wan-vace": tiny("wan-vace-1.3b-480p", (3, 10, 12), **_WAN, in_channels=4, vace_layers=[0], vace_in_channels=12),
    "wan2.2": tiny("wan2.2-5b-720p", (3, 10, 12), **_WAN, in_channels=4),
    "hunyuan": tiny(
        "hunyuan-720p", (3, 4, 6), num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=2,
        num_refiner_layers=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4), in_channels=4,
        out_channels=4,
    ),
    "ltx": tiny(
        "ltx", (3, 4, 6), num_attention_heads=2, attention_head_dim=16, num_layers=2, cross_attention_dim=32,
        caption_channels=16, in_channels=4, out_channels=4,
    ),
    "ltx2": tiny(
        "ltx2-1080p", (3, 4, 6), in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=24,
        cross_attention_dim=48, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
        audio_attention_head_dim=12, audio_cross_attention_dim=24, num_layers=2, caption_channels=16,
    ),
    "hunyuan15": tiny(
        "hunyuan15-720p", (3, 4, 6), in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_refiner_layers=1, mlp_ratio=2.0, text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=8,
        rope_axes_dim=(4, 6, 6),
    ),
    "cogvideox": tiny(
        "cogvideox-480p", (3, 4, 6), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=12, num_layers=2, use_rotary_positional_embeddings=True,
    ),
    "mochi": tiny(
        "mochi-480p", (3, 4, 6), num_attention_heads=2, attention_head_dim=16, num_layers=2, pooled_projection_dim=16,
        in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=9,
    ),
    "cosmos": tiny(
        "cosmos-720p", (3, 4, 6), in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=24,
        num_layers=2, mlp_ratio=2, text_embed_dim=16, adaln_lora_dim=4, max_size=(8, 32, 32),
        concat_padding_mask=False,
    ),
    "kandinsky5": tiny(
        "kandinsky5-512p", (3, 4, 6), in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=48, ff_dim=64,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 8, 8),
    ),
    "flux": tiny(
        "flux-2048", (8, 20), in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ),
}  # fmt: skip


def test_a_dense_kernel_that_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    kernels, _ = dense_kernels("cpu")
    monkeypatch.setattr(model_run, "dense_kernels", lambda kind: ({**kernels, "fa4": fails}, {}))
    found = measure_model(TINY["wan"], CPU, QUICK, lambda text: None)
    assert found["passed"]
    why = "fails in its first call (RuntimeError: no kernel image for this device)"
    assert found["left_out"] == [{"what": "dense-fa4", "reasons": (why,)}]
    assert not any("fa4" in row["variant"] for row in found["rows"])

    monkeypatch.setattr(model_run, "dense_kernels", lambda kind: ({"flash": kernels["flash"], "fa4": fails}, {}))
    with pytest.raises(RuntimeError, match="no kernel image"):
        measure_model(TINY["wan"], CPU, QUICK, lambda text: None)


@pytest.mark.parametrize("name", TINY)
def test_a_family_is_measured(name: str) -> None:
    case = TINY[name]
    found = measure_model(case, CPU, QUICK, lambda text: None)
    assert found["passed"], found["failed"]
    assert found["layers"] == (3 if name in ("hunyuan", "wan-vace") else 2)
    assert found["attention"]["tokens"] == math.prod(case.grid) + found["attention"]["text_tokens"]
    assert found["gate"]["density 1"] < found["gate"]["density 0.25"]
    eager = {row["variant"]: row for row in found["rows"] if row["mode"] == "eager"}
    dense = f"dense-{found['attention']['dense']}"
    assert list(eager) == [dense, "density 0.5", "density 0.25"]
    assert eager["density 0.25"]["faster"] == eager[dense]["ms"] / eager["density 0.25"]["ms"]
    attention = {row["variant"] for row in found["rows"] if row["mode"] == "attention"}
    assert attention == {"dense-flash", "dense-math", "density 0.5", "density 0.25"}
    assert {row["variant"] for row in found["rows"] if row["mode"] == "kernel"} == {"density 0.5", "density 0.25"}


def with_config(name: str, config: SparsityConfig) -> ModelOptions:
    return replace(QUICK, sparse={name: config}, config=name)


@pytest.mark.parametrize("name", ["wan", "mochi"])  # text in the sequence or not
def test_query_blocks_of_several_tiles(name: str) -> None:
    config = SparsityConfig(density=0.25, q_tiles=(1, 2, 2), min_tokens=0)
    found = measure_model(TINY[name], CPU, with_config("two", config), lambda text: None)
    alone = measure_model(TINY[name], CPU, ONE, lambda text: None)
    assert found["passed"], found["failed"]
    assert max(found["attention"]["q_tiles"]) == 2
    assert max(alone["attention"]["q_tiles"]) == 1
    assert found["gate"]["two"] != alone["gate"]["density 0.25"]
    assert [row["density"] for row in found["rows"] if row["variant"] == "two"] == [0.25] * 3


def test_settings_that_are_no_share_and_leave_a_layer_dense(tmp_path: Path) -> None:
    config = SparsityConfig(budget=Budget(top_k=2), tile=(3, 5, 4), dense_layers=(0,), min_tokens=0)
    options = with_config("two-tiles", config)
    record, path = run_models([TINY["wan"]], CPU, options, out=tmp_path, command="x", commit="abc")
    [found] = record["cases"]
    assert found["passed"], found["failed"]
    assert found["attention"]["tile"] == (3, 5, 4)
    # Of six tiles, in the attention of the first layer by itself too.
    assert {row["density"] for row in found["rows"] if row["variant"] == "two-tiles"} == {1 / 3}
    assert path is not None
    settings = load(path, MODEL_SCHEMA)["settings"]
    assert settings["config"] == "two-tiles"
    assert SparsityConfig.from_dict(settings["sparse"]["two-tiles"]) == config

    assert found["gate"]["two-tiles"] > found["gate"]["density 1"]
    both = measure_model(TINY["wan"], CPU, with_config("a", replace(config, dense_layers=())), lambda text: None)
    assert both["gate"]["a"] != found["gate"]["two-tiles"]


def test_settings_of_weights_that_were_trained_with_it() -> None:
    case = replace(TINY["wan"], grid=(4, 8, 8))
    options = with_config("vsa-14b", one_step(SparsityConfig.preset("vsa-14b", min_tokens=0)))
    found = measure_model(case, CPU, replace(options, modes=("eager", "compiled")), lambda text: None)
    assert found["passed"], found["failed"]
    assert found["attention"]["tile"] == (4, 4, 4)
    channels = 2 * 24  # heads of so many
    assert found["parameters"] == sum(p.numel() for p in case.build(CPU).parameters()) + 2 * (channels + 1) * channels
    assert found["gate"]["density 1"] < found["gate"]["vsa-14b"]
    modes = [row["mode"] for row in found["rows"] if row["variant"] == "vsa-14b"]
    assert modes == ["attention", "kernel", "eager", "compiled"]


def test_one_step_is_sparse_and_chooses_anew() -> None:
    config = SparsityConfig(density=0.5, steps={0: 1.0}, dense_first_steps=3, reuse_steps=2, dense_layers=(0,))
    assert one_step(config) == SparsityConfig(density=0.5, dense_layers=(0,))


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("wan", SparsityConfig(density=0.5, q_tiles=(1, 2)), r"q_tiles .* each axis of tiny-wan \(3x10x12\), got 1x2"),
        ("flux", SparsityConfig(density=0.5, tile=(4, 4, 4)), r"tile .* each axis of flux-2048 \(8x20\), got 4x4x4"),
        ("ltx", SparsityConfig.preset("vsa-1.3b"), r"vsa .* WanTransformer3DModel .* LTXVideoTransformer3DModel"),
    ],
)
def test_settings_that_a_model_cannot_have_are_refused_at_once(name: str, config: SparsityConfig, said: str) -> None:
    with pytest.raises(OpenVSAError, match=said):
        run_models([TINY[name]], CPU, with_config("vsa", config), out=None, command="", commit=None)


def test_compiled_and_profiled() -> None:
    options = replace(ONE, modes=("eager", "compiled"), profile=True)
    found = measure_model(TINY["wan"], CPU, options, lambda text: None)
    assert found["passed"], found["failed"]
    dense = f"dense-{found['attention']['dense']}"  # whichever was faster
    assert [row["variant"] for row in found["rows"] if row["mode"] == "compiled"] == [dense, "density 0.25"]
    assert found["gate"][f"compiled {dense}"] < found["gate"]["density 0.25"]
    profiled = {(entry["mode"], entry["variant"]): entry for entry in found["profile"]}
    assert set(profiled) == {(m, v) for m in ("eager", "compiled") for v in (dense, "density 0.25")}
    assert profiled["eager", "density 0.25"]["groups"]["linear"] > 0


@pytest.mark.parametrize("wrong", ["dense-", "density 0.25"])
def test_compiled_steps_that_differ_are_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_and_peak = model_run._run_and_peak
    names: list[str] = []

    def run(subject: Any) -> tuple[Tensor, int | None]:
        out, peak = run_and_peak(subject)
        names.append(list(subject.ways())[len(names) % 2])  # two eager ones, then two compiled ones
        return (out * 1.5 if len(names) > 2 and names[-1].startswith(wrong) else out), peak

    monkeypatch.setattr(model_run, "_run_and_peak", run)
    options = replace(ONE, modes=("eager", "compiled"))
    found = measure_model(TINY["wan"], CPU, options, lambda text: None)
    assert not found["passed"]
    assert found["failed"][0].startswith(f"compiled, {wrong}")
    assert {row["mode"] for row in found["rows"]} == {"attention", "kernel", "eager"}


def test_full_plans_that_differ_from_dense_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsify = model_run.sparsify

    def half(model: Any, *, config: SparsityConfig, **settings: Any) -> Any:
        return sparsify(model, config=replace(config, density=(config.density or 0) / 2), **settings)

    monkeypatch.setattr(model_run, "sparsify", half)
    found = measure_model(TINY["wan"], CPU, QUICK, lambda text: None)
    assert not found["passed"]
    assert "at density 1 the output differs" in found["failed"][0]
    assert not any(row["mode"] == "eager" for row in found["rows"])


def test_a_model_that_does_not_become_dense_again_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    sparsify = model_run.sparsify

    @contextmanager
    def changing(model: Any, **settings: Any) -> Any:
        with sparsify(model, **settings) as handle:
            yield handle
        model.proj_out.bias += 1e-3

    monkeypatch.setattr(model_run, "sparsify", changing)
    found = measure_model(TINY["wan"], CPU, QUICK, lambda text: None)
    assert any("not the same bit for bit" in why for why in found["failed"])


def test_no_case_begins_after_the_time_is_spent(tmp_path: Path) -> None:
    case = TINY["wan"]
    record, path = run_models([case, case], CPU, QUICK, out=tmp_path, command="x", commit="abc", seconds=1e-9)
    assert record["not_run"] == [case.name, case.name]
    assert path is not None
    assert path.name.startswith("models-")
    assert load(path, MODEL_SCHEMA)["not_run"] == record["not_run"]
    with pytest.raises(OpenVSAError, match="openvsa-bench-models/1"):
        load(path)


def test_memory_that_another_model_holds_counts_for_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_run, "_run_and_peak", lambda subject: (subject.forward(), 3 * 2**30))
    found = measure_model(TINY["wan"], CPU, QUICK, lambda text: None)
    assert {row["peak_bytes"] for row in found["rows"] if row["mode"] == "eager"} == {3 * 2**30}
    monkeypatch.setattr(model_run, "_held_bytes", lambda device: 2**30)
    found = measure_model(TINY["wan"], CPU, QUICK, lambda text: None)
    assert {row["peak_bytes"] for row in found["rows"] if row["mode"] == "eager"} == {None}
    reasons = ["1.0 GiB were in use before the model was made, and would count"]
    assert {"what": "peak memory", "reasons": reasons} in found["left_out"]


def test_compiled_alone() -> None:
    with pytest.raises(OpenVSAError, match="modes are eager and compiled, got fast"):
        ModelOptions(modes=("fast",))
    # CogVideoX names no blocks that repeat.
    for name in ("wan", "cogvideox"):
        found = measure_model(TINY[name], CPU, replace(QUICK, modes=("compiled",)), lambda text: None)
        assert found["passed"], found["failed"]
        assert {row["mode"] for row in found["rows"]} == {"attention", "kernel", "compiled"}


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_settings_that_need_more_graphs_than_dynamo_allows(name: str) -> None:
    """It would run the rest of CogVideoX's eagerly, and refuse Wan's."""
    torch.compiler.reset()  # what other tests have compiled serves here too
    made = counters["stats"]["unique_graphs"]
    with dynamo.patch(recompile_limit=1):
        found = measure_model(TINY[name], CPU, replace(QUICK, modes=("compiled",)), lambda text: None)
    assert found["passed"], found["failed"]
    assert counters["stats"]["unique_graphs"] - made >= 3  # dense, and at two densities


# The blocks of Mochi break into several graphs: see its family's tests. Wan's are of one class.
@pytest.mark.parametrize("name", [name for name in TINY if name not in ("mochi", "wan-i2v", "wan2.2")])
def test_compiled_layers_have_their_graphs_in_common(name: str) -> None:
    """Two for each kind of block, however many there are: torch gives up after eight."""
    stacks = {"num_layers", "num_single_layers", "num_visual_blocks"} & TINY[name].config.keys()
    config = {**TINY[name].config, **dict.fromkeys(stacks, 3)}
    if "vace_layers" in config:
        config["vace_layers"] = range(3)
    model = replace(TINY[name], config=config).build(CPU)
    inputs = TINY[name].arguments(model, CPU)
    torch.compiler.reset()
    with torch.no_grad(), dynamo.patch(recompile_limit=2), sparsify(model, density=0.3, min_tokens=0):
        for block in dict.fromkeys(layer.rpartition(".")[0] for layer, _ in family_of(model).attentions(model)):
            model.get_submodule(block).compile(fullgraph=True, dynamic=False, backend="eager")
        model(**inputs)


def test_a_package_that_does_not_load_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_fa4.py").write_text("raise RuntimeError('no driver\\nfor this')\n")
    (tmp_path / "silent_fa4.py").write_text("raise RuntimeError\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert missing("silent_fa4") == ("silent_fa4 cannot be imported (RuntimeError: )",)
    monkeypatch.setattr(model_dense, "FA4", "broken_fa4")
    kernels, left_out = dense_kernels("cuda")
    assert list(kernels) == ["cudnn", "flash"]
    assert left_out == {"fa4": ("broken_fa4 cannot be imported (RuntimeError: no driver for this)",)}

    monkeypatch.setattr(model_run, "dense_kernels", lambda kind: (dense_kernels(kind)[0], left_out))
    _, path = run_models([TINY["wan"]], CPU, QUICK, out=tmp_path, command="x", commit="abc")
    assert path is not None
    [case] = load(path, MODEL_SCHEMA)["cases"]
    assert case["left_out"] == [{"what": "dense-fa4", "reasons": list(left_out["fa4"])}]


def test_names() -> None:
    assert find_models(["all"], "cpu") == [MODELS["tiny-wan"]]
    with pytest.raises(OpenVSAError, match="there is no model case 'nothing'"):
        find_models(["nothing"], "cpu")
    with pytest.raises(OpenVSAError, match="is measured on cuda, not on cpu"):
        find_models(["wan-14b-720p"], "cpu")


def test_only_self_attention_is_answered_and_masks_are_dropped() -> None:
    q, k = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 3, 8)
    with DenseBy(lambda q, k, v: torch.zeros_like(q)):
        mine = functional.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(1, 1, 1, 4, dtype=torch.bool))
        cross: Tensor = functional.scaled_dot_product_attention(q, k, k)
    assert not mine.any()
    torch.testing.assert_close(cross, functional.scaled_dot_product_attention(q, k, k))


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("forward_wide", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("kernel_cutlass_kernel_flash_attncuteflash_fwd", "attention"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "linear"),
        ("_gather_kernel", "pooling and permutation"),
        ("_top_kernel", "selection"),
        ("triton_red_fused__to_copy_add_mul_native_layer_norm_0", "norm, rope, activation"),
        ("void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>", "copy and cast"),
        ("something", "other"),
    ],
)
def test_groups_of_kernels(kernel: str, group: str) -> None:
    assert group_of(kernel) == group


def test_a_step_that_differs_from_the_gate_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = model_run._gate

    def stricter(subject: Any, failed: list[str]) -> Any:
        found, dense = gate(subject, failed)
        return found, dense + 1

    monkeypatch.setattr(model_run, "_gate", stricter)
    found = measure_model(TINY["wan"], CPU, QUICK, lambda text: None)
    assert f"eager, dense-{found['attention']['dense']}: the output differs from dense" in found["failed"][0]
    assert not any(row["mode"] == "eager" for row in found["rows"])
