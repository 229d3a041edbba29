"""What the pages say of whole models is what the newest files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import doc_models
import doc_performance
from openvsa.bench.record import MODEL_SCHEMA, SCHEMA
from openvsa.integrations.presets import PRESETS, Preset


def row(mode: str, density: float | None, ms: float, dense: float, **more: Any) -> dict[str, Any]:
    name = "dense-cudnn" if density is None else f"density {density:g}"
    return {"mode": mode, "variant": name, "density": density, "ms": ms, "faster": dense / ms, **more}


def record(
    date: str, name: str, sparse_ms: float, head_dim: int = 128, whole: str = "", config: str | None = None
) -> dict[str, Any]:
    rows = [
        row("attention", None, 10.0, 10.0), row("attention", 0.25, 4.0, 10.0), row("kernel", 0.25, 3.5, 10.0),
        row("host", None, 20.0, 20.0), row("host", 0.25, 30.0, 20.0),
        row("eager", None, 500.0, 500.0, peak_bytes=2**30), row("eager", 0.25, sparse_ms, 500.0, peak_bytes=2**31),
    ]  # fmt: skip
    case = {
        "name": name, "note": "a model", "whole": whole, "grid": [2, 3, 4], "layers": 30, "dtype": "bfloat16",
        "target": 1.6, "passed": True, "rows": rows, "gate": {"dense-flash": 5e-3, "density 1": 4e-3},
        "attention": {"tile": [2, 3, 4], "tokens": 24, "heads": 2, "head_dim": head_dim},
        "profile": [{"mode": "eager", "variant": "density 0.25", "groups": {"attention": 100.0, "linear": 50.0}}],
    }  # fmt: skip
    versions = {"torch": "2", "triton": "3", "cudnn": "9", "diffusers": "0.42"}
    return {"schema": MODEL_SCHEMA, "date": date, "command": "openvsa bench --model x", "commit": "abc",
            "versions": versions, "machine": {"device": "GPU"}, "settings": {"config": config},
            "cases": [case]}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doc_models, "RESULTS", tmp_path)
    monkeypatch.setattr(doc_performance, "RESULTS", tmp_path)
    for file, made in {
        "models-old.json": record("2026-01-01", "wan-1.3b-480p", 400.0),
        "models-new.json": record("2026-02-01", "wan-1.3b-480p", 250.0),
        "models-part.json": record("2026-01-15", "wan-14b-720p", 200.0, whole="40"),
        "models-vsa.json": record("2026-03-01", "wan-1.3b-480p", 200.0, config="vsa-1.3b"),
    }.items():
        (tmp_path / file).write_text(json.dumps(made))


@pytest.mark.usefixtures("results")
def test_the_newest_file_counts() -> None:
    page = doc_models.performance()
    eager = "| `wan-1.3b-480p` | step, eager | 500 (cudnn) | 250 (2.00×) | 1.6× at 0.1 | 1.0 to 2.0 | 20, 30 |"
    assert eager in page
    assert "| `wan-1.3b-480p` | 30 × attention | 300 (cudnn) | 120 (2.50×) |  |  |  |" in page
    assert "| `wan-1.3b-480p` | 5.0e-03 (flash) | 4.0e-03 |" in page
    assert "| `wan-1.3b-480p` | eager | density 0.25 | 100 | 50 |" in page
    assert "models-part.json" not in page
    assert "models-old.json" not in page


@pytest.mark.usefixtures("results")
def test_a_family_has_its_own_models() -> None:
    text = doc_models.family("wan")
    assert "on an GPU" not in text
    assert "wan-14b-720p" not in text
    assert doc_models.family("ltx").startswith("Not measured yet")


@pytest.mark.usefixtures("results")
def test_a_generation_counts_its_dense_steps_and_layers() -> None:
    [whole] = doc_models.newest_models()
    # 10 steps of 500 ms, 40 of 250 ms and 6 ms more for the layer that stays dense.
    assert doc_models.generation(Preset(), whole, "eager") == pytest.approx(50 * 500 / (10 * 500 + 40 * 256))
    assert doc_models.generation(Preset(), whole, "compiled") is None
    assert doc_models.generation(Preset(density=0.5), whole, "eager") is None
    assert "1.64× (`wan-1.3b-480p`, eager, GPU)" in doc_models.presets()


@pytest.mark.usefixtures("results")
def test_runs_with_settings_of_their_own_are_of_their_preset() -> None:
    assert [one.file.name for one in doc_models.newest_models("vsa-1.3b")] == ["models-vsa.json"]
    table = doc_models.presets().splitlines()
    [ours] = [line for line in table if line.startswith("| `vsa-1.3b`")]
    assert "2.50× (`wan-1.3b-480p`, eager, GPU)" in ours
    [other] = [line for line in table if line.startswith("| `vsa-14b`")]
    assert "not measured" in other


@pytest.mark.usefixtures("results")
def test_a_newer_file_counts_for_the_modes_that_it_has(tmp_path: Path) -> None:
    newer = record("2026-03-01", "wan-1.3b-480p", 100.0)
    [case] = newer["cases"]
    case["profile"][0] |= {"mode": "compiled", "groups": {"attention": 80.0, "linear": 40.0}}
    case["rows"] = [
        *(row("attention", d, ms, 9.0) for d, ms in ((None, 9.0), (0.25, 3.0))),
        *(row("compiled", d, ms, 400.0, peak_bytes=2**30) for d, ms in ((None, 400.0), (0.25, 200.0))),
    ]
    (tmp_path / "models-compiled.json").write_text(json.dumps(newer))
    page = doc_models.performance()
    assert "| `wan-1.3b-480p` | step, eager | 500 (cudnn) | 250 (2.00×) |" in page
    assert "| `wan-1.3b-480p` | step, compiled | 400 (cudnn) | 200 (2.00×) |" in page
    assert "| `wan-1.3b-480p` | 30 × attention | 270 (cudnn) | 90 (3.00×) |" in page
    assert "| `wan-1.3b-480p` | eager | density 0.25 | 100 | 50 |" in page
    assert "| `wan-1.3b-480p` | compiled | density 0.25 | 80 | 40 |" in page
    assert "models-compiled.json" in page
    assert "models-new.json" in page


@pytest.mark.usefixtures("results")
def test_steps_against_another_dense_kernel_are_estimated(tmp_path: Path) -> None:
    assert "Estimated" not in doc_models.performance()
    rows = [
        {"op": "attention", "contender": name, "kind": "dense", "plan": "-", "pass": "forward", "ms": ms}
        for name, ms in (("dense-cudnn", 10.0), ("dense-fa4", 9.0))
    ]
    case = {"name": "s32k-d64", "head_dim": 64, "passed": True, "rows": rows}
    kernels = {
        "schema": SCHEMA, "date": "2026-01-01", "commit": "abc", "versions": {}, "machine": {"device": "GPU"},
        "cases": [case],
    }  # fmt: skip
    (tmp_path / "bench-gpu.json").write_text(json.dumps(kernels))
    newest = record("2026-04-01", "ltx", 1.0, head_dim=64)
    newest["cases"][0]["rows"] = [
        row("attention", None, 10.0, 10.0), row("eager", None, 500.0, 500.0), row("eager", 0.1, 235.0, 500.0)
    ]  # fmt: skip
    (tmp_path / "models-newest.json").write_text(json.dumps(newest))
    # A tenth of 30 layers of 10 ms is saved.
    assert "| `ltx` | eager | 0.90 | 470 | 2.00× |" in doc_models.performance()


def clip(preset: str, psnr: float, seconds: float) -> str:
    settings = {
        "scene": "a scene", "seed": 0, "steps": 16, "density": 0.25, "fps": 12.0, "device": "CPU", "threads": 2,
        "command": f"openvsa generate --config {preset} --seed 0", "versions": {}, "credit": "", "model": None,
    }  # fmt: skip
    layer = {"layer": 0, "name": "a", "density": 0.25, "dense_seconds": 1.0, "sparse_seconds": 1.0}
    passes = {name: {"total_seconds": t, "attention_seconds": 1.0} for name, t in (("dense", 6.0), ("sparse", seconds))}
    quality = {"psnr": [None, psnr], "ssim": [1.0, 0.9], "vif": [1.0, 0.8]}
    return json.dumps({"settings": settings, **passes, "layers": [layer], "quality": quality})


@pytest.mark.usefixtures("results")
def test_what_presets_cost_is_that_of_clips_made_with_their_settings(tmp_path: Path) -> None:
    assert doc_models.on_the_bundled_model(PRESETS["wan"]) == ""
    for n, (preset, psnr, seconds) in enumerate((("wan", 30.0, 2.0), ("wan", 40.0, 6.0), ("flux", 20.0, 3.0))):
        (tmp_path / f"generate-x-preset-{n}.json").write_text(clip(preset, psnr, seconds))
    assert doc_models.on_the_bundled_model(PRESETS["wan"]) == "PSNR 35.0 dB, SSIM 0.900, VIF 0.800; 2.00×"
    assert doc_models.on_the_bundled_model(PRESETS["mochi"]).startswith("PSNR 35.0 dB")
    assert doc_models.on_the_bundled_model(PRESETS["hunyuan_video"]).startswith("PSNR 20.0 dB")
