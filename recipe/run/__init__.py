"""What exists once for each run."""
