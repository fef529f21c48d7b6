"""Checkpoints: written, verified, resumed from."""

from recipe.checkpoint.resume import ResumePoint, agree_on_resume_point, restore, roll_back
from recipe.checkpoint.same_text import open_text
from recipe.checkpoint.saver import CheckpointSaver

__all__ = ["CheckpointSaver", "ResumePoint", "agree_on_resume_point", "open_text", "restore", "roll_back"]
