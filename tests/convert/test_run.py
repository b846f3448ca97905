"""Proves that a conversion uses every tensor and fills every tensor or names those it cannot, loses no number to
infinity, leaves a whole result or none, and stays within twice the largest tensor and 1 GiB; and the tool's words.

Not proved here: each format's own tests; a disk that fills (tests/checkpoint).
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import huggingface, run, weights
from megatron_rlhf.convert.logical import Card
from tests.helpers.published import publish

ROOT = Path(__file__).resolve().parents[2]
MODEL = Model(layers=2, hidden=8, heads=2, vocabulary=11, context=4, style="llama", tied=False, ffn=12)


class Held:
    """A source of made-up tensors."""

    def __init__(self, **changes: Tensor) -> None:
        generator = torch.Generator().manual_seed(1)
        self.card = Card(MODEL)
        self.tensors = {name: torch.randn(shape, generator=generator) for name, shape in self.card.shapes().items()}
        self.tensors.update(changes)
        self.left: list[str] = []

    def read(self, name: str) -> Tensor:
        return self.tensors[name]

    def leftover(self) -> list[str]:
        return self.left

    def missing(self) -> list[str]:
        return [name for name in self.card.shapes() if name not in self.tensors]


def tool(*words: object) -> tuple[int, Any]:
    """The exit code of tools/convert.py, and the module."""
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(word) for word in words]), module


def test_what_is_missing_or_left_over_is_named(tmp_path: Path) -> None:
    """Eight of each at most, and how many more; nothing is written."""
    source = Held()
    for name in list(source.tensors)[:10]:
        del source.tensors[name]
    with pytest.raises(BadInput, match=r"embedding\.word_embeddings\.weight, .* and 2 more are missing"):
        run.convert(source, weights.write, tmp_path / "out", quiet=True)
    source = Held()
    source.left = ["decoder.layers.9.x"]
    with pytest.raises(BadInput, match=r"decoder\.layers\.9\.x is left over"):
        run.convert(source, weights.write, tmp_path / "out", quiet=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("write", [weights.write, huggingface.write])
@pytest.mark.parametrize(
    ("tensor", "dtype", "sentence"),
    [
        (torch.ones(9), None, r"is \[9\], the model wants \[8\]"),
        (torch.ones(8).half(), None, r"is stored in float16, the model's precision is fp32; write --dtype"),
        (torch.ones(8).double(), None, r"is stored in float64, the model's precision is fp32"),
        (torch.full((8,), 7e4), torch.float16, r"has numbers up to 70000, beyond fp16; write --dtype bf16"),
        (torch.ones(8, dtype=torch.int64), torch.float16, r"is stored in int64; weights are floats"),
    ],
)
def test_a_tensor_that_does_not_fit_ends_it(
    tensor: Tensor, dtype: torch.dtype | None, sentence: str, write: Any, tmp_path: Path
) -> None:
    """In the middle of writing; what was begun is gone."""
    source = Held(**{"decoder.final_layernorm.weight": tensor})
    with pytest.raises(BadInput, match=r"decoder\.final_layernorm\.weight " + sentence):
        run.convert(source, write, tmp_path / "out", dtype, quiet=True)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("write", [weights.write, huggingface.write])
def test_whatever_breaks_leaves_nothing(write: Any, tmp_path: Path) -> None:
    """An error of the disk or of the source half-way; what is at the path already is refused before anything."""

    class Broken(Held):
        def read(self, name: str) -> Tensor:
            if name == "output_layer.weight":
                raise OSError("planted")
            return super().read(name)

    with pytest.raises(OSError, match="planted"):
        run.convert(Broken(), write, tmp_path / "out", quiet=True)
    assert not any(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    run.convert(Held(), write, tmp_path / "out", quiet=True)
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(BadInput, match="out is there already; name another folder"):
        run.convert(Held(), write, tmp_path / "out", quiet=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_is_rounded_to_once(dtype: torch.dtype, tmp_path: Path) -> None:
    """As torch rounds; what was infinite or no number stays so."""
    odd = torch.tensor([float("inf"), float("nan"), 1.0, 1e-9, 3.14159265, -0.0, 65000.0, 2.0])
    source = Held(**{"decoder.final_layernorm.weight": odd})
    card = run.convert(source, weights.write, tmp_path / "out", dtype, quiet=True)
    found = weights.open_source(tmp_path / "out", None)
    assert found.card.model == card.model
    for name, tensor in source.tensors.items():
        read = found.read(name)
        assert read.dtype == dtype
        assert torch.equal(read.nan_to_num(-7), tensor.to(dtype).nan_to_num(-7)), name


def test_a_fresh_head_is_what_a_network_begins_with(tmp_path: Path) -> None:
    """On the body of a language model, by its seed, its own output layer dropped; never on a head."""
    source = Held()
    begun = run.headed(source, "reward", 5)
    run.convert(begun, weights.write, tmp_path / "out", quiet=True)
    found = weights.open_source(tmp_path / "out", None)
    assert found.card.role == "reward" and found.read("head.bias").item() == 0
    generator = torch.Generator().manual_seed(zlib.crc32(b"5:head.weight"))
    assert found.read("head.weight").equal(torch.normal(0.0, 1 / 3, (1, 8), generator=generator))
    assert found.read("decoder.final_layernorm.weight").equal(source.tensors["decoder.final_layernorm.weight"])
    with pytest.raises(BadInput, match="has a scalar head already"):
        run.headed(found, "value", 5)
    with pytest.raises(BadInput, match="write --role reward or --role value"):
        run.headed(source, "policy", 5)


def test_the_tool_says_one_sentence_and_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For what it cannot do; otherwise what is there now and the words that use it."""
    made = publish(tmp_path / "theirs", "Llama")
    capsys.readouterr()
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    base = ("--from", "hf", "--to", "weights", made.path)
    for words, sentence in (
        ((*base, tmp_path / "out", "--role", "reward"), "write --fresh-head SEED to begin one on it"),
        ((*base, tmp_path / "out", "--layout", "tp2 pp2"), "weights is read under every layout; leave it out"),
        ((*base, tmp_path / "out", "--tokenizer", tokenizer), "tokenizer holds no tokenizer"),
        ((*base, tmp_path / "out", "--shard-gib", "1"), "the size of Hugging Face's files"),
        (("--from", "hf", "--to", "hf", made.path, tmp_path / "out", "--shard-gib", "nan"), "must be above 0"),
        ((*base, made.path), "is there already"),
        (("--from", "weights", "--to", "hf", tmp_path, tmp_path / "out"), "no weights at"),
    ):
        assert tool(*words)[0] == 2
        said = capsys.readouterr().err.strip()
        assert sentence in said and "\n" not in said
    assert not (tmp_path / "out").exists()
    assert tool(*base, tmp_path / "out", "--dtype", "bf16")[0] == 0
    said = capsys.readouterr().out
    assert "a policy model of 27 tensors in bf16" in said and "the source has no tokenizer" in said
    assert f"megatron-rlhf sft experiment=NAME model={tmp_path}/out/model.yaml checkpoint.pretrained=" in said
    assert tool(*base, tmp_path / "value", "--role", "value", "--fresh-head", 1)[0] == 0
    manifest = json.loads((tmp_path / "value" / "manifest.json").read_text())
    assert manifest["role"] == "value" and "head.weight" in manifest["tensors"]
    many = ("--from", "weights", "--to", "hf", tmp_path / "out", tmp_path / "many", "--shard-gib", 0.0001)
    assert tool(*many)[0] == 0
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 3


def test_the_tool_is_light() -> None:
    """It imports neither megatron nor transformers until it is asked to compare."""
    code = (
        "import sys; sys.path.insert(0, 'tools'); import convert; "
        "sys.exit(any(name in sys.modules for name in ('megatron', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.slow
def test_the_check_compares_with_transformers(tmp_path: Path) -> None:
    """It passes for a true conversion; two parts swapped, in files that are otherwise whole, end it with 2."""
    pytest.importorskip("transformers")
    made = publish(tmp_path / "theirs", "Llama")
    words = [sys.executable, "tools/convert.py", "--from", "hf", "--to", "weights"]
    done = subprocess.run(
        [*words, str(made.path), str(tmp_path / "out"), "--check"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "both say the same 12 tokens greedily to 3 prompts" in done.stdout
    swap = (
        "import sys; sys.path.insert(0, 'tools'); import convert; "
        "from megatron_rlhf.convert import huggingface_names as names, huggingface_families as families\n"
        "rows = tuple(names.Row(r.ours, r.theirs[::-1], r.order) if 'fc1' in r.ours else r for r in names.LLAMA)\n"
        "object.__setattr__(families.LLAMA, 'table', rows)\n"
        "sys.exit(convert.main(sys.argv[1:]))"
    )
    arguments = ["--from", "hf", "--to", "weights", str(made.path), str(tmp_path / "swapped"), "--check"]
    done = subprocess.run([sys.executable, "-c", swap, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "the two sides differ: logits of" in done.stderr


MEASURED = """
import dataclasses, resource, sys, torch
from pathlib import Path
from megatron_rlhf.convert import huggingface, run, weights
from tests.convert.test_run import Endless
at = Path(sys.argv[1])
run.convert(Endless(), huggingface.write, at / "theirs", quiet=True)
run.convert(huggingface.open_source(at / "theirs", None), weights.write, at / "ours", torch.bfloat16, quiet=True)
run.convert(weights.open_source(at / "ours", None), huggingface.write, at / "back", quiet=True)
sys.exit(print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""
LARGE = Model(layers=30, hidden=1024, heads=16, vocabulary=8192, context=64, style="llama", tied=True, ffn=2752)


class Endless:
    """A model of 1.5 GB whose tensors are made when they are read."""

    card = Card(LARGE)

    def read(self, name: str) -> Tensor:
        return torch.ones(self.card.shapes()[name])

    def leftover(self) -> list[str]:
        return []

    def missing(self) -> list[str]:
        return []


@pytest.mark.slow
def test_memory_is_bounded(tmp_path: Path) -> None:
    """Peak resident memory of HF → weights (bf16) → HF of 1.5 GB: at most twice its largest tensor and 1 GiB."""
    sizes = [torch.Size(shape).numel() * 4 for shape in Card(LARGE).shapes().values()]
    assert sum(sizes) > 1.5e9
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) * 1024 <= 2 * max(sizes) + (1 << 30)
