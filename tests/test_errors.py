"""The errors are what a caller expects to catch, and say what to do."""

from __future__ import annotations

import math
import pickle

import pytest

from openvsa.errors import (
    BudgetError,
    MissingExtraError,
    OpenVSAError,
    PlanError,
    ShapeError,
    UnsupportedError,
    require,
)


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (ShapeError, ValueError),
        (PlanError, ValueError),
        (BudgetError, ValueError),
        (MissingExtraError, ImportError),
        (UnsupportedError, NotImplementedError),
    ],
)
def test_each_error_is_ours_and_a_builtin(error: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(error, OpenVSAError)
    assert issubclass(error, builtin)


def test_unsupported_lists_every_reason() -> None:
    error = UnsupportedError("no backend can", {"a": ["too big", "too old"], "b": ["absent"]})
    assert error.reasons == {"a": ("too big", "too old"), "b": ("absent",)}
    assert str(error) == "no backend can\n  a: too big; too old\n  b: absent"
    sent = pickle.loads(pickle.dumps(error))  # from a process of a pool
    assert (str(sent), sent.reasons) == (str(error), error.reasons)


def test_a_missing_extra_says_how_to_install_it() -> None:
    assert require("math", extra="video") is math
    with pytest.raises(MissingExtraError, match=r"no_such_package.*pip install 'openvsa\[video\]'"):
        require("no_such_package", extra="video")
