"""The one tolerance of this project lives in the package, beside the benchmark's correctness gate."""

from openvsa.bench.tolerance import FORWARD, GRADIENT, excess

__all__ = ["FORWARD", "GRADIENT", "excess"]
