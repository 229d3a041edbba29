"""The command `openvsa`. What it needs beyond torch is the extra `cli`, looked for when the command is run."""

from __future__ import annotations

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from openvsa.errors import OpenVSAError, require

__all__ = ["main", "plain_errors"]


def main() -> None:
    """Run the command with the arguments of the process. Exit status: 0, 2 for an error, 130 for Ctrl-C."""
    with plain_errors():
        for package in ("typer", "rich"):
            require(package, extra="cli")
        from openvsa.cli.app import app

        app(prog_name="openvsa")


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error raised on purpose into one message and an exit status; a traceback would only hide it."""
    try:
        yield
    except OpenVSAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        if not _says_disk_full(error):
            raise
        print(f"error: nothing more can be written: {error}. Make room, or choose another disk.", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise SystemExit(130) from None


def _says_disk_full(error: Exception) -> bool:
    # Safetensors has errors of its own, with the number in the text alone.
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(f"(os error {number})" in str(error) for number in full)
