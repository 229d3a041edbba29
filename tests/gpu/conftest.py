"""These tests need a CUDA device and are not collected without one; some need Diffusers too."""

from __future__ import annotations

import importlib.util

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
if importlib.util.find_spec("diffusers") is None:
    collect_ignore_glob += ["test_graph_model.py", "test_training_model.py"]
