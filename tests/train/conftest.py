from fractions import Fraction

import av
import numpy as np
import pytest

from openvsa.models.scenes import FilmShots
from openvsa.train import preset

CUTS = (0, 40, 80, 110, 150)


def write_film(path, num_frames=CUTS[-1]):
    """Bright squares that move over a ground whose colour changes with the shot."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(24))
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        for i in range(num_frames):
            shot = sum(cut <= i for cut in CUTS) - 1
            image = np.full((32, 64, 3), 30 + 50 * shot, np.uint8)
            x = abs(2 * i % 96 - 48)
            image[8 + 4 * shot : 16 + 4 * shot, x : x + 12] = (250, 120, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def film(tmp_path_factory):
    return write_film(tmp_path_factory.mktemp("film") / "film.mp4")


@pytest.fixture
def config(film, tmp_path):
    """The miniature recipe on a film of four short shots."""

    def make(**changes):
        settings = {
            "film": film,
            "out": tmp_path / "out",
            "shots": FilmShots(CUTS, held_out_from=2, end=CUTS[-1]),
            "frame_size": (32, 64),
            "steps": 6,
            "log_every": 2,
            "evaluate_every": 4,
        }
        return preset("miniature", **{**settings, **changes})

    return make
