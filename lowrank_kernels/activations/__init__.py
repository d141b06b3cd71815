"""Backward passes that keep less."""

from .release import release_gradients as release_gradients
