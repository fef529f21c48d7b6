"""Pushing to the Hugging Face Hub and fetching from it."""
