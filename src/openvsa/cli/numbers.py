"""Options that take a number. Their errors show what was typed, which those of newer versions of typer do not."""

from __future__ import annotations

from typing import Any

import typer

__all__ = ["real", "whole"]


def whole(help: str, least: int | None = None) -> Any:
    """An option for a whole number, of at least `least`."""
    return _option(int, "whole number", help, least)


def real(help: str, least: float | None = None) -> Any:
    """An option for any number, of at least `least`."""
    return _option(float, "number", help, least)


def _option(kind: type[int] | type[float], said: str, help: str, least: float | None) -> Any:
    bound = "" if least is None else f" >= {least}"

    def parse(text: Any) -> int | float:  # older versions of typer hand over the default too
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or (least is not None and not value >= least):  # nan is not
            raise typer.BadParameter(f"it must be a {said}{bound}, got {text!r}")
        return value

    return typer.Option(parser=parse, metavar=f"<{kind.__name__}{bound}>", help=help)
