"""The errors that OpenVSA raises.

All of them are `OpenVSAError`, and each is also the built-in kind a caller would expect, so that both
`except openvsa.OpenVSAError` and `except ValueError` work.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

__all__ = ["BudgetError", "MissingExtraError", "OpenVSAError", "PlanError", "ShapeError", "UnsupportedError", "require"]


class OpenVSAError(Exception):
    """Base of every error this package raises on purpose."""


class ShapeError(OpenVSAError, ValueError):
    """A tensor does not have the shape, dtype or device that the call needs."""


class PlanError(OpenVSAError, ValueError):
    """A block plan is malformed, or does not belong to the tensors it is used with."""


class BudgetError(OpenVSAError, ValueError):
    """A budget asks for something that cannot be kept, such as a density of 0 or 2."""


class MissingExtraError(OpenVSAError, ImportError):
    """An optional package is needed and is not installed."""


class UnsupportedError(OpenVSAError, NotImplementedError):
    """No backend, or not the one asked for, can run a problem.

    `reasons` maps the name of each backend that was considered to every reason why it cannot run here.
    """

    def __init__(self, message: str, reasons: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        self.reasons = {name: tuple(why) for name, why in reasons.items()}
        lines = [f"  {name}: {'; '.join(why)}" for name, why in self.reasons.items()]
        super().__init__("\n".join([message, *lines]))
        self._given = message, self.reasons

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._given  # processes hand each other errors


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or say how to install it.

    Raises:
        MissingExtraError: `module` cannot be imported; the message names the extra to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"this needs the package {module!r}, which cannot be imported ({error}); "
            f"install it with: pip install 'openvsa[{extra}]'"
        ) from error
