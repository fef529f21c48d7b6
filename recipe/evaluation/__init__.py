"""The loss on text, samples, tasks."""

from recipe.evaluation.in_run import RunEvaluation, read_validation_sets

__all__ = ["RunEvaluation", "read_validation_sets"]
