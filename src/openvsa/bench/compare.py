"""Two result files side by side: what got slower, what got faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openvsa.errors import OpenVSAError

__all__ = ["Change", "changes"]


@dataclass(frozen=True)
class Change:
    """The median of one timed call in both runs, in milliseconds; None where a run does not have it. `ours` says that
    it is this package's own, so that its slowing down counts."""

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
        OpenVSAError: the records are from different machines, or have no call in common.
    """
    names = [record["machine"]["device"] for record in (before, after)]
    if names[0] != names[1]:
        raise OpenVSAError(
            f"results of different machines cannot be compared: {names[0]!r} and {names[1]!r}; "
            "measure both commits on one machine"
        )
    first, second = _by_key(before), _by_key(after)
    if not first.keys() & second.keys():
        raise OpenVSAError(
            f"the two runs have no measurement in common: cases {_cases(before)} and {_cases(after)}; "
            "measure the same cases with the same contenders"
        )
    found = []
    for key in dict.fromkeys([*first, *second]):
        row = second.get(key) or first[key]
        old, new = (rows[key]["ms"] if key in rows else None for rows in (first, second))
        case, op, contender, plan, what = key
        found.append(Change(case, op, contender, plan, what, old, new, row["kind"] == "openvsa"))
    return sorted(found, key=lambda change: -(change.ratio or 0.0))


def _by_key(record: dict[str, Any]) -> dict[tuple[str, str, str, str, str], dict[str, Any]]:
    return {
        (case["name"], row["op"], row["contender"], row["plan"], row["pass"]): row
        for case in record["cases"]
        for row in case["rows"]
    }


def _cases(record: dict[str, Any]) -> str:
    return ", ".join(case["name"] for case in record["cases"]) or "none"
