"""Checkpoints: written, verified, resumed from."""
