"""One update of the model, and what is measured of it."""

from recipe.step.metrics import measure_update
from recipe.step.micro_batches import MicroBatches
from recipe.step.parity import check_parity
from recipe.step.spikes import SpikeDetector

__all__ = ["MicroBatches", "SpikeDetector", "check_parity", "measure_update"]
