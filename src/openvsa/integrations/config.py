"""The settings of `sparsify`, as one value."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

import openvsa.select as selectors
from openvsa.config import Budget
from openvsa.errors import BudgetError, OpenVSAError, require
from openvsa.integrations.presets import PRESETS
from openvsa.select import PooledTopK, Selector

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
        BudgetError: a density is out of range, or not exactly one of density and budget is given.
        OpenVSAError: another number is out of range.
    """

    density: float | None = None
    budget: Budget | None = None
    selector: Selector = field(default_factory=PooledTopK)
    tile: tuple[int, ...] | None = None
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
        for name, least in (("dense_first_steps", 0), ("dense_last_steps", 0), ("min_tokens", 0), ("reuse_steps", 1)):
            value = getattr(self, name)
            if value is None and name == "min_tokens":
                continue
            if not isinstance(value, int) or value < least:
                raise OpenVSAError(f"{name} must be a whole number >= {least}, got {value!r}")
        if not all(isinstance(step, int) and step >= 0 for step in self.steps):
            raise OpenVSAError(f"steps must be numbered by whole numbers >= 0, got {list(self.steps)}")
        layers = {name: tuple(of) if isinstance(of, list | tuple) else of for name, of in self.layers.items()}
        object.__setattr__(self, "layers", MappingProxyType(layers))
        object.__setattr__(self, "steps", MappingProxyType(dict(self.steps)))
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        object.__setattr__(self, "tile", None if self.tile is None else tuple(self.tile))
        # Budgets check their numbers, and are made once: compiled code then sees the same objects in every forward.
        base = Budget(keep_ratio=self.density) if self.budget is None else self.budget
        object.__setattr__(self, "_base", base)
        by_step = {step: self._of(share) for step, share in self.steps.items()}
        object.__setattr__(self, "_by_step", by_step)
        object.__setattr__(self, "_by_layer", {name: self._of(share) for name, share in layers.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> SparsityConfig:
        return self

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
        return bool(self.steps or self.dense_first_steps or self.dense_last_steps or self.reuse_steps > 1)

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
            OpenVSAError: a name is unknown, or a value is out of range.
        """
        values = dict(values)
        known = [entry.name for entry in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in known]
        if unknown:
            raise OpenVSAError(f"unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
        try:
            if values.get("budget") is not None:
                values["budget"] = Budget(**values["budget"])
            if "selector" in values:
                values["selector"] = _selector_from_dict(values["selector"])
            for name in ("tile", "dense_layers"):
                if values.get(name) is not None:
                    values[name] = tuple(values[name])
            # The keys of a JSON object are strings.
            values["steps"] = {int(step): share for step, share in values.get("steps", {}).items()}
            return cls(**values)
        except (TypeError, AttributeError) as error:
            raise OpenVSAError(f"these are no settings of sparsify: {error}") from None

    def save(self, path: str | PathLike[str]) -> None:
        """Write `to_dict` as JSON, or as YAML if the name ends in .yaml or .yml (needs the package PyYAML)."""
        if _is_yaml(path):
            text = require("yaml", extra="diffusers").safe_dump(self.to_dict(), sort_keys=False)
        else:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> SparsityConfig:
        """Read what `save` wrote.

        Raises:
            OpenVSAError: the file cannot be read or holds no settings.
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
        if not isinstance(values, dict):
            raise OpenVSAError(f"the settings {str(path)!r} must be an object of names and values, got {values!r}")
        return cls.from_dict(values)


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
    values = dict(values)
    name = values.pop("name", None)
    known = [one for one in selectors.__all__ if dataclasses.is_dataclass(getattr(selectors, one))]
    if name not in known:
        raise OpenVSAError(
            f"the selector must have the name of one of openvsa.select ({', '.join(known)}), got {name!r}"
        )
    return getattr(selectors, name)(**values)
