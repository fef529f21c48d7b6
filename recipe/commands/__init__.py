"""The commands of `python -m recipe`: flags and main only."""
