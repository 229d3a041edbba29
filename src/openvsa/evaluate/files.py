"""Writing files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openvsa.errors import OpenVSAError

__all__ = ["atomic_path", "check_output_folder"]


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`; on a clean exit it becomes `path`, on any exception it is removed.

    Ctrl-C counts as an exception, so a reader sees the old file, the new file or no file, and never half of one.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_output_folder(path: str | Path) -> Path:
    """Makes the folder if it is absent and proves that a file can be written there; meant to run before any work.

    Raises:
        OpenVSAError: it cannot be made or written.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OpenVSAError(
            f"cannot write to the output folder {str(folder)!r}: {error.strerror or error}. "
            "Choose a folder that you may write to."
        ) from None
    return folder
