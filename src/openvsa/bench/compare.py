"""Two result files side by side: what got slower, what got faster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from openvsa.errors import OpenVSAError

__all__ = ["Change", "changes", "newly_failed", "newly_left_out", "versions_changed"]

# What makes a case the same problem in two files, kernels' or models'.
_PROBLEM = (
    "grid", "tile", "q_tiles", "prefix", "batch", "heads", "kv_heads", "head_dim", "dtype", "transformer", "config",
)  # fmt: skip
# What makes two machines one; what only one file knows is not compared.
_MACHINE = ("device", "processor", "capability", "processors")
# Plans of one name are the same if they read as many pairs, and neighbours share as much; random numbers may differ
# from one version of torch to another.
_PLAN = {"pairs": 0.01, "shared_with_next": 0.03}


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
    for part in _MACHINE:
        old, new = (record["machine"].get(part) for record in (before, after))
        if None not in (old, new) and old != new:
            raise OpenVSAError(
                f"results of different machines cannot be compared: {old!r} and {new!r}; "
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


def newly_left_out(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[str]]:
    """By case and backend of this package, why something could not run after that was measured before."""
    earlier, found = _by_key(before), {}
    for case in after["cases"]:
        for left in case.get("left_out", ()):
            if "contender" not in left:  # of a whole model
                continue
            passes = ("forward", "backward", "both") if left["pass"] == "all" else ("backward", "both")
            keys = [
                (case["name"], op, left["contender"], plan, what)
                for op in ("attention", "vsa")
                for plan in left["plans"]
                for what in passes
            ]
            if any(key in earlier and earlier[key][1] for key in keys):
                found.setdefault(f"{case['name']} {left['contender']}", []).extend(left["reasons"])
    return found


def versions_changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Versions and drivers that differ, in words."""
    old, new = ({**r["versions"], "driver": r["machine"].get("driver")} for r in (before, after))
    return [f"{name} {old[name]} before, {new[name]} after" for name in old if name in new and old[name] != new[name]]


def _check_problems(before: dict[str, Any], after: dict[str, Any]) -> None:
    earlier = {case["name"]: case for case in before["cases"]}
    for case in after["cases"]:
        old = earlier.get(case["name"], {})
        other = [part for part in _PROBLEM if part in old and part in case and old[part] != case[part]]
        for name, plan in case.get("plans", {}).items():
            was = old.get("plans", {}).get(name, plan)
            for part, share in _PLAN.items():
                if part in plan and part in was and abs(plan[part] - was[part]) > share * max(abs(was[part]), 1):
                    raise OpenVSAError(
                        f"the plan {name!r} of {case['name']!r} is not one problem in both runs: "
                        f"{part} {was[part]:g} and {plan[part]:g}; measure it again"
                    )
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
