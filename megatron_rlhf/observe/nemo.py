"""NeMo's SentencePiece tokenizer and experiment manager, where the extra `nemo` is installed.

`NemoPieces` is what `data.tokenizer.Tokenizer` takes in place of its own pieces, `Experiment` what `observe.log` takes
in place of its `Board`. Imports of NeMo take some ten seconds, so that only who asks for one has them.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_rlhf.config.rules import BadInput


def installed() -> bool:
    """Whether nemo-toolkit is there."""
    return importlib.util.find_spec("nemo") is not None


class NemoPieces:
    """A sentencepiece model as NeMo's SentencePieceTokenizer reads it; it has no newline of its own."""

    def __init__(self, path: Path) -> None:
        """Reads the model file. Raises BadInput where NeMo is not installed or the file is no model."""
        _need("the tokenizer of NeMo")
        from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer

        try:
            self._tokenizer: Any = SentencePieceTokenizer(str(path))
        except (RuntimeError, ValueError, OSError) as error:
            raise BadInput(f"{path} is no sentencepiece model; megatron-rlhf prepare writes one") from error
        inner = self._tokenizer.tokenizer
        self.vocabulary = int(self._tokenizer.vocab_size)
        self.end = int(inner.eos_id())
        self.newline = -1
        self.opening: list[int] = []
        self.control = frozenset(id for id in range(self.vocabulary) if inner.is_control(id))

    def id(self, text: str) -> int | None:
        """The id of the piece `text`, None where there is none."""
        found = int(self._tokenizer.token_to_id(text))
        return found if self.text(found) == text else None

    def text(self, id: int) -> str:
        """The piece of an id."""
        return str(self._tokenizer.ids_to_tokens([id])[0])

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text."""
        return [[int(id) for id in self._tokenizer.text_to_ids(text)] for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`."""
        return str(self._tokenizer.ids_to_text(list(ids))) if ids else ""


class Experiment:
    """A folder and the loggers that NeMo's exp_manager makes; on the first rank of a run."""

    def __init__(self, directory: Path, name: str, *, version: str | None = None, **settings: Any) -> None:
        """exp_manager chooses `directory`/`name`/`version` and opens its loggers, TensorBoard's unless `settings` says
        otherwise (`create_wandb_logger`, `create_mlflow_logger`, ...). Raises BadInput where NeMo is not installed."""
        _need("the experiment manager of NeMo")
        from lightning.pytorch import Trainer
        from nemo.utils.exp_manager import exp_manager

        usual = {"use_datetime_version": False, "create_checkpoint_callback": False}
        trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=1)
        chosen = exp_manager(
            trainer, {**usual, "exp_dir": str(directory), "name": name, "version": version, **settings}
        )
        self.directory = Path(chosen)
        self._loggers = list(trainer.loggers)

    def scalars(self, phase: str, step: int, values: Mapping[str, Any]) -> None:
        """Gives the finite numbers of `values` to every logger under the names `phase/name`."""
        numbers = {
            f"{phase}/{name}": float(value)
            for name, value in values.items()
            if isinstance(value, int | float) and math.isfinite(value)
        }
        for logger in self._loggers:
            logger.log_metrics(numbers, step=step)

    def close(self) -> None:
        """Writes what the loggers still hold."""
        for logger in self._loggers:
            logger.finalize("success")


def _need(what: str) -> None:
    if not installed():
        raise BadInput(f"{what} needs nemo-toolkit; run pip install 'megatron-rlhf[nemo]'")
