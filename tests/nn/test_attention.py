"""The module around the op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import DEVICE
from openvsa import Budget, BudgetError, ShapeError, TileLayout, video_sparse_attention
from openvsa.layout import shelf
from openvsa.nn import VideoSparseAttention

GRID = (3, 5, 6)


def module(**settings: Any) -> VideoSparseAttention:
    settings = {"tile": (2, 2, 4), "budget": Budget(keep_ratio=0.25), **settings}
    return VideoSparseAttention(32, 4, **settings).to(DEVICE)


def hidden(tokens: int = 90) -> Tensor:
    return torch.randn(2, tokens, 32, device=DEVICE)


def test_it_is_projections_around_the_op() -> None:
    attn, x = module(), hidden()
    nn.init.normal_(attn.to_branch_weight.weight)  # pyright: ignore
    heads = {"to_q": 4, "to_k": 4, "to_v": 4, "to_branch_weight": 4}
    q, k, v, weight = (getattr(attn, name)(x).unflatten(-1, (n, 8)) for name, n in heads.items())
    q, k = attn.norm_q(q), attn.norm_k(k)
    out = video_sparse_attention(q, k, v, TileLayout(GRID, (2, 2, 4)), Budget(keep_ratio=0.25), weight)
    torch.testing.assert_close(attn(x, GRID), attn.to_out(out.flatten(2)))


def test_a_fresh_branch_changes_nothing_and_can_learn() -> None:
    attn, x = module(), hidden()
    plain = module(branch=False)
    missing, unexpected = plain.load_state_dict(attn.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("to_branch_weight") for name in unexpected)
    assert torch.equal(attn(x, GRID), plain(x, GRID))
    attn(x, GRID).sum().backward()
    assert (attn.to_branch_weight.weight.grad != 0).any()  # pyright: ignore
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attn.parameters())


def test_density_can_be_changed_at_any_time() -> None:
    attn, x = module(), hidden()
    sparse = attn(x, GRID)
    attn.density = 1.0
    assert attn.density == 1.0
    assert attn.budget == Budget(keep_ratio=1.0)
    dense = attn(x, GRID)
    assert not torch.allclose(dense, sparse)
    assert torch.equal(dense, same_weights(attn, budget=Budget(keep_ratio=1.0))(x, GRID))
    attn.budget = Budget(top_k=1)
    assert attn.density is None
    assert torch.equal(attn(x, GRID), same_weights(attn, budget=Budget(top_k=1))(x, GRID))
    with pytest.raises(BudgetError, match="got 2"):
        attn.density = 2


def same_weights(attn: VideoSparseAttention, **settings: Any) -> VideoSparseAttention:
    other = module(**settings)
    other.load_state_dict(attn.state_dict())
    return other


@pytest.mark.parametrize("tile", [(1, 5, 3), [3, 2, 2], "fit"])
def test_tile_can_be_changed_at_any_time(tile: Any) -> None:
    attn, x = module(), hidden()
    before = attn(x, GRID)
    attn.tile = tile
    after = attn(x, GRID)
    assert not torch.allclose(after, before)
    assert torch.equal(after, same_weights(attn, tile=tile)(x, GRID))
    expected = TileLayout.fit(GRID) if tile == "fit" else TileLayout(GRID, tuple(tile))
    assert attn.layout(GRID) == expected


def test_at_density_one_the_tile_does_not_matter() -> None:
    attn, x = module(budget=Budget(keep_ratio=1.0)), hidden()
    for tile in ((1, 5, 3), (3, 5, 6), "fit"):
        other = same_weights(attn, tile=tile, budget=Budget(keep_ratio=1.0))
        torch.testing.assert_close(attn(x, GRID), other(x, GRID), rtol=1e-4, atol=1e-5)


def test_the_selector_and_the_backend_can_be_changed() -> None:
    attn, x = module(), hidden()
    default = attn(x, GRID)
    attn.backend = "reference"
    torch.testing.assert_close(attn(x, GRID), default, rtol=1e-4, atol=1e-5)
    calls = []

    def selector(q: Tensor, k: Tensor, layout: TileLayout, budget: Budget) -> Any:
        from openvsa.select import PooledTopK

        calls.append(budget)
        return PooledTopK()(q, k, layout, Budget(keep_ratio=1.0))

    attn.selector = selector
    attn.density = 0.5
    assert not torch.allclose(attn(x, GRID), default)
    assert calls == [Budget(keep_ratio=0.5)]


def test_rope_is_applied_to_normed_queries_and_keys_in_raster_order() -> None:
    attn, x = module(num_kv_heads=2), hidden()
    seen = []

    def rope(t: Tensor) -> Tensor:
        seen.append(t)
        return t.roll(1, dims=-1)

    out = attn(x, GRID, rope)
    assert torch.equal(seen[0], attn.norm_q(attn.to_q(x).unflatten(-1, (4, 8))))
    assert torch.equal(seen[1], attn.norm_k(attn.to_k(x).unflatten(-1, (2, 8))))
    assert len(seen) == 2
    # Rolling both q and k by one channel keeps every score.
    torch.testing.assert_close(out, attn(x, GRID), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(attn(x, GRID, lambda t: t * 2), out)


def test_rope_in_fp32_does_not_change_the_dtype() -> None:
    attn = module().to(torch.bfloat16)
    out = attn(hidden().bfloat16(), GRID, lambda t: t.float() * 1.5)
    assert out.dtype == torch.bfloat16


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_autocast() -> None:
    attn, x = module(), hidden()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = attn(x, GRID, lambda t: t.float())
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    torch.testing.assert_close(
        out.float(), same_weights(attn, budget=Budget(keep_ratio=0.25))(x, GRID), rtol=0.1, atol=0.1
    )


def test_grouped_key_heads() -> None:
    attn, x = module(num_kv_heads=2), hidden()
    assert attn.to_k.out_features == attn.to_v.out_features == 16
    repeated = module()
    state = attn.state_dict()
    for name in ("to_k", "to_v"):
        for kind in ("weight", "bias"):
            grouped = state[f"{name}.{kind}"].unflatten(0, (2, 8))
            state[f"{name}.{kind}"] = grouped.repeat_interleave(2, 0).flatten(0, 1)
    repeated.load_state_dict(state)
    torch.testing.assert_close(attn(x, GRID), repeated(x, GRID), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("grid", "tile"), [((9, 10), (4, 4)), ((90,), (16,))], ids=["2d", "1d"])
def test_images_and_text(grid: tuple[int, ...], tile: tuple[int, ...]) -> None:
    attn, x = module(tile=tile), hidden()
    assert attn(x, grid).shape == x.shape
    attn.density = 1.0
    torch.testing.assert_close(
        attn(x, grid), same_weights(attn, budget=Budget(keep_ratio=1.0))(x, GRID), rtol=1e-4, atol=1e-5
    )


def test_text_tokens_before_and_after() -> None:
    """A text token reads the whole sequence, so it sees a change anywhere in it."""
    attn, x = module(budget=Budget(top_k=1)), hidden(100)
    out = attn(x, GRID, prefix=7, suffix=3)
    for token in range(0, 100, 9):
        changed = x.clone()
        changed[:, token] += 1
        after = attn(changed, GRID, prefix=7, suffix=3)
        for text in (0, 6, 97, 99):
            assert not torch.equal(after[:, text], out[:, text])


@pytest.mark.parametrize("norm", [None, nn.LayerNorm])
def test_the_norm_can_be_chosen(norm: Any) -> None:
    attn = module(qk_norm=norm)
    assert isinstance(attn.norm_q, nn.Identity if norm is None else nn.LayerNorm)
    assert attn(hidden(), GRID).isfinite().all()


def test_no_bias() -> None:
    assert not [name for name, _ in module(bias=False, qk_norm=None).named_parameters() if "bias" in name]


def test_the_repr_says_what_it_does() -> None:
    attn = module(num_kv_heads=2)
    assert attn.extra_repr() == (
        "4 heads over 2 key heads of 8, tile=(2, 2, 4), keeps keep_ratio=0.25, with compressed branch, backend='auto'"
    )
    attn.budget, attn.tile, attn.backend = Budget(top_k=4, min_blocks=2, keep_self=True), "fit", "cpu"
    for part in ("tile=fit", "top_k=4", "min_blocks=2", "keep_self=True", "backend='cpu'"):
        assert part in repr(attn)
    assert "without compressed branch" in module(branch=False).extra_repr()


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "fresh"])
def test_compiles_in_one_graph(warm: bool) -> None:
    attn, x = module(tile=(2, 3, 2) if warm else (3, 2, 3)), hidden()
    eager = attn(x, GRID) if warm else None
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")(x, GRID)
    torch.testing.assert_close(compiled, attn(x, GRID) if eager is None else eager)
    compiled.sum().backward()
    assert all(p.grad is not None for p in attn.parameters())


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ShapeError, match="got dim=30, num_heads=4"):
        VideoSparseAttention(30, 4)
    for heads in (0, -2, 3):
        with pytest.raises(ShapeError, match=f"num_heads=4, num_kv_heads={heads}"):
            VideoSparseAttention(32, 4, num_kv_heads=heads)
    with pytest.raises(ShapeError, match="got dim=32, num_heads=0"):
        VideoSparseAttention(32, 0)
    with pytest.raises(ShapeError, match=r"x must be hidden states \[B, S, dim\] with dim 32, got shape \(90, 32\)"):
        module()(hidden()[0], GRID)
    with pytest.raises(ShapeError, match=r"with dim 32, got shape \(2, 90, 16\)"):
        module()(hidden()[..., :16], GRID)
    with pytest.raises(ShapeError, match="with dim 32, got list"):
        module()(hidden().tolist(), GRID)
    with pytest.raises(ShapeError, match=r"got dim=32\.0, num_heads=4"):
        VideoSparseAttention(32.0, 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(BudgetError, match=r"budget must be a Budget such as .*, got 0"):
        module(budget=0)
    for settings in ({"tile": 4}, {"q_tiles": 4}):
        with pytest.raises(ShapeError, match=r"must be a tuple of positive integers such as .*, got 4"):
            module(**settings)(hidden(), GRID)
    with pytest.raises(ShapeError, match=r"x has 90 tokens, but the layout of grid \(3, 5, 5\) has 75"):
        module()(hidden(), (3, 5, 5))
    with pytest.raises(ShapeError, match="tile must be a tuple of sides or 'fit', got 'best'"):
        module(tile="best")(hidden(), GRID)
    with pytest.raises(ShapeError, match="tile must be a tuple of sides or 'fit', got None"):
        module(tile=None)(hidden(), GRID)
    with pytest.raises(ShapeError, match="one number per axis"):
        module(tile=(4, 4))(hidden(), GRID)


def test_a_lattice_has_one_layout_however_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "_NAMES", {})
    attn = module()
    for grid in (GRID, list(GRID), torch.tensor(GRID), torch.tensor(GRID), torch.Size(GRID)):
        attn(hidden(), grid)
    assert len(shelf._NAMES) == 1


def test_projections_may_be_wrapped() -> None:
    """As adapters and quantisation do: what stands in their place may have no weight, or one on another device."""
    attn, x = module(), hidden()
    expected = attn(x, GRID)

    class Wrapped(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    for name in ("to_q", "to_k", "to_v", "to_out", "to_branch_weight"):
        setattr(attn, name, Wrapped(getattr(attn, name)))
    assert torch.equal(attn(x, GRID), expected)
