"""One update of the model, and what is measured of it."""
