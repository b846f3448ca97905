"""What this machine has, what it lacks and what is lost without it; nothing heavy is imported to find out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet


@dataclass(frozen=True, slots=True)
class Part:
    """One thing a run may use."""

    name: str
    """As people call it."""
    find: Callable[[], str]
    """Its version or place, empty when it is missing."""
    lost: str
    """What a run loses without it."""
    wanted: str = ""
    """The versions that work, as pip writes them."""


def report() -> str:
    """The table as text: found, missing or wrong version, and what is lost; never raises."""
    lines = [_line(part) for part in PARTS]
    width = max(len(name) for name, _, _ in lines)
    middle = max(len(state) for _, state, _ in lines)
    return "".join(f"{name:<{width}}  {state:<{middle}}  {lost}".rstrip() + "\n" for name, state, lost in lines)


def _line(part: Part) -> tuple[str, str, str]:
    try:
        found = part.find()
        if not found:
            return part.name, "missing", f"without it: {part.lost}"
        if part.wanted and not SpecifierSet(part.wanted).contains(found.split()[0], prereleases=True):
            return part.name, f"{found} (needs {part.wanted})", f"without the right one: {part.lost}"
        return part.name, found, ""
    except Exception as error:  # a broken installation of one part must not hide the others
        return part.name, f"broken ({type(error).__name__})", f"without it: {part.lost}"


def _package(name: str, module: str) -> Callable[[], str]:
    def find() -> str:
        if importlib.util.find_spec(module) is None:
            return ""
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "found"

    return find


def _program(*names: str) -> Callable[[], str]:
    return lambda: next((path for name in names if (path := shutil.which(name))), "")


def _module(name: str) -> Callable[[], str]:
    return lambda: "found" if importlib.util.find_spec(name) else ""


def _torch_cuda() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = Path(spec.origin).with_name("version.py").read_text(encoding="utf-8")
    built = re.search(r"^cuda[^=]*= *['\"]([\d.]+)['\"]", text, re.MULTILINE)
    return built[1] if built else ""


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return ""
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=False)
    gpus = [line for line in listed.stdout.splitlines() if line.startswith("GPU")]
    return f"{len(gpus)} x {gpus[0].partition(':')[2].partition('(')[0].strip()}" if gpus else ""


def _kernels() -> str:
    """What the build says of itself: importing the kernels would import torch."""
    report = Path(__file__).with_name("ops") / "kernels.json"
    if not report.exists():
        return ""
    made = json.loads(report.read_text(encoding="utf-8"))
    names = " and ".join(name.upper() for name in made["built"])
    why = f" ({made['why']})" if made["why"] else ""
    return (names or "the slower Python references") + why


def _transformer_engine() -> str:
    version = _package("transformer-engine", "transformer_engine")()
    if version and not importlib.util.find_spec("transformer_engine_torch"):
        raise ImportError("transformer-engine is here without its torch part, which breaks megatron-core's import")
    return version


PARTS = [
    Part("python", platform.python_version, "everything", ">=3.10,<3.14"),
    Part("torch", _package("torch", "torch"), "everything", ">=2.10"),
    Part("megatron-core", _package("megatron-core", "megatron"), "everything", ">=0.16.1,<0.17"),
    Part("hydra", _package("hydra-core", "hydra"), "everything: configurations are not composed", ">=1.3,<1.4"),
    Part("sentencepiece", _package("sentencepiece", "sentencepiece"), "training and reading tokenizers", ">=0.2"),
    Part("tokenizers", _package("tokenizers", "tokenizers"), "reading tokenizer.json and GPT-2's files", ">=0.21,<1"),
    Part("einops", _package("einops", "einops"), "megatron-core's import"),
    Part("rich", _package("rich", "rich"), "progress on a terminal"),
    Part("tensorboard", _package("tensorboard", "tensorboard"), "TensorBoard logs"),
    Part("matplotlib", _package("matplotlib", "matplotlib"), "the plots of the report"),
    Part("CUDA in torch", _torch_cuda, "GPUs; the CPU and gloo are used"),
    Part("GPUs", _gpus, "GPUs; the CPU and gloo are used"),
    Part("transformer-engine", _transformer_engine, "its fused Adam; torch's is used (extra gpu)", ">=2.9,<2.12"),
    Part("kernels", _kernels, "fast log-probs, exact KL and draws; the Python references are used"),
    Part("apex", _module("amp_C"), "its fused Adam where transformer-engine is missing (source build)"),
    Part("vaderSentiment", _package("vaderSentiment", "vaderSentiment"), "the quickstart's labeler"),
    Part("profanity check", _package("alt-profanity-check", "profanity_check"), "the quickstart's labeler"),
    Part("chitchat data", _package("chitchat-dataset", "chitchat_dataset"), "the quickstart's corpus"),
    Part("wandb", _package("wandb", "wandb"), "observe.boards=wandb (extra wandb)"),
    Part("mlflow", _package("mlflow", "mlflow"), "observe.boards=mlflow (extra mlflow)"),
    Part("submitit", _package("hydra-submitit-launcher", "submitit"), "sweeps as SLURM jobs (extra slurm)", ">=1.2"),
    Part("slurm", _program("sbatch"), "submit; torchrun starts ranks on several machines too"),
    Part("numactl", _program("numactl"), "ranks of a SLURM job are not bound to their GPU's NUMA node"),
]
