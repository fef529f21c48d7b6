"""Pushing to the Hugging Face Hub and fetching from it. Imports no torch."""

from recipe.hub.background import Pusher
from recipe.hub.client import check_hub

__all__ = ["Pusher", "check_hub"]
