import subprocess

import av
import numpy as np
import pytest
import torch

import openvsa
from openvsa.train.film import fetch_film, find_cuts, read_film

CUTS = (0, 40, 80, 110, 150)


def test_reads_and_scales(film):
    frames = read_film(film, (16, 32), 100)
    assert frames.shape == (100, 3, 16, 32)
    assert frames.dtype == torch.uint8
    assert frames[0, :, 0, 0].float().mean() < frames[90, :, 0, 0].float().mean()


def test_finds_every_cut(film):
    assert find_cuts(read_film(film, (32, 64), CUTS[-1])) == CUTS


def test_a_short_film_is_named(film):
    with pytest.raises(openvsa.OpenVSAError, match="has 150 frames, and 151 are needed"):
        read_film(film, (16, 32), 151)


@pytest.mark.parametrize("content", [b"", b"no film"])
def test_a_file_that_is_no_film_is_named(tmp_path, content):
    path = tmp_path / "film.mp4"
    path.write_bytes(content)
    with pytest.raises(openvsa.OpenVSAError, match=r"cannot read the film .*film\.mp4.*--film"):
        read_film(path, (16, 32), 1)


def test_a_failed_download_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "no network here")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(openvsa.OpenVSAError, match=r"moviepy==2\.2\.1.*no network here.*--film PATH"):
        fetch_film(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sound_alone_is_no_film(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(openvsa.OpenVSAError, match=r"sound\.mp4' has no pictures"):
        read_film(tmp_path / "sound.mp4", (32, 64), 1)
