"""Clips written, read and joined; files whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, ShapeError
from openvsa.evaluate.files import atomic_path, check_output_folder
from openvsa.evaluate.quality import compare_clips
from openvsa.evaluate.video import read_video, side_by_side, write_video

MakeClip = Callable[..., Tensor]


def test_a_clip_survives_the_round_trip(tmp_path: Path, make_clip: MakeClip) -> None:
    clip = make_clip(24, 72, 112)
    write_video(clip, tmp_path / "clip.mp4", fps=12)
    back = read_video(tmp_path / "clip.mp4")
    assert back.shape == clip.shape
    assert back.dtype == torch.uint8
    assert compare_clips(back, clip).mean_psnr > 34
    # Frame i must come back as frame i: every other frame is further away.
    errors = (back[:, None].float() - clip[None].float()).square().mean((2, 3, 4))
    assert errors.argmin(1).tolist() == list(range(24))


def test_the_file_is_what_browsers_play(tmp_path: Path, make_clip: MakeClip) -> None:
    write_video(make_clip(6, 32, 48), tmp_path / "clip.mp4", fps=12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12)
    content = (tmp_path / "clip.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "playing must not wait for the whole file"


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(2, 8, 8, 3), "uint8 tensor .* got torch.float32"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"\[2, 3, 8, 8\]"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), r"\[0, 8, 8, 3\]"),
        (torch.zeros(2, 9, 8, 3, dtype=torch.uint8), r"even height and width, got \[9, 8\]"),
    ],
)
def test_what_is_not_a_clip_is_refused_and_leaves_nothing(tmp_path: Path, clip: Tensor, message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        write_video(clip, tmp_path / "clip.mp4", fps=12)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"not a video"])
def test_a_damaged_video_is_a_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "clip.mp4").write_bytes(content)
    with pytest.raises(OpenVSAError, match=r"cannot read a video from .*clip\.mp4"):
        read_video(tmp_path / "clip.mp4")


def test_side_by_side_keeps_each_clip_on_its_side() -> None:
    left = torch.zeros(3, 40, 60, 3, dtype=torch.uint8)
    right = torch.full_like(left, 200)
    joined = side_by_side(left, right, ("one", "two"))
    frames, height, width, _ = joined.shape
    assert frames == 3
    assert height % 2 == 0
    assert width % 2 == 0
    assert (joined[:, height // 2, : width // 3] == 0).all()
    assert (joined[:, height // 2, -width // 3 :] == 200).all()
    labels = joined[0, : height // 10].float()
    assert labels[:, : width // 2].std() > 1, "the left label is drawn"
    assert labels[:, width // 2 :].std() > 1, "the right label is drawn"


def test_clips_of_two_shapes_cannot_be_joined(make_clip: MakeClip) -> None:
    with pytest.raises(ShapeError, match=r"\[2, 16, 16, 3\] and \[3, 16, 16, 3\]"):
        side_by_side(make_clip(2, 16, 16), make_clip(3, 16, 16), ("one", "two"))


@pytest.mark.parametrize("stop", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, stop: type[BaseException]) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_path(target) as temporary:
            temporary.write_text("ne")
            raise stop

    with pytest.raises(stop):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(OpenVSAError, match=rf"cannot write to the output folder '{folder}'.*Choose a folder"):
            check_output_folder(folder)


def test_a_folder_is_made_and_left_empty(tmp_path: Path) -> None:
    assert check_output_folder(tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    assert list((tmp_path / "new" / "folder").iterdir()) == []
