"""What exists once for each run. Imports no torch until a run starts."""

from recipe.run.directory import begin_run, claim_run_directory
from recipe.run.noise_scale import NoiseColumns
from recipe.run.run import Run, start_run
from recipe.run.stop import Stopped

__all__ = ["NoiseColumns", "Run", "Stopped", "begin_run", "claim_run_directory", "start_run"]
