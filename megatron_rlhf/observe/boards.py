"""Where a run's numbers go beside log.jsonl: TensorBoard, Weights & Biases, MLflow, a file for Prometheus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_rlhf.config.rules import BadInput, chosen
from megatron_rlhf.config.schema import Observe
from megatron_rlhf.observe import mlflow, wandb
from megatron_rlhf.observe.board import Board, Drawn
from megatron_rlhf.observe.prometheus import Textfile

_MAKERS: dict[str, Callable[[Path], Drawn]] = {
    "tensorboard": lambda directory: Board(directory / "tensorboard"),
    "wandb": wandb.WandbBoard,
    "mlflow": mlflow.MlflowBoard,
}
_INSTALLED = {"wandb": wandb.installed, "mlflow": mlflow.installed}


def check(settings: Observe) -> None:
    """Raises BadInput for a board whose package is not installed; TensorBoard's may be missing."""
    for name in chosen(settings.boards):
        if name in _INSTALLED and not _INSTALLED[name]():
            raise BadInput(
                f"observe.boards names {name}, which is not installed; run pip install 'megatron-rlhf[{name}]', "
                "or write observe.boards=tensorboard"
            )


def opened(settings: Observe, directory: Path) -> list[Drawn]:
    """The boards of a run in `directory`."""
    check(settings)
    found = [_MAKERS[name](directory) for name in chosen(settings.boards)]
    if settings.prometheus:
        found.append(Textfile(directory / settings.prometheus, directory.resolve().name))
    return found
