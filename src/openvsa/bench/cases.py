"""What is measured: problems with names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import torch

from openvsa.bench.plans import PATTERNS
from openvsa.errors import OpenVSAError
from openvsa.layout import TileLayout

__all__ = ["CASES", "SUITES", "Case", "PlanSpec", "find_cases", "share_name"]


@dataclass(frozen=True)
class PlanSpec:
    """How key blocks are chosen (see `plans.PATTERNS`) and which share of them, in (0, 1]."""

    pattern: str
    density: float = 1 / 8

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise OpenVSAError(f"a pattern is one of {', '.join(PATTERNS)}, got {self.pattern!r}")
        if not 0 < self.density <= 1:
            raise OpenVSAError(f"density must be in (0, 1], got {self.density}")

    def __str__(self) -> str:
        return f"{self.pattern} {share_name(self.density)}"


def share_name(density: float) -> str:
    """A share of blocks in (0, 1] as results name it, such as 1/8 or 3/4."""
    return str(Fraction(density).limit_denominator(1024))


@dataclass(frozen=True)
class Case:
    """A problem to measure: `grid` tokens after `prefix` text tokens, in tiles whose border ones are ragged where the
    tile does not divide the grid; a query block is a box of `q_tiles` tiles (see TileLayout). `plans` are the plans
    that the op is measured with; the whole op (`video_sparse_attention`) is measured at the same densities. `note`
    says where the numbers come from."""

    name: str
    grid: tuple[int, ...]
    tile: tuple[int, ...]
    q_tiles: tuple[int, ...] = ()
    prefix: int = 0
    batch: int = 1
    heads: int = 12
    kv_heads: int | None = None
    head_dim: int = 128
    dtype: str = "bfloat16"
    plans: tuple[PlanSpec, ...] = (PlanSpec("random"), PlanSpec("model"))
    device_type: str = "cuda"
    note: str = ""

    @cached_property
    def layout(self) -> TileLayout:
        return TileLayout(self.grid, self.tile, self.prefix, q_tiles=self.q_tiles)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def key_heads(self) -> int:
        return self.kv_heads or self.heads

    @property
    def blocks(self) -> str:
        """Tokens of the largest query and key block."""
        return f"{self.layout.q_blocks.max_len}x{self.layout.blocks.max_len}"

    @property
    def dense_pairs(self) -> int:
        """Token pairs of dense attention, over batch and heads."""
        return self.batch * self.heads * self.layout.num_tokens**2

    def describe(self) -> dict[str, object]:
        """The numbers of the case, for a result file."""
        return {
            "grid": self.grid, "tile": self.layout.tile, "q_tiles": self.layout.q_tiles, "prefix": self.prefix,
            "tokens": self.layout.num_tokens, "blocks": self.blocks, "batch": self.batch, "heads": self.heads,
            "kv_heads": self.key_heads, "head_dim": self.head_dim, "dtype": self.dtype, "note": self.note,
        }  # fmt: skip

    def __str__(self) -> str:
        text = f"{self.prefix} text + " if self.prefix else ""
        return (
            f"{text}{'x'.join(map(str, self.grid))} = {self.layout.num_tokens} tokens, "
            f"tile {'x'.join(map(str, self.tile))}, blocks {self.blocks}, "
            f"B={self.batch} H={self.heads}/{self.key_heads} D={self.head_dim} {self.dtype}, "
            f"plans {', '.join(map(str, self.plans))}"
        )


_AT_EIGHTH = tuple(PlanSpec(pattern) for pattern in PATTERNS)
_DENSITIES = tuple(PlanSpec("random", density) for density in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4))
_CPU = {"dtype": "float32", "heads": 8, "head_dim": 64, "device_type": "cpu"}

# 32,768 tokens as a lattice of 32 x 32 x 32, in tiles that divide it: the shape that attention kernels are usually
# compared at, and that tiles can be made of.
_FLAGSHIP = Case("s32k", (32, 32, 32), (4, 4, 4), plans=_AT_EIGHTH, note="the flagship: 12 heads as in Wan 1.3B")


def _variant(suffix: str, **changes: object) -> Case:
    return replace(_FLAGSHIP, name=f"s32k-{suffix}", note="", **changes)  # pyright: ignore[reportArgumentType]


def _sweep(tokens: str, grid: tuple[int, ...], head_dim: int) -> Case:
    name = f"{tokens}-densities" + ("-d64" if head_dim == 64 else "")
    return replace(_FLAGSHIP, name=name, grid=grid, head_dim=head_dim, plans=_DENSITIES, note="")


_LENGTHS = {
    "s8k": (8, 32, 32), "s16k": (16, 32, 32), "s32k": (32, 32, 32), "s65k": (64, 32, 32), "s131k": (32, 64, 64),
}  # fmt: skip

_ALL = (
    _FLAGSHIP,
    _variant("128x64", q_tiles=(2, 1, 1)),
    _variant("128x128", tile=(8, 4, 4)),
    _variant("d64", head_dim=64),
    _variant("d64-128x64", head_dim=64, q_tiles=(2, 1, 1)),
    _variant("d64-128x128", head_dim=64, tile=(8, 4, 4)),
    *(_sweep(name, grid, head_dim) for head_dim in (128, 64) for name, grid in _LENGTHS.items()),
    Case("wan-480p", (21, 30, 52), (4, 4, 4), note="Wan 2.1 1.3B, 480p, 81 frames; the tile of VSA"),
    Case("wan-480p-fit", (21, 30, 52), TileLayout.fit((21, 30, 52)).tile, note="the same in the best tile"),
    Case("wan-720p", (21, 45, 80), (4, 4, 4), heads=40, note="Wan 2.1 14B, 720p, 81 frames"),
    Case("hunyuan-129f", (33, 45, 80), (4, 4, 4), heads=24, note="HunyuanVideo, 720p, 129 frames, video tokens alone"),
    Case("ltx", (21, 16, 22), (4, 4, 4), heads=32, head_dim=64, note="LTX-Video, 704x512, 161 frames"),
    Case("cogvideox", (13, 30, 45), (4, 4, 4), prefix=226, heads=48, head_dim=64, note="CogVideoX 5B, 480p, with text"),
    Case("text-128k", (131072,), (64,), heads=8, kv_heads=2, plans=(PlanSpec("random"), PlanSpec("model")),
         note="a text model with grouped heads, no causal mask"),
    Case("cpu-1k", (4, 16, 16), (4, 4, 4), **_CPU, note="short: what a call costs however little it computes"),
    Case("cpu-4k", (4, 32, 32), (4, 4, 4), **_CPU),
    Case("cpu-16k", (16, 32, 32), (4, 4, 4), **_CPU),
    Case("cpu-tiny", (3, 6, 7), (2, 4, 4), dtype="float32", heads=2, head_dim=16, device_type="cpu",
         note="seconds even on a small machine"),
)  # fmt: skip
CASES = {case.name: case for case in _ALL}

_EVERY_GPU_CASE = tuple(case.name for case in _ALL if case.device_type == "cuda")
_CPU_SIZES = ("cpu-1k", "cpu-4k", "cpu-16k")
SUITES = {
    "cuda": {
        "quick": ("s32k",),
        "flagship": ("s32k", "s32k-128x64", "s32k-128x128", "s32k-d64", "wan-480p"),
        "full": _EVERY_GPU_CASE,
    },
    "cpu": {"quick": ("cpu-tiny",), "flagship": _CPU_SIZES, "full": ("cpu-tiny", *_CPU_SIZES)},
}


def find_cases(names: tuple[str, ...], suite: str, device_type: str) -> list[Case]:
    """The cases of these names, or of a suite if there are none.

    Raises:
        OpenVSAError: there is no such case or suite, or a case is not for this type of device.
    """
    if not names:
        if suite not in SUITES[device_type]:
            raise OpenVSAError(f"there is no suite {suite!r}; choose one of {', '.join(SUITES[device_type])}")
        names = SUITES[device_type][suite]
    for name in names:
        if name not in CASES:
            raise OpenVSAError(f"there is no case {name!r}; choose from {', '.join(CASES)} (openvsa bench --list)")
        if CASES[name].device_type != device_type:
            raise OpenVSAError(
                f"the case {name!r} is measured on {CASES[name].device_type}, not on {device_type}; "
                "openvsa bench --list shows the cases of each"
            )
    return [CASES[name] for name in names]
