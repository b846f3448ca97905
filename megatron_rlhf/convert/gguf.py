"""A GGUF file of llama.cpp's `llama` architecture read tensor by tensor, with its tokenizer.

llama.cpp turns neighbouring numbers of a head together, Megatron-Core and Hugging Face its two halves: the rows of
queries and keys lie in pairs in the file, and are put back here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert import architecture, gguf_tokenizer
from megatron_rlhf.convert.gguf_file import GgufFile
from megatron_rlhf.convert.huggingface_config import Settings
from megatron_rlhf.convert.huggingface_names import Order, Row, fused, linear
from megatron_rlhf.convert.logical import Card
from megatron_rlhf.convert.precision import DTYPES, stored_precision
from megatron_rlhf.observe.log import CONSOLE

TABLE = (
    Row("embedding.word_embeddings.weight", ("token_embd.weight",)),
    *linear("decoder.layers.{}.input_layernorm", ["blk.{}.attn_norm"]),
    *linear("decoder.layers.{}.self_attention.linear_qkv", [f"blk.{{}}.attn_{part}" for part in "qkv"], Order.QKV),
    *linear("decoder.layers.{}.self_attention.linear_proj", ["blk.{}.attn_output"]),
    *linear("decoder.layers.{}.pre_mlp_layernorm", ["blk.{}.ffn_norm"]),
    *linear("decoder.layers.{}.mlp.linear_fc1", [f"blk.{{}}.ffn_{part}" for part in ("gate", "up")], Order.GATED),
    *linear("decoder.layers.{}.mlp.linear_fc2", ["blk.{}.ffn_down"]),
    *linear("decoder.final_layernorm", ["output_norm"]),
    Row("output_layer.weight", ("output.weight",)),
)
_LLAMA = "llama"
_FOREIGN = re.compile(r"general\..*|tokenizer\..*|quantize\..*|split\.(no|count|tensors\.count)")
_PAIRED = re.compile(r"blk\.\d+\.attn_[qk]\.weight")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"


class Gguf:
    """The logical tensors of one file; `logical.Source`."""

    def __init__(self, path: Path, role: str | None = None) -> None:
        """Reads the header. Raises BadInput for an architecture, a setting or a file that cannot be read."""
        self._file = GgufFile(path)
        if role not in (None, "policy"):
            raise BadInput(
                f"{path} is a language model without a scalar head, which the role {role} ends in; write --fresh-head "
                "SEED to begin one on it"
            )
        model = _model(self._file)
        self.card = Card(model, "policy", _tokenizer(self._file, model))
        self._shapes = self.card.shapes()
        self._fused = {name: fused(TABLE, model, name) for name in self._shapes}

    def read(self, name: str) -> Tensor:
        """One whole logical tensor; where a file has several precisions, in float32."""
        return self._fused[name].join(self._shapes[name], lambda part: self._part(name, part))

    def leftover(self) -> list[str]:
        """Tensors of the file that nothing is read from."""
        used = {part for parts in self._fused.values() for part in parts.parts}
        return sorted(set(self._file.tensors) - used)

    def missing(self) -> list[str]:
        """Logical tensors that are not all there, each with those of its parts that are not."""
        return [
            f"{name} ({', '.join(lacks)})"
            for name, parts in self._fused.items()
            if (lacks := [part for part in parts.parts if part not in self._file.tensors])
        ]

    def _part(self, name: str, part: str) -> Tensor:
        model, shape = self.card.model, self._file.tensors[part].shape
        expected = self._fused[name].part_shapes(self._shapes[name])[part]
        if shape != expected:
            raise BadInput(f"{self._file.path}: {part} is {list(shape)}, its metadata asks for {list(expected)}")
        tensor = self._file.read(part).to(DTYPES[model.precision])
        return halves(tensor, model.head_width) if _PAIRED.fullmatch(part) else tensor


open_source = Gguf
"""`open_source(path, role)` as every format has it."""


def halves(tensor: Tensor, width: int) -> Tensor:
    """Rows of heads of `width` whose pairs that turn together lie side by side, with the first of all pairs first."""
    return tensor.view(-1, width // 2, 2, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def _model(file: GgufFile) -> Model:
    where, metadata = str(file.path), file.metadata
    found = metadata.get("general.architecture")
    if found != _LLAMA:
        raise BadInput(f"{where}: general.architecture={str(found)[:40]} is not {_LLAMA}, which alone is read")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise BadInput(f"{where}: general.type={str(kind)[:40]} is no whole model; merge it into one first")
    if metadata.get("split.count", 1) not in (0, 1):
        raise BadInput(f"{where} is one of several files of a model; merge them into one first")
    prefix = f"{_LLAMA}."
    strange = sorted(key for key in metadata if not key.startswith(prefix) and not _FOREIGN.fullmatch(key))
    if strange:
        raise BadInput(f"{where} has the key {strange[0][:80]}, which is not known here and may change the network")
    if "rope_freqs.weight" in file.tensors:
        raise BadInput(
            f"{where}: rope_freqs.weight holds frequencies of its own, from which Llama 3's settings cannot be told; "
            "convert the model from its Hugging Face folder"
        )
    named = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    model = _read(Settings(named, f"{where}: {_LLAMA}"), file)
    precision = stored_precision({stored.kind.dtype for stored in file.tensors.values()})
    return replace(model, precision=precision)


def _read(settings: Settings, file: GgufFile) -> Model:
    if _EMBEDDING not in file.tensors:
        raise BadInput(f"{file.path} has no {_EMBEDDING}; it is no language model, or not all of it")
    vocabulary = file.tensors[_EMBEDDING].shape[0]
    hidden, heads = settings.whole("embedding_length"), settings.whole("attention.head_count")
    width = settings.whole("attention.key_length", max(1, hidden // heads))
    settings.neutral("attention.value_length", width, why=f"it must be the width of keys, {width}")
    settings.neutral("rope.dimension_count", width, why=f"only heads of {width} that turn whole can be converted")
    settings.neutral("vocab_size", vocabulary, why=f"{_EMBEDDING} has {vocabulary} rows")
    for key in ("expert_count", "expert_used_count"):
        settings.neutral(key, 0, why="experts cannot be converted")
    model = Model(
        layers=settings.whole("block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=settings.whole("attention.head_count_kv", heads),
        head_dim=width if settings.given("attention.key_length") else 0,
        vocabulary=vocabulary,
        context=settings.whole("context_length"),
        ffn=settings.whole("feed_forward_length"),
        tied=_OUTPUT not in file.tensors,
        style="llama",
        norm_epsilon=settings.number("attention.layer_norm_rms_epsilon"),
        rope=_rope(settings),
    )
    settings.close()
    architecture.check(model, settings.where)
    return architecture.normal(model)


def _rope(settings: Settings) -> Rope:
    base = settings.number("rope.freq_base", 10000.0)
    scaling = settings.word("rope.scaling.type", {"none": "none", "linear": "linear"}, "none")
    # older files have the factor alone
    old = settings.number("rope.scale_linear", 1.0)
    factor = settings.number("rope.scaling.factor", old)
    if factor != old and old != 1:
        raise BadInput(f"{settings.where}: rope.scale_linear={old:g} and rope.scaling.factor={factor:g} disagree")
    if scaling == "linear" or old != 1:
        settings.take("rope.scaling.original_context_length")
        settings.take("rope.scaling.finetuned")
        return Rope(base=base, scaling="linear", factor=factor)
    settings.neutral("rope.scaling.factor", 1.0, 0.0, why="without a rope.scaling.type it is not known what it scales")
    return Rope(base=base)


def _tokenizer(file: GgufFile, model: Model) -> Mapping[str, bytes]:
    """Its files; none, and the reason said, where it cannot be rebuilt: `--tokenizer` takes another's."""
    words: Any = file.metadata.get(f"{gguf_tokenizer.PREFIX}tokens", [])
    if words and len(words) != model.vocabulary:
        raise BadInput(f"{file.path}: {len(words)} tokens and {model.vocabulary} rows of {_EMBEDDING} do not fit")
    try:
        return gguf_tokenizer.files(file.metadata)
    except BadInput as error:
        CONSOLE.print(f"{file.path}: the tokenizer stays behind: {error}")
        return {}
