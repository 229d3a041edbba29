"""The named scenes that ship with the package: a start frame each, and the film's shots they come from."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from openvsa.errors import OpenVSAError, require
from openvsa.models.shots import UNKNOWN_SHOT

__all__ = ["SCENES_FOLDER", "FilmShots", "Scene", "bundled_scenes", "read_image"]

SCENES_FOLDER = Path(__file__).parent / "scenes_data"


@dataclass(frozen=True)
class FilmShots:
    """Where the film is cut. Shot i is the frames `cuts[i] : cuts[i + 1]`.

    Shots before `held_out_from` are for training, those from there to `end` (the credits) are held out.
    """

    cuts: tuple[int, ...]
    held_out_from: int
    end: int

    @classmethod
    def bundled(cls) -> FilmShots:
        """The shots of the film as the package's model was trained on them."""
        content = json.loads((SCENES_FOLDER / "shots.json").read_text())
        return cls(tuple(content["cuts"]), content["held_out_from"], content["end"])

    @property
    def num_rows(self) -> int:
        """Rows of the table of shot tokens: the unknown shot, then every training shot."""
        return 1 + self.held_out_from

    def shot_at(self, frame: int) -> int:
        """The shot that a frame of the film belongs to."""
        return sum(cut <= frame for cut in self.cuts) - 1

    def row(self, shot: int) -> int:
        """The row of the table of shot tokens: 1 + shot for a training shot, else the unknown shot's."""
        return 1 + shot if shot < self.held_out_from else UNKNOWN_SHOT


@dataclass(frozen=True)
class Scene:
    """A start frame with a name. `start` is its frame number in the film, `row` that of its shot tokens."""

    name: str
    title: str
    start: int
    shot: int
    row: int
    image: Path

    @property
    def held_out(self) -> bool:
        """Whether the model has never seen the shot."""
        return self.row == UNKNOWN_SHOT

    def start_frame(self, size: tuple[int, int]) -> Tensor:
        """uint8 `[height, width, 3]`, scaled to `size` = (height, width)."""
        return read_image(self.image, size)


def bundled_scenes() -> tuple[Scene, ...]:
    """All scenes in the package, training scenes first."""
    shots = FilmShots.bundled()
    scenes = []
    for entry in json.loads((SCENES_FOLDER / "scenes.json").read_text()):
        shot = shots.shot_at(entry["start"])
        image = SCENES_FOLDER / f"{entry['name']}.webp"
        scenes.append(Scene(entry["name"], entry["title"], entry["start"], shot, shots.row(shot), image))
    return tuple(scenes)


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file as uint8 `[height, width, 3]`, scaled and cut around its centre to `size` = (height, width).

    Raises `OpenVSAError` when it is missing or no image.
    """
    require("PIL", extra="video")
    from PIL import Image, ImageOps

    height, width = size
    try:
        with Image.open(path) as image:
            rgb = ImageOps.fit(image.convert("RGB"), (width, height))
    except OSError as error:
        raise OpenVSAError(f"cannot read the image {str(path)!r}: {error}") from None
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
