"""MLflow, where the extra `mlflow` is installed; without it log.jsonl still holds every number.

MLFLOW_TRACKING_URI names a server; without it the numbers go into `mlflow.db` in the run's folder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlhf.observe.board import numbers


def installed() -> bool:
    """Whether mlflow is there."""
    return importlib.util.find_spec("mlflow") is not None


class MlflowBoard:
    """One run of the experiment `megatron-rlhf`."""

    def __init__(self, directory: Path) -> None:
        """Starts the run under the folder's name."""
        import mlflow

        if not mlflow.is_tracking_uri_set():
            directory.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{(directory / 'mlflow.db').resolve()}")
        mlflow.set_experiment("megatron-rlhf")
        self._mlflow: Any = mlflow
        self._run = mlflow.start_run(run_name=directory.resolve().name)

    def scalars(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds the finite numbers of `values` as `phase/name`."""
        self._mlflow.log_metrics(numbers(phase, values), step=step, run_id=self._run.info.run_id)

    def close(self) -> None:
        """Ends the run."""
        self._mlflow.end_run()
