"""Layouts that are kept, however they are first asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from openvsa.errors import ShapeError
from openvsa.layout import TileLayout, shelf
from openvsa.layout.shelf import kept_layout

GRID, TILE = (3, 4, 5), (2, 2, 2)
CPU = torch.device("cpu")
OTHER = torch.device("meta")  # stands for a device to which index tensors have to be copied


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_NAMES", {})


def copies(layout: TileLayout) -> list[str]:
    """Which kind of tensor the copies on the other device are."""
    kept = [*layout._indices.items(), *layout.blocks._on_device.items()]
    return [type(tensor).__name__ for key, tensor in kept if OTHER in key]


def test_a_layout_is_kept_with_its_copies() -> None:
    layout = kept_layout(GRID, TILE, (), 0, 0, OTHER)
    assert layout == TileLayout(GRID, TILE)
    assert copies(layout) == ["Tensor"] * 6
    assert kept_layout(list(GRID), torch.tensor(TILE), (), 0, 0, OTHER) is layout
    assert kept_layout(GRID, TILE, (), 0, 0, CPU) is not layout
    fitting = kept_layout(GRID, None, (1, 1, 2), 3, 1, CPU)
    assert fitting == TileLayout.fit(GRID, prefix=3, suffix=1, q_tiles=(1, 1, 2))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_that_torch_compile_asks_for_first_is_kept_with_its_copies(dynamic: bool | None) -> None:
    """Else every call of the compiled code would make the copies again, and no CUDA graph could be captured."""
    torch.compiler.reset()

    @torch.compile(fullgraph=True, backend="eager", dynamic=dynamic)
    def reorder(x: Tensor, grid: tuple[int, ...]) -> Tensor:
        return kept_layout(grid, TILE, (), 0, 0, x.device).permute(x)

    for grid in (GRID, (2, 4, 5), GRID):
        tokens = torch.arange(grid[0] * 20)[None]
        assert torch.equal(reorder(tokens, grid), TileLayout(grid, TILE).permute(tokens))
        assert reorder(tokens.to(OTHER), grid).shape == tokens.shape
        assert copies(kept_layout(grid, TILE, (), 0, 0, OTHER)) == ["Tensor"] * 6
    assert len(shelf._NAMES) == 4


def test_one_of_fake_tensors_leaves_nothing_fake_behind() -> None:
    with FakeTensorMode(allow_non_fake_inputs=False):
        tokens = torch.zeros(1, 60, device=OTHER)
        assert kept_layout(GRID, TILE, (), 0, 0, OTHER).permute(tokens).shape == (1, 60)
    assert copies(kept_layout(GRID, TILE, (), 0, 0, OTHER)) == ["Tensor"] * 6


def test_only_so_many_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_SHELF", type(shelf._SHELF)())
    monkeypatch.setattr(shelf, "_MOST", 3)
    for frames in range(1, 6):
        assert kept_layout((frames, 2), (1, 2), (), 0, 0, CPU).num_blocks == frames
    assert [key[0][0] for key in shelf._NAMES] == [(3, 2), (4, 2), (5, 2)]
    assert sorted(vars(shelf._SHELF)) == sorted(shelf._NAMES.values())


def test_what_is_no_lattice_is_refused_and_not_kept() -> None:
    for wrong in (((), TILE, (), 0), (GRID, (2, 2), (), 0), (GRID, TILE, (0, 1, 1), 0), (GRID, TILE, (), 1.5)):
        with pytest.raises(ShapeError):
            kept_layout(*wrong, 0, CPU)  # pyright: ignore[reportArgumentType]
    assert not shelf._NAMES
