"""The loss on text, samples, tasks."""
