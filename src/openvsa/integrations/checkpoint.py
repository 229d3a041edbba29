"""Files of weights of Wan transformers trained with VSA: one name for each tensor, and from one layout to the other.

A VSA checkpoint is a Wan transformer with one more linear map a block, `to_gate_compress`, from the hidden states to
the weight of the compressed branch. FastVideo publishes it as `blocks.N.to_gate_compress`, everything else under
Diffusers' names; other loaders, and ours, look for it beside to_q, as `blocks.N.attn1.to_gate_compress`. FastVideo's
own modules have a third set of names, which files written during training may carry.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, require

__all__ = ["BRANCH", "Branch", "Conversion", "Layout", "convert", "has_branch", "read_branch", "rename"]

# The name of the branch weight's linear map in every checkpoint.
BRANCH = "to_gate_compress"

Layout = Literal["diffusers", "fastvideo"]
Branch = Literal["keep", "zero", "drop"]

# What PyTorch's wrappers put into names: DistributedDataParallel in front, the others anywhere.
_WRAPPERS = re.compile(r"^module\.|(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")

# FastVideo's modules to Diffusers' names. Source: param_names_mapping in FastVideo's
# fastvideo/configs/models/dits/wanvideo.py.
_EMBEDDER = r"^condition_embedder\."
_BLOCK = r"^blocks\.(\d+)\."
_FASTVIDEO = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^patch_embedding\.proj\.", r"patch_embedding."),
        (_EMBEDDER + r"text_embedder\.fc_in\.", r"condition_embedder.text_embedder.linear_1."),
        (_EMBEDDER + r"text_embedder\.fc_out\.", r"condition_embedder.text_embedder.linear_2."),
        (_EMBEDDER + r"time_embedder\.mlp\.fc_in\.", r"condition_embedder.time_embedder.linear_1."),
        (_EMBEDDER + r"time_embedder\.mlp\.fc_out\.", r"condition_embedder.time_embedder.linear_2."),
        (_EMBEDDER + r"time_modulation\.linear\.", r"condition_embedder.time_proj."),
        (_EMBEDDER + r"image_embedder\.ff\.fc_in\.", r"condition_embedder.image_embedder.ff.net.0.proj."),
        (_EMBEDDER + r"image_embedder\.ff\.fc_out\.", r"condition_embedder.image_embedder.ff.net.2."),
        (_BLOCK + r"(to_q|to_k|to_v|norm_q|norm_k|to_gate_compress)\.", r"blocks.\1.attn1.\2."),
        (_BLOCK + r"to_out\.(?=weight|bias)", r"blocks.\1.attn1.to_out.0."),
        (_BLOCK + r"attn2\.to_out\.(?=weight|bias)", r"blocks.\1.attn2.to_out.0."),
        (_BLOCK + r"ffn\.fc_in\.", r"blocks.\1.ffn.net.0.proj."),
        (_BLOCK + r"ffn\.fc_out\.", r"blocks.\1.ffn.net.2."),
        (_BLOCK + r"self_attn_residual_norm\.norm\.", r"blocks.\1.norm2."),
    )
]

# Every tensor of a Wan transformer, text or image to video, under Diffusers' names.
_BOTH = r"\.(?:weight|bias)"
_ATTENTION = rf"(?:(?:to_q|to_k|to_v|to_out\.0){_BOTH}|norm_[qk]\.weight)"
_KNOWN = re.compile(
    "|".join(
        (
            rf"(?:patch_embedding|proj_out){_BOTH}",
            r"scale_shift_table",
            rf"condition_embedder\.(?:(?:text|time)_embedder\.linear_[12]|time_proj){_BOTH}",
            rf"condition_embedder\.image_embedder\.(?:(?:norm1|norm2|ff\.net\.0\.proj|ff\.net\.2){_BOTH}|pos_embed)",
            r"blocks\.\d+\.scale_shift_table",
            rf"blocks\.\d+\.(?:norm2|ffn\.net\.0\.proj|ffn\.net\.2){_BOTH}",
            rf"blocks\.\d+\.attn[12]\.{_ATTENTION}",
            rf"blocks\.\d+\.attn2\.(?:(?:add_k_proj|add_v_proj){_BOTH}|norm_added_[qk]\.weight)",
            rf"blocks\.\d+\.attn1\.{BRANCH}{_BOTH}",
        )
    )
)
_OF_BRANCH = re.compile(rf"blocks\.(\d+)\.attn1\.{BRANCH}\.(weight|bias)")

# What only Wan VACE and Wan Animate have, and what Wan's own release and ComfyUI call their attentions.
_OF_OTHERS = re.compile(r"(?:^|\.)(?:vace_blocks|vace_patch_embedding|pose_patch_embedding|(?:motion|face)_\w+)\.")
_OF_RELEASE = re.compile(r"(?:^|\.)(?:self|cross)_attn\.[qkvo]\.")

# Weights that are pickled: reading one may run code.
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


def rename(names: Iterable[str], to: Layout = "diffusers") -> dict[str, str]:
    """What each tensor of a checkpoint is called in the other layout, whichever it has now.

    Prefixes of PyTorch's wrappers (torch.compile, FSDP, activation checkpointing, DistributedDataParallel) go.

    Args:
        names: all names of the checkpoint.
        to: "diffusers" puts the branch weights beside to_q (`blocks.N.attn1.to_gate_compress`), "fastvideo" on the
            block (`blocks.N.to_gate_compress`), as published. All other names are Diffusers' in both.

    Raises:
        OpenVSAError: names that no Wan transformer has but VACE and Animate, or none at all; two names of one tensor;
            or branch weights for some blocks and not for others.
    """
    if to not in get_args(Layout):
        raise OpenVSAError(f"a checkpoint can be converted to {' or '.join(get_args(Layout))}, got {to!r}")
    ours = {name: _plain(name) for name in names}
    unknown = sorted(name for name, plain in ours.items() if not _KNOWN.fullmatch(plain))
    if unknown:
        raise OpenVSAError(
            f"{len(unknown)} of {len(ours)} names are not those of a Wan transformer for text or image to video: "
            f"{_few(unknown)}{_advice(unknown, every=len(unknown) == len(ours))}"
        )
    seen: dict[str, str] = {}
    for name, plain in ours.items():
        if plain in seen:
            raise OpenVSAError(f"{seen[plain]} and {name} are both {plain}; keep one of them")
        seen[plain] = name
    _check_branch(seen)
    if to == "fastvideo":
        return {name: plain.replace(f".attn1.{BRANCH}.", f".{BRANCH}.") for name, plain in ours.items()}
    return ours


def _plain(name: str) -> str:
    """One tensor's name in the layout "diffusers"."""
    name = _WRAPPERS.sub("", name)
    for pattern, replacement in _FASTVIDEO:
        name = pattern.sub(replacement, name)
    return name


def _advice(unknown: list[str], *, every: bool) -> str:
    """What to do about names that are not known (`every`: no name is), for the files that people have."""
    prefix = ""
    for part in unknown[0].split(".") if every else ():
        prefix += f"{part}."
        if all(name.startswith(prefix) and _KNOWN.fullmatch(_plain(name[len(prefix) :])) for name in unknown):
            return (
                f". Without the prefix {prefix!r}, which all have, they are: save the tensors without it (load_file "
                "and save_file of safetensors.torch), and use that file"
            )
    if any(map(_OF_OTHERS.search, unknown)):
        return ". Transformers of Wan VACE and Wan Animate cannot be converted"
    if any(map(_OF_RELEASE.search, unknown)):
        return (
            ". These are names of Wan's own release: let Diffusers load the file "
            "(WanTransformer3DModel.from_single_file) and save it (save_pretrained), and use that folder"
        )
    return ""


def _few(names: Collection[str]) -> str:
    """At most five of the names, and how many more there are."""
    listed = ", ".join(list(names)[:5])
    return f"{listed} and {len(names) - 5} more" if len(names) > 5 else listed


def _check_branch(names: Iterable[str]) -> None:
    """Branch weights, weight and bias, are there for all blocks or for none. `names` are of the layout "diffusers"."""
    parts = {(int(found[1]), found[2]) for name in names if (found := _OF_BRANCH.fullmatch(name))}
    blocks = {int(found[1]) for name in names if (found := re.match(_BLOCK, name))}
    missing = sorted({(block, part) for block in blocks for part in ("weight", "bias")} - parts)
    if parts and missing:
        lost = [f"blocks.{block}.{BRANCH}.{part}" for block, part in missing]
        raise OpenVSAError(f"the checkpoint has branch weights for some blocks but lacks {_few(lost)}")


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        tensors: how many tensors were written.
        renamed: how many of them have another name than before.
        branch: how many blocks have branch weights now.
        added, dropped: blocks that were given zero branch weights, or lost theirs, because the caller asked for it.
    """

    tensors: int
    renamed: int
    branch: int
    added: int
    dropped: int


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: Layout = "diffusers",
    *,
    branch: Branch = "keep",
    on_file: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Write a Wan checkpoint in the other layout, from a dense model to a VSA model, or back.

    Tensors are copied bit for bit, with the metadata of their files and the other files of the folder. Either the
    whole target appears or nothing does. One file of a checkpoint is in memory at a time.

    Args:
        source: a safetensors file, or the folder of a transformer: one safetensors file or several and their index.
        target: a file or a folder as the source is. It must not exist.
        to: as in `rename`.
        branch: "keep" leaves branch weights as they are; "zero" gives zero ones to a dense checkpoint, which then
            computes the same; "drop" leaves them out, which makes a dense checkpoint but not the same model.
        on_file: called before each file of tensors with its name, its number from 1, and how many there are.

    Raises:
        OpenVSAError: see `rename`; source or target are not as above; the index does not match its files; "zero" for
            a checkpoint that has branch weights, or not to_q of every block; or no tensor is left.
        MissingExtraError: the package safetensors is missing.
    """
    source, target = Path(source), Path(target)
    if branch not in get_args(Branch):
        raise OpenVSAError(f"branch must be one of {', '.join(get_args(Branch))}, got {branch!r}")
    if os.path.lexists(target):
        raise OpenVSAError(f"{target} exists already; give a path that does not, so that nothing is overwritten")
    if source.is_dir() and target.resolve().is_relative_to(source.resolve()):
        raise OpenVSAError(f"{target} is inside of {source}, whose files it would join; give a path elsewhere")
    checkpoint = _open(source)
    plan = _Plan.of(rename(checkpoint.places, to), to, branch)
    if not plan.names:
        what = "no tensors but branch weights" if checkpoint.places else "no tensors"
        raise OpenVSAError(
            f"{source} has {what}, so nothing would be written; give the checkpoint of a Wan transformer"
        )
    if source.is_file() and target.suffix != ".safetensors":
        raise OpenVSAError(f"{source} is one file, so the target must end in .safetensors, got {target}")
    with _room_for(target) as room:
        folder = Path(room) / "done"
        folder.mkdir()
        _write(checkpoint, plan, folder, on_file)
        if source.is_file():
            os.rename(folder / source.name, target)
        else:
            for file in checkpoint.other_files:
                shutil.copyfile(file, folder / file.name)
            os.rename(folder, target)
    changed = sum(new != old for old, new in plan.names.items())
    blocks = sum(new.endswith(f"{BRANCH}.weight") for new in plan.names.values()) + len(plan.zeros) // 2
    return Conversion(len(plan.names) + len(plan.zeros), changed, blocks, len(plan.zeros) // 2, plan.dropped)


def _room_for(target: Path) -> tempfile.TemporaryDirectory[str]:
    """A folder on the same disk to write in, until all is done."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        of_file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "a part of the path is a file, no folder" if of_file else f"in {target.parent}, {error.strerror}"
        raise OpenVSAError(
            f"{target} cannot be written: {why}; give a path in a folder that you can write to"
        ) from None


def has_branch(folder: str | os.PathLike[str]) -> bool:
    """Whether any safetensors file of a folder has branch weights. Only the names are read.

    Raises:
        OpenVSAError, MissingExtraError: as in `convert`.
    """
    return any(f".{BRANCH}." in name for file in sorted(Path(folder).glob("*.safetensors")) for name in _names(file))


def read_branch(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The branch weights of a checkpoint, under the names of the layout "diffusers"; none for a dense checkpoint.

    Args:
        source: as in `convert`. Only these tensors are read.

    Raises:
        OpenVSAError, MissingExtraError: as in `convert`.
    """
    checkpoint = _open(Path(source))
    wanted = {old: new for old, new in rename(checkpoint.places).items() if _OF_BRANCH.fullmatch(new)}
    found: dict[str, Tensor] = {}
    for file in sorted({checkpoint.places[name] for name in wanted}):
        with _reader(checkpoint.folder / file) as reader:
            found |= {new: reader.get_tensor(old) for old, new in wanted.items() if checkpoint.places[old] == file}
    return found


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint on disk: which file of the folder holds each tensor, the index if there is one, all other files."""

    folder: Path
    places: dict[str, str]
    index: Path | None = None
    other_files: tuple[Path, ...] = ()


def _open(source: Path) -> _Checkpoint:
    require("safetensors", extra="io")
    if source.is_file():
        if source.suffix != ".safetensors":
            raise OpenVSAError(f"{source} is no safetensors file; pickled weights are not read, because that runs code")
        return _Checkpoint(source.parent, dict.fromkeys(_names(source), source.name))
    if not source.is_dir():
        raise OpenVSAError(f"{source} does not exist; give a safetensors file or the folder of a transformer")
    if (source / "model_index.json").exists():
        raise OpenVSAError(f"{source} is a whole pipeline; convert its folder transformer (and transformer_2) alone")
    entries = sorted(source.iterdir())
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders:
        raise OpenVSAError(f"{source} has folders that would be lost: {', '.join(folders)}; move them away first")
    pickled = [entry.name for entry in entries if entry.suffix in _PICKLED]
    if pickled:
        raise OpenVSAError(f"{source} has pickled weights, which are not read: {', '.join(pickled)}")
    files = [entry for entry in entries if entry.suffix == ".safetensors"]
    indices = [entry for entry in entries if entry.name.endswith(".safetensors.index.json")]
    others = tuple(entry for entry in entries if entry not in files and entry not in indices)
    if len(indices) > 1 or not files or (len(files) > 1 and not indices):
        found = ", ".join(entry.name for entry in [*indices, *files]) or "none"
        raise OpenVSAError(f"{source} must hold one safetensors file, or several and one index of them; found {found}")
    places: dict[str, str] = {}
    for file in files:
        names = _names(file)
        if twice := sorted(places.keys() & set(names)):
            raise OpenVSAError(f"{file} repeats tensors of other files of {source}: {_few(twice)}")
        places |= dict.fromkeys(names, file.name)
    if indices:
        _check_index(indices[0], files, places)
    return _Checkpoint(source, places, indices[0] if indices else None, others)


def _check_index(index: Path, files: list[Path], places: dict[str, str]) -> None:
    """The index lists every tensor of the files, and where it is."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise OpenVSAError(f"{index} is no index of safetensors files: {error!r}") from error
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise OpenVSAError(
            f"{index} is no index of safetensors files: weight_map must be an object of the tensors' names and their "
            f"files' names, got {shorten(repr(listed), 200)}"
        )
    stray = sorted({file.name for file in files} - set(listed.values()))
    wrong = sorted(name for name in {*listed, *places} if listed.get(name) != places.get(name))
    if stray or wrong:
        raise OpenVSAError(
            f"{index} does not match its files: stray files: {_few(stray) or 'none'}; wrong or missing tensors: "
            f"{_few(wrong) or 'none'}; download the checkpoint again, or write it again"
        )


def _reader(file: Path) -> Any:
    return require("safetensors", extra="io").safe_open(file, framework="pt")


def _names(file: Path) -> list[str]:
    from safetensors import SafetensorError

    try:
        with _reader(file) as reader:
            return list(reader.keys())
    except SafetensorError as error:
        raise OpenVSAError(f"{file} is no safetensors file, or it is cut off: {error}") from error
    except OSError as error:  # such as a link of the hub's cache to a file that is gone
        raise OpenVSAError(f"{file} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Plan:
    """Names of the tensors that stay, and zeros to add: their names, each with the tensor whose shape it takes."""

    names: dict[str, str]
    zeros: dict[str, str]
    dropped: int

    @classmethod
    def of(cls, names: Mapping[str, str], to: Layout, branch: Branch) -> _Plan:
        of_branch = {old for old, new in names.items() if f".{BRANCH}." in new}
        if branch == "drop":
            return cls({old: new for old, new in names.items() if old not in of_branch}, {}, len(of_branch) // 2)
        if branch == "zero" and of_branch:
            raise OpenVSAError(
                'the checkpoint has branch weights already, so branch "zero" has nothing to add: use "keep"; or "drop" '
                "first, for zero ones in their place"
            )
        return cls(dict(names), _zeros(names, to) if branch == "zero" else {}, 0)


def _zeros(names: Mapping[str, str], to: Layout) -> dict[str, str]:
    """The names of the branch weights that a dense checkpoint lacks, each with the to_q whose shape it takes."""
    old_names = {new: old for old, new in names.items()}
    blocks = sorted({int(found[1]) for new in old_names if (found := re.match(_BLOCK, new))})
    middle = f"attn1.{BRANCH}" if to == "diffusers" else BRANCH
    like = {
        f"blocks.{block}.{middle}.{part}": f"blocks.{block}.attn1.to_q.{part}"
        for block in blocks
        for part in ("weight", "bias")
    }
    missing = [name for name in like.values() if name not in old_names]
    if missing or not blocks:
        raise OpenVSAError(
            "zero branch weights take the shape of to_q, and the checkpoint lacks "
            f"{_few(missing) or 'blocks.N.attn1.to_q.weight and .bias'}; if it has several files, give their folder"
        )
    return {name: old_names[to_q] for name, to_q in like.items()}


def _write(checkpoint: _Checkpoint, plan: _Plan, folder: Path, on_file: Callable[[str, int, int], None] | None) -> None:
    """The files of a checkpoint, one after another, and their index."""
    require("numpy", extra="io")  # safetensors writes through it
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    size = 0
    files = sorted(set(checkpoint.places.values()))
    for number, file in enumerate(files, 1):
        if on_file is not None:
            on_file(file, number, len(files))
        with _reader(checkpoint.folder / file) as reader:
            tensors = dict(_of_file(reader, plan))
            if tensors:
                save_file(tensors, folder / file, metadata=reader.metadata())
        weight_map |= dict.fromkeys(tensors, file)
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if checkpoint.index is not None:
        index = json.loads(checkpoint.index.read_text(encoding="utf-8"))
        index["weight_map"] = dict(sorted(weight_map.items()))
        if isinstance(about := index.get("metadata"), dict) and "total_size" in about:
            about["total_size"] = size
        (folder / checkpoint.index.name).write_text(json.dumps(index, indent=2) + "\n")


def _of_file(reader: Any, plan: _Plan) -> Iterator[tuple[str, Tensor]]:
    names = set(reader.keys())
    for old in names & plan.names.keys():
        yield plan.names[old], reader.get_tensor(old)
    for new, like in plan.zeros.items():
        if like in names:
            yield new, torch.zeros_like(reader.get_tensor(like))
