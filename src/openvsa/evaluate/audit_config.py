"""What the settings of a sparse model mean to an audit: which steps there are to look at, what holds in one of them,
what the same selection is at another density, and whether a budget table can hold them."""

from __future__ import annotations

import sys
from collections.abc import Collection
from dataclasses import fields, replace

from openvsa.errors import OpenVSAError
from openvsa.integrations.config import SparsityConfig
from openvsa.select import ReleasedVSA

__all__ = ["at_step", "check_table", "dense_steps", "uniform", "which_steps"]


def dense_steps(config: SparsityConfig, steps: int) -> dict[int, str]:
    """Denoising step -> why, in words, of those of a generation of so many `steps` in which every layer stays dense."""
    found: dict[int, str] = {}
    for step in range(steps):
        # The first stands for all layers that no table names; no sequence is too short.
        of_layers = [config.at(name, step, steps, sys.maxsize) for name in ("", *config.layers)]
        if all(isinstance(one, str) for one in of_layers):
            found[step] = str(of_layers[0])
    return found


def which_steps(config: SparsityConfig, steps: int, audited: Collection[int] | None = None) -> tuple[int, ...]:
    """The steps to look at, ascending: those given, or three, spread over the ones that are sparse.

    Raises:
        OpenVSAError: a step does not exist, or stays dense, or all of them do.
    """
    dense = dense_steps(config, steps)
    sparse = [step for step in range(steps) if step not in dense]
    if not sparse:
        raise OpenVSAError(
            f"all {steps} steps stay dense ({dense[0]}), so that there is nothing to audit; give more steps, or "
            "settings that leave fewer of them dense"
        )
    if audited is None:
        return tuple(sorted({sparse[len(sparse) * part // 6] for part in (1, 3, 5)}))
    if not audited or not all(0 <= step < steps for step in audited):
        raise OpenVSAError(f"audited steps must be in 0..{steps - 1} and at least one, got {sorted(audited)}")
    for step in sorted(audited):
        if step in dense:
            raise OpenVSAError(
                f"step {step} stays dense ({dense[step]}), so that nothing is lost in it; look at sparse ones, which "
                f"are {', '.join(map(str, sparse))}"
            )
    return tuple(sorted(set(audited)))


def at_step(config: SparsityConfig, step: int) -> SparsityConfig:
    """What holds in a step that is not dense, for a forward that is run alone, which is step 0 to its handle. Plans are
    made in it, also where a generation would use those of an earlier step again."""
    here = {0: config.steps[step]} if step in config.steps else {}
    return replace(config, steps=here, dense_first_steps=0, dense_last_steps=0, reuse_steps=1)


def uniform(config: SparsityConfig, density: float) -> SparsityConfig:
    """The same selection, at one density in all layers and steps and for all lengths. Blocks that must always be kept
    are kept also where they are more than the density has room for."""
    base, selector = config.base, config.selector
    if isinstance(selector, ReleasedVSA):
        selector = ReleasedVSA(1 - density)
        budget = selector.budget
    else:
        least = max(base.min_blocks, base.keep_first + base.keep_self)
        budget = replace(base, top_k=None, top_p=None, keep_ratio=density, min_blocks=least, max_blocks=None)
    return replace(
        config, density=None, budget=budget, selector=selector, steps={}, layers={}, dense_first_steps=0,
        dense_last_steps=0, dense_layers=(), min_tokens=0, reuse_steps=1,
    )  # fmt: skip


def check_table(config: SparsityConfig) -> None:
    """Refuse settings that a budget table would lose.

    Raises:
        OpenVSAError: there is another setting than a density, a tile and min_tokens.
    """
    plain = SparsityConfig(density=config.base.keep_ratio or 1.0, tile=config.tile, min_tokens=config.min_tokens)
    names = [entry.name for entry in fields(config) if entry.name not in ("density", "budget")]
    other = [name for name in names if getattr(config, name) != getattr(plain, name)]
    if config.base != plain.base:
        other.insert(0, "budget")
    if other:
        raise OpenVSAError(
            f"a budget table holds the densities of layers and heads and a tile, and would lose {', '.join(other)} of "
            "these settings; make the table at a density alone, and join it with them by SparsityConfig.of_table"
        )
