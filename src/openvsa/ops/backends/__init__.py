"""Kernels, one module each. None imports another, nor the oracle."""
