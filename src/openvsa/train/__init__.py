"""Training of the small video model. Needs the extra `train`."""

from openvsa.errors import require

require("diffusers", extra="train")

from openvsa.train.loop import TrainResult, run  # noqa: E402
from openvsa.train.recipe import TrainConfig, preset  # noqa: E402

__all__ = ["TrainConfig", "TrainResult", "preset", "run"]
