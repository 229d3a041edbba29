"""A table of densities, one for every head of every layer, and its file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from openvsa.config import is_number
from openvsa.errors import BudgetError

__all__ = ["BudgetTable"]

_FORMAT = "openvsa-budget"
_VERSION = 1
_KEYS = ("format", "version", "density", "tile", "layers")


@dataclass(frozen=True)
class BudgetTable:
    """How a total density is spent on the layers and heads of a model.

    Args:
        density: the one asked for, in (0, 1], which layers without an entry get. The mean of all entries is as much in
            whole tiles.
        layers: name of a layer, as in a report of the model -> one density in (0, 1] for each of its heads.
        tile: the tile it was measured with, along (T, H, W); None where any tile will do.

    Raises:
        BudgetError: there is no layer, a layer has no head, a density is outside (0, 1], or something is of another
            type.
    """

    density: float
    layers: Mapping[str, tuple[float, ...]]
    tile: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        density, layers, tile = self.density, self.layers, self.tile
        if tile is not None and not (_is_list(tile) and all(type(side) is int for side in tile)):
            raise BudgetError(f"the tile of a budget table must be whole numbers such as (4, 4, 4) or None, got {tile}")
        if not isinstance(layers, Mapping) or not all(
            isinstance(name, str) and _is_list(heads) and all(map(is_number, heads)) for name, heads in layers.items()
        ):
            raise BudgetError(
                f"layers of a budget table must have a list of numbers each, one for each head, got {layers}"
            )
        if not is_number(density):
            raise BudgetError(f"the density of a budget table must be a number, got {density!r}")
        if not layers:
            raise BudgetError("a budget table needs at least one layer, got none")
        for name, heads in {"density": (density,), **layers}.items():
            if not heads or not all(0 < share <= 1 for share in heads):
                raise BudgetError(f"densities of a budget table must be in (0, 1], got {list(heads)} for {name!r}")
        object.__setattr__(self, "density", float(density))
        object.__setattr__(self, "layers", MappingProxyType({n: tuple(map(float, of)) for n, of in layers.items()}))
        object.__setattr__(self, "tile", None if tile is None else tuple(tile))

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle and copies, which cannot take the read-only mapping."""
        return type(self), (self.density, dict(self.layers), self.tile)

    @property
    def mean(self) -> float:
        """The mean of all entries."""
        return math.fsum(share for heads in self.layers.values() for share in heads) / sum(
            map(len, self.layers.values())
        )

    def to_json(self) -> str:
        """A JSON object with `format`, `version`, `density`, `tile` and `layers`."""
        content = {
            "format": _FORMAT,
            "version": _VERSION,
            "density": self.density,
            "tile": None if self.tile is None else list(self.tile),
            "layers": {name: list(heads) for name, heads in self.layers.items()},
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> BudgetTable:
        """The inverse of `to_json`.

        Raises:
            BudgetError: the text is no budget table, or one of another version.
        """
        try:
            content: Any = json.loads(text)
        except ValueError as error:
            raise BudgetError(f"this is no budget table ({error}); `openvsa audit --budget FILE` writes one") from None
        if not isinstance(content, dict) or "format" not in content:
            raise BudgetError("this is no budget table: it has no format; `openvsa audit --budget FILE` writes one")
        found, version = content["format"], content.get("version")
        if found != _FORMAT or version != _VERSION:
            raise BudgetError(
                f"a budget table has format {_FORMAT!r} and version {_VERSION}, got {found!r} and {version!r}; "
                "write it again with `openvsa audit --budget`"
            )
        if set(content) != set(_KEYS):
            raise BudgetError(
                f"a budget table has {', '.join(_KEYS)} and nothing else, got {', '.join(content)}; other settings "
                "join it in SparsityConfig.of_table"
            )
        return cls(content["density"], content["layers"], content["tile"])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the table as JSON.

        Raises:
            BudgetError: the file cannot be written.
        """
        try:
            Path(path).write_text(self.to_json(), encoding="utf-8")
        except OSError as error:
            raise BudgetError(f"cannot write the budget table {str(path)!r}: {error}") from None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> BudgetTable:
        """Read a table that `save` or `openvsa audit --budget` wrote.

        Raises:
            BudgetError: the file cannot be read or is no budget table.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BudgetError(f"cannot read the budget table {str(path)!r}: {error}") from None
        return cls.from_json(text)


def _is_list(values: Any) -> bool:
    return isinstance(values, list | tuple)
