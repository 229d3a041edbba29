"""Two result files side by side: what got slower, what got faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openvsa.errors import OpenVSAError

__all__ = ["Change", "changes", "newly_failed"]

# What makes a case the same problem in two files, kernels' or models'.
_PROBLEM = (
    "grid", "tile", "q_tiles", "prefix", "batch", "heads", "kv_heads", "head_dim", "dtype", "transformer", "config",
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """The median of one timed call in both runs, in milliseconds; None where a run does not have it. `ours` says that
    it is this package's own, so that its slowing down counts. Of whole models, `op` is "step", `contender` how
    attention is computed, and `what` the mode."""

    case: str
    op: str
    contender: str
    plan: str
    what: str
    before: float | None
    after: float | None
    ours: bool

    @property
    def ratio(self) -> float | None:
        """Time after over time before: above 1 is slower."""
        return self.after / self.before if self.before and self.after else None

    def is_slower(self, threshold: float) -> bool:
        return self.ours and self.ratio is not None and self.ratio > 1 + threshold


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Every call of either record, slowest change first; calls that only one of them has come last.

    Raises:
        OpenVSAError: the records are of different machines or kinds, call different problems by one name, or have no
            call in common.
    """
    names = [record["machine"]["device"] for record in (before, after)]
    if names[0] != names[1]:
        raise OpenVSAError(
            f"results of different machines cannot be compared: {names[0]!r} and {names[1]!r}; "
            "measure both commits on one machine"
        )
    _check_problems(before, after)
    first, second = _by_key(before), _by_key(after)
    if not first.keys() & second.keys() and not newly_failed(before, after):
        raise OpenVSAError(
            f"the two runs have no measurement in common: cases {_cases(before)} and {_cases(after)}; "
            "measure the same cases with the same contenders"
        )
    found = []
    for key in dict.fromkeys([*first, *second]):
        old, new = (rows[key][0] if key in rows else None for rows in (first, second))
        found.append(Change(*key, old, new, (second.get(key) or first[key])[1]))
    return sorted(found, key=lambda change: -(change.ratio or 0.0))


def newly_failed(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """By case, why it failed the correctness gate after but not before."""
    passed = {case["name"] for case in before["cases"] if case["passed"]}
    return {
        case["name"]: [why if isinstance(why, str) else f"{why['contender']}: {why['why']}" for why in case["failed"]]
        for case in after["cases"]
        if not case["passed"] and case["name"] in passed
    }


def _check_problems(before: dict[str, Any], after: dict[str, Any]) -> None:
    earlier = {case["name"]: case for case in before["cases"]}
    for case in after["cases"]:
        old = earlier.get(case["name"], {})
        other = [part for part in _PROBLEM if part in old and part in case and old[part] != case[part]]
        if other:
            parts = ", ".join(f"{part} {old[part]} and {case[part]}" for part in other)
            raise OpenVSAError(f"the case {case['name']!r} is not one problem in both runs: {parts}; measure it again")


def _by_key(record: dict[str, Any]) -> dict[tuple[str, str, str, str, str], tuple[float, bool]]:
    """Milliseconds of each call, and whether it is ours."""
    found = {}
    for case in record["cases"]:
        for row in case["rows"]:
            if "mode" in row:  # of a whole model
                call, ours = ("step", row["variant"], "-", row["mode"]), row["density"] is not None
            else:
                call, ours = (row["op"], row["contender"], row["plan"], row["pass"]), row["kind"] == "openvsa"
            found[(case["name"], *call)] = row["ms"], ours
    return found


def _cases(record: dict[str, Any]) -> str:
    return ", ".join(case["name"] for case in record["cases"]) or "none"
