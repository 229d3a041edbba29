"""Names and files of VSA checkpoints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from openvsa import MissingExtraError, OpenVSAError
from openvsa.integrations.checkpoint import convert, read_branch, rename

BLOCKS = 3


def wan(*, image: bool = False) -> WanTransformer3DModel:
    torch.manual_seed(0)
    extra = {"image_dim": 12, "added_kv_proj_dim": 24, "pos_embed_seq_len": 6} if image else {}
    return WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=32, ffn_dim=32, num_layers=BLOCKS, **extra,
    )  # fmt: skip


def released(model: WanTransformer3DModel) -> dict[str, Tensor]:
    """The tensors of a model and branch weights, named as in the published checkpoints."""
    tensors = dict(model.state_dict())
    for i in range(BLOCKS):
        tensors[f"blocks.{i}.to_gate_compress.weight"] = torch.randn(24, 24)
        tensors[f"blocks.{i}.to_gate_compress.bias"] = torch.randn(24)
    return tensors


def trained(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same under the names of FastVideo's own modules (wanvideo.py), written down module by module."""
    pairs = [
        ("patch_embedding", "patch_embedding.proj"),
        ("condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.fc_in"),
        ("condition_embedder.text_embedder.linear_2", "condition_embedder.text_embedder.fc_out"),
        ("condition_embedder.time_embedder.linear_1", "condition_embedder.time_embedder.mlp.fc_in"),
        ("condition_embedder.time_embedder.linear_2", "condition_embedder.time_embedder.mlp.fc_out"),
        ("condition_embedder.time_proj", "condition_embedder.time_modulation.linear"),
        ("condition_embedder.image_embedder.ff.net.0.proj", "condition_embedder.image_embedder.ff.fc_in"),
        ("condition_embedder.image_embedder.ff.net.2", "condition_embedder.image_embedder.ff.fc_out"),
    ]
    for i in range(BLOCKS):
        pairs += [
            (f"blocks.{i}.attn1.{name}", f"blocks.{i}.{name}") for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k")
        ]
        pairs += [
            (f"blocks.{i}.attn1.to_out.0", f"blocks.{i}.to_out"),
            (f"blocks.{i}.attn2.to_out.0", f"blocks.{i}.attn2.to_out"),
            (f"blocks.{i}.ffn.net.0.proj", f"blocks.{i}.ffn.fc_in"),
            (f"blocks.{i}.ffn.net.2", f"blocks.{i}.ffn.fc_out"),
            (f"blocks.{i}.norm2", f"blocks.{i}.self_attn_residual_norm.norm"),
        ]
    modules = dict(pairs)
    return {
        f"{modules.get(name.rpartition('.')[0], name.rpartition('.')[0])}.{name.rpartition('.')[2]}".lstrip("."): tensor
        for name, tensor in tensors.items()
    }


def beside_to_q(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace(".to_gate", ".attn1.to_gate"): tensor for name, tensor in tensors.items()}


def wrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torch.compile around FSDP around blocks with activation checkpointing, in DistributedDataParallel."""
    inside = (re.sub(r"^(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module.", name) for name in tensors)
    return {
        f"module._orig_mod._fsdp_wrapped_module.{name}": tensor
        for name, tensor in zip(inside, tensors.values(), strict=True)
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a)


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("form", [dict, beside_to_q, trained, wrapped], ids=lambda form: form.__name__)
def test_every_form_becomes_both_layouts(form: Callable, image: bool) -> None:
    tensors = released(wan(image=image))
    for to, expected in (("fastvideo", tensors), ("diffusers", beside_to_q(tensors))):
        renamed = {new: form(tensors)[old] for old, new in rename(form(tensors), to).items()}
        assert same(renamed, expected)


def test_unknown_names_are_listed() -> None:
    names = [*released(wan()), "blocks.0.attn1.to_qkv.weight", "lora.up", "blocks.0.to_gate_fine.weight"]
    with pytest.raises(OpenVSAError, match=r"3 of .* names") as error:
        rename(names)
    assert all(name in str(error.value) for name in names[-3:])
    assert "prefix" not in str(error.value)


@pytest.mark.parametrize("prefix", ["transformer.", "model.diffusion_model."])
def test_of_many_unknown_names_a_few_are_listed_and_their_prefix(prefix: str) -> None:
    names = [prefix + name for name in released(wan())]
    with pytest.raises(
        OpenVSAError, match=rf"and {len(names) - 5} more\. Without the prefix '{prefix}'.*save"
    ) as error:
        rename(names)
    assert len(str(error.value)) < 600
    with pytest.raises(OpenVSAError, match=f"^{len(names) + 1} of {len(names) + 1} names") as error:
        rename([*names, "vae.conv.weight"])
    assert "prefix" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("vace_blocks.0.attn1.to_q.weight", "VACE and Wan Animate cannot be converted"),
        ("transformer.vace_patch_embedding.bias", "VACE and Wan Animate cannot be converted"),
        ("face_adapter.0.to_q.weight", "VACE and Wan Animate cannot be converted"),
        ("model.diffusion_model.blocks.0.self_attn.q.weight", "Wan's own release: .*from_single_file"),
    ],
)
def test_checkpoints_that_people_have_get_advice(name: str, said: str) -> None:
    with pytest.raises(OpenVSAError, match=said):
        rename([name])


def test_two_names_of_one_tensor_are_refused() -> None:
    names = [*released(wan()), "blocks.1.attn1.to_gate_compress.bias"]
    with pytest.raises(OpenVSAError, match=r"blocks\.1\.to_gate_compress\.bias and blocks\.1\.attn1"):
        rename(names)


@pytest.mark.parametrize("lost", ["blocks.2.to_gate_compress.weight", "blocks.0.to_gate_compress.bias"])
def test_branch_weights_of_some_blocks_only_are_refused(lost: str) -> None:
    with pytest.raises(OpenVSAError, match=re.escape(f"lacks {lost}")):
        rename(released(wan()).keys() - {lost})


def test_an_unknown_layout_is_refused() -> None:
    with pytest.raises(OpenVSAError, match="diffusers or fastvideo, got 'comfy'"):
        rename([], "comfy")  # pyright: ignore[reportArgumentType]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A VSA transformer as published, in one file."""
    path = tmp_path / "transformer"
    model = wan()
    model.save_pretrained(path)
    save_file(released(model), path / "diffusion_pytorch_model.safetensors", metadata={"format": "pt", "step": "7"})
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A dense transformer in several files, as save_pretrained writes them."""
    path = tmp_path / "sharded"
    wan().save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def contents(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_there_and_back_is_the_same_folder(folder: Path, tmp_path: Path) -> None:
    there = convert(folder, tmp_path / "there")
    assert (there.renamed, there.branch, there.added, there.dropped) == (2 * BLOCKS, BLOCKS, 0, 0)
    assert same(contents(tmp_path / "there"), beside_to_q(contents(folder)))
    convert(tmp_path / "there", tmp_path / "back", "fastvideo")
    for file in folder.iterdir():
        if file.suffix == ".safetensors":
            assert same(load_file(tmp_path / "back" / file.name), load_file(file))
        else:
            assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    for path in (folder, tmp_path / "there", tmp_path / "back"):
        with safe_open(path / "diffusion_pytorch_model.safetensors", "pt") as file:
            assert file.metadata() == {"format": "pt", "step": "7"}
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_one_file(folder: Path, tmp_path: Path) -> None:
    convert(folder / "diffusion_pytorch_model.safetensors", tmp_path / "new" / "model.safetensors")
    assert same(load_file(tmp_path / "new" / "model.safetensors"), beside_to_q(contents(folder)))
    with pytest.raises(OpenVSAError, match=r"must end in \.safetensors"):
        convert(folder / "diffusion_pytorch_model.safetensors", tmp_path / "model.pt")


def test_dense_to_vsa_and_back_in_several_files(sharded: Path, tmp_path: Path) -> None:
    vsa, dense = tmp_path / "vsa", tmp_path / "dense"
    done = convert(sharded, vsa, branch="zero")
    assert (done.renamed, done.branch, done.added) == (0, BLOCKS, BLOCKS)
    branch = read_branch(vsa)
    assert {name: tuple(tensor.shape) for name, tensor in branch.items()} == {
        f"blocks.{i}.attn1.to_gate_compress.{part}": shape
        for i in range(BLOCKS)
        for part, shape in (("weight", (24, 24)), ("bias", (24,)))
    }
    assert not any(tensor.any() for tensor in branch.values())
    index = json.loads((vsa / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        name: file.name for file in sorted(vsa.glob("*.safetensors")) for name in load_file(file)
    }
    assert index["metadata"]["total_size"] == sum(x.numel() * x.element_size() for x in contents(vsa).values())

    assert convert(vsa, dense, branch="drop").dropped == BLOCKS
    assert same(contents(dense), contents(sharded))
    assert json.loads((dense / index_name(dense)).read_text()) == json.loads((sharded / index_name(dense)).read_text())
    restored = WanTransformer3DModel.from_pretrained(dense)
    assert same(dict(restored.state_dict()), dict(wan().state_dict()))


def index_name(path: Path) -> str:
    return next(path.glob("*.index.json")).name


def test_zero_is_for_dense_checkpoints_alone(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OpenVSAError, match=r'has branch weights already.*use "keep"; or "drop" first'):
        convert(folder, tmp_path / "out", "fastvideo", branch="zero")
    assert not (tmp_path / "out").exists()


def test_zero_needs_to_q_of_every_block(sharded: Path, tmp_path: Path) -> None:
    save_file({"proj_out.bias": torch.ones(2)}, tmp_path / "few.safetensors")
    with pytest.raises(OpenVSAError, match=r"lacks blocks\.N\.attn1\.to_q"):
        convert(tmp_path / "few.safetensors", tmp_path / "out.safetensors", branch="zero")
    with pytest.raises(OpenVSAError, match=r"lacks blocks\.\d\.attn1\.to_q.*give their folder"):
        convert(sorted(sharded.glob("*.safetensors"))[1], tmp_path / "out.safetensors", branch="zero")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(OpenVSAError, match="has no tensors, so nothing would be written"):
        convert(tmp_path / "empty.safetensors", tmp_path / "out.safetensors")
    branch = {f"blocks.0.to_gate_compress.{part}": torch.ones(2) for part in ("weight", "bias")}
    save_file(branch, tmp_path / "branch.safetensors")
    with pytest.raises(OpenVSAError, match="no tensors but branch weights"):
        convert(tmp_path / "branch.safetensors", tmp_path / "out.safetensors", branch="drop")
    assert not (tmp_path / "out.safetensors").exists()


def test_every_file_is_told_of(sharded: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    convert(sharded, tmp_path / "out", on_file=lambda *of: told.append(of))
    names = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert told == [(name, number, len(names)) for number, name in enumerate(names, 1)]


def test_a_dense_checkpoint_has_no_branch(sharded: Path) -> None:
    assert read_branch(sharded) == {}


def shard(path: Path) -> Path:
    return sorted(path.glob("*.safetensors"))[0]


def write_map(path: Path, weight_map: object) -> None:
    (path / index_name(path)).write_text(json.dumps({"weight_map": weight_map}))


def lose(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nowhere")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "unknown": (lambda path: save_file({"x": torch.ones(1)}, shard(path)), "does not match its files"),
    "missing-shard": (lambda path: shard(path).unlink(), "wrong or missing tensors"),
    "stray-shard": (lambda path: save_file({"scale": torch.ones(1)}, path / "extra.safetensors"), "stray files"),
    "repeated": (lambda path: save_file(load_file(shard(path)), path / "z.safetensors"), "repeats tensors"),
    "cut": (lambda path: cut(shard(path)), "cut off"),
    "no-index": (lambda path: next(path.glob("*.index.json")).unlink(), "one index of them"),
    "bad-index": (lambda path: next(path.glob("*.index.json")).write_text("{}"), "is no index"),
    "list": (lambda path: write_map(path, ["a"]), r"weight_map must be an object .* got \['a'\]"),
    "numbers": (lambda path: write_map(path, {"a": 1}), r"weight_map must be an object .* got \{'a': 1\}"),
    "lost": (lambda path: lose(shard(path)), "cannot be read"),
    "pickled": (lambda path: (path / "diffusion_pytorch_model.bin").touch(), "pickled weights"),
    "folder": (lambda path: (path / "more").mkdir(), "folders that would be lost: more"),
    "pipeline": (lambda path: (path / "model_index.json").touch(), "whole pipeline"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_source_is_refused_and_nothing_is_written(
    sharded: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(sharded)
    with pytest.raises(OpenVSAError, match=message):
        convert(sharded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_a_failure_half_way_leaves_nothing(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[object] = []

    def fail_second(tensors: dict, file: Path, **_: object) -> None:
        written.append(file)
        if len(written) == 2:
            raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", fail_second)
    with pytest.raises(OSError, match="disk full"):
        convert(sharded, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["sharded"]


def test_wrong_arguments(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OpenVSAError, match="exists already"):
        convert(folder, folder)
    with pytest.raises(OpenVSAError, match="is inside of"):
        convert(folder, folder / "converted")
    with pytest.raises(OpenVSAError, match="does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(OpenVSAError, match="no safetensors file"):
        convert(folder / "config.json", tmp_path / "out")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(OpenVSAError, match="exists already"):
        convert(folder, tmp_path / "link")
    with pytest.raises(OpenVSAError, match="keep, zero, drop, got 'half'"):
        convert(folder, tmp_path / "out", branch="half")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file/out", "a part of the path is a file"),
        ("file/there/out", "a part of the path is a file"),
        ("/proc/out", "in /proc, "),
        ("o" * 300, "File name too long"),
    ],
    ids=["in-a-file", "deep-in-a-file", "proc", "long"],
)
def test_a_target_that_cannot_be_written_is_refused(folder: Path, tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OpenVSAError, match=f"cannot be written: .*{why}.* give a path in a folder"):
        convert(folder, tmp_path / name)
    with pytest.raises(OpenVSAError, match="cannot be written"):
        convert(folder / "diffusion_pytorch_model.safetensors", tmp_path / f"{name}.safetensors")


def test_a_missing_package_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r"openvsa\[io\]"):
        convert(folder, tmp_path / "out")
