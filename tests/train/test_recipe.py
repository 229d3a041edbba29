import pytest
import torch

import openvsa
from openvsa.models.scenes import FilmShots
from openvsa.train import preset
from openvsa.train.clips import Clips
from openvsa.train.flow import draw_levels


def test_learning_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    config = preset("bundled", out=tmp_path, steps=1000, warmup_steps=10, decay_share=0.25)
    factors = [config.lr_factor(step, config.progress(step, 0.0)) for step in range(1000)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10:750] == [1.0] * 740
    assert factors[875] == pytest.approx(0.5)
    assert 0 < factors[-1] < 0.005


def test_a_time_box_counts_seconds(tmp_path):
    config = preset("bundled", out=tmp_path, minutes=2.0)
    assert config.steps is None
    assert config.progress(10**6, 30.0) == 0.25
    assert config.progress(0, 300.0) == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 1.0, "steps": 1}, "one of minutes and steps"),
        ({"steps": 0}, "longer than nothing"),
        ({"minutes": float("nan")}, "longer than nothing, got minutes=nan"),
        ({"pause_at": 0.0}, r"pause_at must be in \(0, 1\]"),
        ({"decay_share": 0.0}, r"decay_share must be in \(0, 1\], got 0"),
        ({"densities": (0.5, 2.0)}, r"densities must be in \(0, 1\], got \(0\.5, 2\.0\)"),
        ({"warmup_steps": 0}, "warmup_steps must be at least 1, got 0"),
        ({"batch_size": -1}, "batch_size must be at least 1, got -1"),
        ({"pause_at": 0.5}, "give the file of its checkpoint"),
        ({"resume": True}, "give the file of its checkpoint"),
    ],
)
def test_bad_settings_are_named(tmp_path, changes, message):
    with pytest.raises(openvsa.OpenVSAError, match=message):
        preset("miniature", out=tmp_path, **changes)


def test_an_unknown_preset_is_named(tmp_path):
    with pytest.raises(openvsa.OpenVSAError, match="no preset 'big'; choose one of: bundled, miniature"):
        preset("big", out=tmp_path)


def test_clips_stay_inside_their_shot_and_their_side_of_the_split():
    shots = FilmShots((0, 100, 130, 200, 300), held_out_from=2, end=250)
    frames = torch.arange(300, dtype=torch.uint8).view(300, 1, 1, 1).expand(300, 3, 8, 8)
    clips = Clips(frames, shots, num_frames=10, stride=2, scene_starts=[50], scene_share=0.5)
    assert clips.training == [*range(82), *range(100, 112)]
    assert clips.held_out == [*range(130, 182), *range(200, 232)]
    drawn = clips.draw(2000, torch.Generator().manual_seed(0))
    assert set(drawn) <= set(clips.training)
    near = sum(38 <= start <= 62 for start in drawn) / 2000
    assert near == pytest.approx(0.5 + 0.5 * 25 / 94, abs=0.05)
    assert clips.rows([0, 100, 130]) == [1, 2, 0]
    loaded = (clips.load([5, 20])[:, 0, :, 0, 0] + 1) * 127.5
    torch.testing.assert_close(loaded, torch.stack([torch.arange(5.0, 25, 2), torch.arange(20.0, 40, 2)]))


def test_shots_shorter_than_a_clip_are_named():
    frames = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(openvsa.OpenVSAError, match="as long as a clip"):
        Clips(frames, FilmShots((0, 10, 20), held_out_from=1, end=20), num_frames=24, stride=2)


def test_noise_levels_cover_the_range_evenly_and_lean_to_noise():
    levels = draw_levels(64, torch.Generator().manual_seed(0), spread=1.4, shift=3.0)
    assert levels.min() > 0
    assert levels.max() < 1
    assert torch.equal(levels, levels.sort().values)
    assert levels.median().item() == pytest.approx(0.75, abs=0.05)
