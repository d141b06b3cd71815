"""`python -m lowrank_kernels`: what is installed, whether it computes right, what a model takes."""

from .main import main

__all__ = ["main"]
