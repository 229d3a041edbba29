"""What the command does before and around its work: arguments, missing packages, errors, Ctrl-C."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Callable

import pytest

import openvsa
from openvsa.cli import doctor, plain_errors
from openvsa.errors import ShapeError


def test_help_names_every_command(openvsa_command: Callable) -> None:
    outcome = openvsa_command("--help")
    assert outcome.status == 0
    assert all(name in outcome.out for name in ("generate", "train", "doctor"))


def test_version(openvsa_command: Callable) -> None:
    assert openvsa_command("--version") == (0, f"openvsa {openvsa.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["paint"], ["generate", "--colour", "red"], ["generate", "--steps", "0"]])
def test_wrong_arguments_are_a_usage_error(openvsa_command: Callable, arguments: list[str]) -> None:
    outcome = openvsa_command(*arguments)
    assert outcome.status == 2
    assert "Error" in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_package_is_named_with_the_extra_to_install(
    openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = openvsa_command("doctor")
    assert outcome.status == 2
    assert f"'{package}'" in outcome.err
    assert "pip install 'openvsa[cli]'" in outcome.err


def test_our_errors_are_one_message(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(console: object, question: object) -> None:
        raise ShapeError("the lattice is wrong")

    monkeypatch.setattr(doctor, "examine", fail)
    outcome = openvsa_command("doctor")
    assert outcome == (2, "", "error: the lattice is wrong\n")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError), plain_errors():
        print(1 / 0)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "out.mp4"),
        RuntimeError("I/O error: No space left on device (os error 28)"),  # as safetensors says it
    ],
)
def test_a_full_disk_is_one_message(
    openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(console: object, question: object) -> None:
        raise error

    monkeypatch.setattr(doctor, "examine", fail)
    outcome = openvsa_command("doctor")
    assert outcome == (2, "", f"error: nothing more can be written: {error}. Make room, or choose another disk.\n")


def test_ctrl_c_stops_with_130(openvsa_command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(console: object, question: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupt)
    assert openvsa_command("doctor") == (130, "", "stopped\n")


def test_the_installed_script_runs() -> None:
    script = "import sys; from openvsa.cli import main; sys.argv = ['openvsa', 'doctor']; main()"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "backends on cpu" in run.stdout
