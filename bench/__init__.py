"""Benches: each answers one question, and `results/` keeps what was measured."""
