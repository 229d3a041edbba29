import pytest
import torch

import openvsa
from openvsa.models import PatchTokenizer


def smooth_clips(count=12, size=(8, 16, 32)):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        coarse = torch.randn(2, 3, 3, 4, 4, generator=generator)
        yield torch.nn.functional.interpolate(coarse, size=size, mode="trilinear").clamp(-1, 1)


def test_all_components_lose_nothing():
    tokenizer = PatchTokenizer.fit(smooth_clips(), num_components=384)
    clip = next(smooth_clips())
    torch.testing.assert_close(tokenizer.axes.T @ tokenizer.axes, torch.eye(384), atol=1e-5, rtol=0)
    # The axes that never vary in such smooth clips have factors in the thousands, and their inverses to match.
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(clip)), clip, atol=1e-4, rtol=0)


def test_few_components_keep_smooth_clips_and_normalise_their_change():
    tokenizer = PatchTokenizer.fit(smooth_clips(), num_components=48)
    changes = []
    for clip in smooth_clips():
        latents = tokenizer.encode(clip)
        assert latents.shape == (2, 48, 4, 2, 4)
        assert (tokenizer.decode(latents) - clip).square().mean() < 4e-3
        changes.append(latents - tokenizer.encode_still(clip[:, :, 0]))
    change = torch.cat(changes)
    assert change.square().mean().item() == pytest.approx(1, rel=1e-3)
    spread = change.square().mean((0, 3, 4)).sqrt()
    torch.testing.assert_close(tokenizer.change_std, spread, rtol=1e-2, atol=1e-3)


def test_a_still_frame_is_a_clip_that_does_not_move():
    tokenizer = PatchTokenizer.fit(smooth_clips(), num_components=16)
    frame = next(smooth_clips())[:, :, 0]
    expected = tokenizer.encode(frame.unsqueeze(2).repeat(1, 1, 2, 1, 1))
    assert torch.equal(tokenizer.encode_still(frame), expected)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    tokenizer = PatchTokenizer.fit(smooth_clips(), num_components=16)
    tokenizer.save_pretrained(tmp_path)
    loaded = PatchTokenizer.from_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors"}
    for name, tensor in tokenizer.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_bad_videos_are_named():
    with pytest.raises(openvsa.ShapeError, match=r"whole cells of \(2, 8, 8\), got \[1, 3, 3, 16, 16\]"):
        PatchTokenizer().encode(torch.zeros(1, 3, 3, 16, 16))
    with pytest.raises(openvsa.ShapeError, match="empty stream"):
        PatchTokenizer.fit([])
