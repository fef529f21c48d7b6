"""datatrove's executors for a step of ours. Imported by the process of an executor alone, and where Slurm runs a task."""

import os
import shlex
import sys
from pathlib import Path
from typing import Any

from datatrove.executor import RayPipelineExecutor, SlurmPipelineExecutor


class Slurm(SlurmPipelineExecutor):
    """Without the second job, which adds up statistics that this step has not."""

    def launch_merge_stats(self) -> None:
        """Submit nothing."""


def submit_to_slurm(step: Any, tasks: int, directory: Path, sbatch: dict[str, str]) -> None:
    """Submit a job array; its logs go to `directory`.

    `sbatch` has partition, time and job-name, and what else sbatch takes.
    """
    executor = Slurm(
        [step],
        tasks,
        **{name.replace("-", "_"): sbatch[name] for name in ("partition", "time", "job-name")},
        qos=None,  # only if `sbatch` has it
        sbatch_args=sbatch,
        max_array_size=-1,  # one array, whose indices are the tasks
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH",
        logging_dir=str(directory.resolve()),
    )
    executor.launch_job()  # run() would do a task where this is itself one of a job array


def join_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or that of this machine; without one, one is started for this process."""
    import ray

    ray.init(log_to_driver=False, include_dashboard=False)


def run_on_ray(step: Any, tasks: int, directory: Path) -> None:
    """Run the tasks to their end; their logs go to `directory`."""
    RayPipelineExecutor([step], tasks, logging_dir=str(directory.resolve())).run()


def leave_ray() -> None:
    """End the tasks, and a cluster that was started for this process."""
    import ray

    ray.shutdown()
