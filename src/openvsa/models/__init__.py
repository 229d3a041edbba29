"""The small video model that ships with the package. Needs the extra `diffusers`."""

from openvsa.errors import require

require("diffusers", extra="demo")

from openvsa.models.bundled import load_bundled, load_pipeline, save_pipeline  # noqa: E402
from openvsa.models.pipeline import ClipPipeline  # noqa: E402
from openvsa.models.scenes import FilmShots, Scene, bundled_scenes  # noqa: E402
from openvsa.models.tokenizer import PatchTokenizer  # noqa: E402

__all__ = [
    "ClipPipeline",
    "FilmShots",
    "PatchTokenizer",
    "Scene",
    "bundled_scenes",
    "load_bundled",
    "load_pipeline",
    "save_pipeline",
]
