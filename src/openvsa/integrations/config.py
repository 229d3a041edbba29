"""The settings of `sparsify`, as one value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import openvsa.select as selectors
from openvsa.config import Budget, is_number
from openvsa.errors import BudgetError, OpenVSAError, require
from openvsa.integrations.presets import PRESETS
from openvsa.ops.registry import backends
from openvsa.select import BudgetTable, PooledTopK, Selector

__all__ = ["SparsityConfig"]

Share = float | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class SparsityConfig:
    """How a model is made sparse. Immutable; `dataclasses.replace` makes a changed one.

    Layers are numbered over all self-attention layers in order of execution, and named, as in the report. Steps are
    denoising steps, from 0.

    Args:
        density: the share of key tiles that each query tile keeps, in (0, 1]; short for Budget(keep_ratio=density).
        budget: any other budget. Exactly one of density and budget is given.
        selector: how tiles are chosen.
        tile: tokens of a tile along each axis of the lattice; None takes `TileLayout.fit` for each lattice.
        q_tiles: tiles of a query block along each axis, as in TileLayout; () means one. More of them choose together,
            which is faster and less exact. Not with branch weights.
        steps: denoising step -> density in that step, in place of the budget.
        layers: name of a layer -> its density, or one for each of its heads, in place of the budget and of `steps`. A
            density of 1 leaves the layer dense.
        dense_first_steps, dense_last_steps: so many steps at the beginning and end of a generation stay dense.
        dense_layers: numbers or names of layers that stay dense; -1 is the last layer.
        min_tokens: a sequence of fewer tokens stays dense. None leaves dense what sparse attention is not expected to
            make faster (see `openvsa.integrations.break_even`), but for density 1, models with branch weights, and
            training; 0 makes everything sparse.
        reuse_steps: a plan serves so many steps; 1 makes a plan in every step.
        backend: as in `openvsa.block_sparse_attention`.
        strict: raise where attention cannot be sparse. False warns once for each layer and leaves that call dense.

    Raises:
        BudgetError: a density is no number or out of range, or not exactly one of density and budget is given.
        OpenVSAError: another setting is out of range or of another type.
    """

    density: float | None = None
    budget: Budget | None = None
    selector: Selector = field(default_factory=PooledTopK)
    tile: tuple[int, ...] | None = None
    q_tiles: tuple[int, ...] = ()
    steps: Mapping[int, float] = field(default_factory=dict)
    layers: Mapping[str, Share] = field(default_factory=dict)
    dense_first_steps: int = 0
    dense_last_steps: int = 0
    dense_layers: tuple[int | str, ...] = ()
    min_tokens: int | None = None
    reuse_steps: int = 1
    backend: str = "auto"
    strict: bool = True

    def __post_init__(self) -> None:
        if (self.density is None) == (self.budget is None):
            raise BudgetError(f"give either density or budget, got density={self.density} and budget={self.budget}")
        if not isinstance(self.budget, Budget | None):
            raise BudgetError(
                f"budget must be a Budget such as Budget(top_k=32), got {self.budget!r}; for a table of densities give "
                "it, or its file, to sparsify"
            )
        for name, least in (("dense_first_steps", 0), ("dense_last_steps", 0), ("min_tokens", 0), ("reuse_steps", 1)):
            value = getattr(self, name)
            if value is None and name == "min_tokens":
                continue
            if not _is_whole(value, least):
                raise OpenVSAError(f"{name} must be a whole number >= {least}, got {value!r}")
        self._check_types()
        # Floats of Python's own, which files can hold.
        layers = {
            name: tuple(map(float, of)) if isinstance(of, list | tuple) else float(of)
            for name, of in self.layers.items()
        }
        object.__setattr__(self, "layers", MappingProxyType(layers))
        object.__setattr__(self, "steps", MappingProxyType({step: float(of) for step, of in self.steps.items()}))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        object.__setattr__(self, "tile", None if self.tile is None else tuple(self.tile))
        object.__setattr__(self, "q_tiles", tuple(self.q_tiles))
        # Budgets check their numbers, and are made once: compiled code then sees the same objects in every forward.
        base = Budget(keep_ratio=self.density) if self.budget is None else self.budget
        object.__setattr__(self, "_base", base)
        if self.density is not None:
            object.__setattr__(self, "density", base.keep_ratio)
        by_step = {step: self._of(share) for step, share in self.steps.items()}
        object.__setattr__(self, "_by_step", by_step)
        object.__setattr__(self, "_by_layer", {name: self._of(share) for name, share in layers.items()})

    def _check_types(self) -> None:
        """What a file, or a hurried caller, gets wrong, before it does harm in the middle of a generation."""
        wanted = {
            "tile": "whole numbers >= 1, one for each axis of the lattice, such as (4, 4, 4)",
            "q_tiles": "whole numbers >= 1, one for each axis of the lattice, such as (1, 1, 2), or ()",
            "steps": "a mapping from steps, whole numbers >= 0, to densities, such as {0: 0.5}",
            "layers": "a mapping from names of layers to a density, or to one for each head",
            "dense_layers": "numbers or names of layers, such as (0, 'blocks.1.attn1')",
            "selector": "a selector such as PooledTopK()",
            "backend": f"'auto' or one of {', '.join(backend.name for backend in backends())}",
            "strict": "True or False",
        }
        right = {
            "tile": self.tile is None or (_is_list(self.tile) and all(_is_whole(side, 1) for side in self.tile)),
            "q_tiles": _is_list(self.q_tiles) and all(_is_whole(side, 1) for side in self.q_tiles),
            "steps": isinstance(self.steps, Mapping)
            and all(_is_whole(step, 0) and is_number(of) for step, of in self.steps.items()),
            "layers": isinstance(self.layers, Mapping)
            and all(
                isinstance(name, str) and (len(of) > 0 and all(map(is_number, of)) if _is_list(of) else is_number(of))
                for name, of in self.layers.items()
            ),
            "dense_layers": _is_list(self.dense_layers)
            and all(isinstance(layer, str) or _is_whole(layer) for layer in self.dense_layers),
            "selector": callable(self.selector) and not isinstance(self.selector, type),
            "backend": self.backend in ["auto", *(backend.name for backend in backends())],
            "strict": isinstance(self.strict, bool),
        }
        for name, fine in right.items():
            if not fine:
                raise OpenVSAError(f"{name} must be {wanted[name]}; got {getattr(self, name)!r}")

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityConfig:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """For pickle, which cannot take the read-only mappings."""
        values = {entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self)}
        return _from_values, (values | {"steps": dict(self.steps), "layers": dict(self.layers)},)

    @classmethod
    def preset(cls, name: str, *, steps: int | None = None, **changes: Any) -> SparsityConfig:
        """Settings to start from for a family of models (see `openvsa.integrations.presets`).

        Args:
            name: "wan", "hunyuan_video", ... for a model that was trained with full attention; "vsa-1.3b" and
                "vsa-14b" for released weights that were trained with VSA.
            steps: denoising steps of a generation, of which the first stay dense; None: what the family's pipeline
                takes by default.
            changes: settings that replace those of the preset. A budget replaces its density, and the other way round.

        Raises:
            OpenVSAError: there is no such preset, or a setting is wrong.
        """
        if name not in PRESETS:
            raise OpenVSAError(f"there is no preset {name!r}; choose from {', '.join(PRESETS)}")
        settings = PRESETS[name].settings(steps)
        if changes.get("budget") is not None:
            settings.pop("density", None)
        if changes.get("density") is not None:
            settings.pop("budget", None)
        return cls(**{**settings, **changes})

    def _of(self, share: Share) -> Budget | tuple[Budget, ...] | None:
        base: Budget = self._base  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(share, tuple):
            if set(share) == {1.0}:
                return None
            return tuple(dataclasses.replace(base, top_k=None, top_p=None, keep_ratio=one) for one in share)
        if share == 1.0:
            return None
        return dataclasses.replace(base, top_k=None, top_p=None, keep_ratio=share)

    @property
    def base(self) -> Budget:
        """The budget where no table says otherwise."""
        return self._base  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def needs_steps(self) -> bool:
        """Whether anything depends on the denoising step."""
        # Counted, because Dynamo takes an empty mappingproxy for true.
        by_step = len(self.steps) > 0
        return by_step or self.dense_first_steps > 0 or self.dense_last_steps > 0 or self.reuse_steps > 1

    def at(self, name: str, step: int, num_steps: int | None, tokens: int) -> Budget | tuple[Budget, ...] | str:
        """The budget of a layer in a step, or one for each of its heads; or in words why it stays dense.

        `dense_layers` are left to the caller, who knows the numbers of the layers, and so is min_tokens=None.
        """
        if tokens < (self.min_tokens or 0):
            return f"min_tokens is {self.min_tokens}"
        if step < self.dense_first_steps:
            return f"dense_first_steps is {self.dense_first_steps}"
        if num_steps is not None and step >= num_steps - self.dense_last_steps:
            return f"dense_last_steps is {self.dense_last_steps}"
        if name in self.layers:
            return self._by_layer[name] or "its density in layers is 1"  # pyright: ignore[reportAttributeAccessIssue]
        if step in self.steps:
            return self._by_step[step] or f"the density of step {step} is 1"  # pyright: ignore[reportAttributeAccessIssue]
        return self.base

    def check_layers(self, names: list[str]) -> frozenset[int]:
        """The numbers of the layers that stay dense, after checking that every layer spoken of is there.

        Raises:
            OpenVSAError: there is no such layer.
        """
        wrong = [name for name in self.layers if name not in names]
        wrong += [
            str(layer)
            for layer in self.dense_layers
            if (layer not in names if isinstance(layer, str) else not -len(names) <= layer < len(names))
        ]
        if wrong:
            raise OpenVSAError(
                f"the model has no layers {', '.join(wrong)}; its {len(names)} layers are {names[0]} to {names[-1]}"
            )
        return frozenset(
            names.index(layer) if isinstance(layer, str) else layer % len(names) for layer in self.dense_layers
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without those that are as by default. The inverse of `from_dict`.

        Raises:
            OpenVSAError: the selector is none of `openvsa.select`.
        """
        found: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            default = entry.default_factory() if callable(entry.default_factory) else entry.default
            if entry.name != "selector" and isinstance(value, Mapping):
                value = {key: list(of) if isinstance(of, tuple) else of for key, of in value.items()}
            if value == default:
                continue
            if entry.name == "selector":
                value = _selector_to_dict(self.selector)
            elif isinstance(value, Budget):
                value = _changed(value)
            elif isinstance(value, tuple):
                value = list(value)
            found[entry.name] = value
        return found

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """The inverse of `to_dict`.

        Raises:
            OpenVSAError: it is no mapping, a name is unknown or missing, or a value is out of range or of another type.
        """
        values = _checked(cls, values, "settings")
        if values.get("budget") is not None:
            values["budget"] = Budget(**_checked(Budget, values["budget"], "settings of budget"))
        if "selector" in values:
            values["selector"] = _selector_from_dict(values["selector"])
        steps = values.get("steps")
        if isinstance(steps, Mapping):  # the keys of a JSON object are strings
            values["steps"] = {
                int(of) if isinstance(of, str) and of.isdecimal() else of: share for of, share in steps.items()
            }
        return cls(**values)

    def save(self, path: str | PathLike[str]) -> None:
        """Write `to_dict` as JSON, or as YAML if the name ends in .yaml or .yml (needs the package PyYAML).

        Raises:
            OpenVSAError: the file cannot be written, or as in `to_dict`.
        """
        if _is_yaml(path):
            text = require("yaml", extra="diffusers").safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OpenVSAError(f"cannot write the settings {str(path)!r}: {error}") from None

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SparsityConfig:
        """Read what `save` wrote, or the densities of a BudgetTable, such as `openvsa audit --budget` writes.

        Raises:
            OpenVSAError: the file cannot be read or holds neither, or as in `from_dict`; the message names the file.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise OpenVSAError(f"cannot read the settings {str(path)!r}: {error}") from None
        if _is_yaml(path):
            yaml = require("yaml", extra="diffusers")
            parse, broken = yaml.safe_load, yaml.YAMLError
        else:
            parse, broken = json.loads, ValueError
        try:
            values = parse(text)
        except broken as error:
            raise OpenVSAError(f"the settings {str(path)!r} cannot be parsed: {error}") from None
        try:
            if isinstance(values, dict) and "format" in values:
                return cls.of_table(BudgetTable.from_json(json.dumps(values)))
            return cls.from_dict(values)
        except OpenVSAError as error:
            raise type(error)(f"in the file {str(path)!r}: {error}") from None

    @classmethod
    def of_table(cls, table: BudgetTable, **changes: Any) -> SparsityConfig:
        """The densities and the tile of a table, and settings that it does not have, or in place of its own."""
        return cls(**{"density": table.density, "layers": table.layers, "tile": table.tile, **changes})


def _from_values(values: dict[str, Any]) -> SparsityConfig:
    return SparsityConfig(**values)


def _is_whole(value: Any, least: int | None = None) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)


def _is_list(value: Any) -> TypeGuard[list[Any] | tuple[Any, ...]]:
    return isinstance(value, list | tuple)


def _is_yaml(path: str | PathLike[str]) -> bool:
    return Path(path).suffix.lower() in (".yaml", ".yml")


def _changed(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults."""
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if getattr(value, f.name) != f.default}


def _selector_to_dict(selector: Selector) -> dict[str, Any]:
    name = type(selector).__name__
    if getattr(selectors, name, None) is not type(selector) or not dataclasses.is_dataclass(selector):
        raise OpenVSAError(f"the selector {selector!r} is none of openvsa.select and cannot be written")
    return {"name": name, **_changed(selector)}


def _selector_from_dict(values: Mapping[str, Any]) -> Selector:
    values = dict(values) if isinstance(values, Mapping) else {"name": values}
    name = values.pop("name", None)
    kinds = {one: getattr(selectors, one) for one in selectors.__all__}
    known = [one for one, kind in kinds.items() if dataclasses.is_dataclass(kind) and "__call__" in vars(kind)]
    if name not in known:
        raise OpenVSAError(
            f"the selector must have the name of one of openvsa.select ({', '.join(known)}), got {name!r}"
        )
    return kinds[name](**_checked(kinds[name], values, f"settings of selector {name}"))


def _checked(kind: Any, values: Any, what: str) -> dict[str, Any]:
    """A copy of the names and values that a dataclass is to be made of. `what` they are is for the message.

    Raises:
        OpenVSAError: `values` is no mapping, has a name that the dataclass does not, or lacks one.
    """
    fields = dataclasses.fields(kind)
    known = ", ".join(field.name for field in fields)
    if not isinstance(values, Mapping):
        raise OpenVSAError(f"{what} must be an object of names and values, got {values!r}; names are {known}")
    unknown = [str(name) for name in values if name not in [field.name for field in fields]]
    if unknown:
        raise OpenVSAError(f"unknown {what} {', '.join(unknown)}; known are {known}")
    needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING and f.name not in values]
    if needed:
        raise OpenVSAError(f"{what} must have {', '.join(needed)}, got {dict(values)!r}")
    return dict(values)
