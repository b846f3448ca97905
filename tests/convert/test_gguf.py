"""Proves that GGUF files of the llama architecture are read: blocks of every kind against their definition in float64,
a model of transformers against its own logits, and its tokenizer; that a key, a kind, a tensor or a header which cannot
be read is refused in one sentence that names it, before anything of a claimed size is allocated.

Not proved here: files that llama.cpp wrote (test_real_model.py reads one), YaRN, which is refused, and big-endian ones.
"""

from __future__ import annotations

import json
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import Tensor

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.convert import gguf, gguf_tokenizer, huggingface, run, weights
from megatron_rlhf.convert.gguf_file import GgufFile
from megatron_rlhf.data.tokenizer import Tokenizer
from tests.helpers import gguf as made
from tests.helpers.published import Published, publish

KINDS = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
NAMES = {
    "model.embed_tokens": "token_embd",
    "lm_head": "output",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_what_their_definition_says(kind: str, tmp_path: Path) -> None:
    """Equal to the float64 numbers rounded to float32, but for the one rounding before m is added."""
    stored, expected = made.blocks(kind, (7, 3, 64))
    file = GgufFile(made.write(tmp_path / "a.gguf", {"a": [[1, 2], [3]]}, {"x": stored}))
    found = file.read("x")
    assert (found.dtype, file.metadata) == (torch.float32, {"a": [[1, 2], [3]]})
    torch.testing.assert_close(found.double(), torch.from_numpy(expected), rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize(("kind", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
@pytest.mark.parametrize("version", [2, 3])
def test_plain_numbers_keep_every_bit(kind: str, dtype: torch.dtype, version: int, tmp_path: Path) -> None:
    expected = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    stored = made.plain(expected.float().numpy(), kind)
    assert torch.equal(GgufFile(made.write(tmp_path / "a.gguf", {}, {"x": stored}, version)).read("x"), expected)


def paired(tensor: Tensor, heads: int) -> Tensor:
    """Rows as llama.cpp has them: number i of a head's first half beside number i of its second."""
    rows = tensor.shape[0] // heads
    order = [head * rows + half * (rows // 2) + i for head in range(heads) for i in range(rows // 2) for half in (0, 1)]
    return tensor[order]


def packed(published: Published, path: Path, kind: str = "F32", **changes: Any) -> Path:
    """The model as llama.cpp would write it; keys of None are left out."""
    config = json.loads((published.path / "config.json").read_text())
    metadata = {
        "general.architecture": "llama",
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
        "llama.vocab_size": config["vocab_size"],
        **changes,
    }
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    tensors = {}
    for name, tensor in published.tensors.items():
        called = name.removesuffix(".weight")
        if called.startswith("model.layers."):
            number, _, rest = called.removeprefix("model.layers.").partition(".")
            tensor = paired(tensor, heads[NAMES[rest][-1]]) if NAMES[rest] in ("attn_q", "attn_k") else tensor
            called = f"blk.{number}.{NAMES[rest]}"
        else:
            called = NAMES[called]
        tensors[f"{called}.weight"] = made.plain(tensor.float().numpy(), kind if tensor.dim() == 2 else "F32")
    return made.write(path, {key: said for key, said in metadata.items() if said is not None}, tensors)


LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"tie_word_embeddings": False, "num_key_value_heads": 8}, {}),
        (
            {"head_dim": 12},
            {"llama.attention.key_length": 12, "llama.attention.value_length": 12, "llama.rope.dimension_count": 12},
        ),
        (
            {"rope_parameters": LINEAR},
            {"llama.rope.freq_base": 500.0, "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        ),
        ({"rope_parameters": LINEAR}, {"llama.rope.freq_base": 500.0, "llama.rope.scale_linear": 4.0}),
    ],
    ids=["tied", "untied, a key a query", "wide heads", "linear", "linear as older files say it"],
)
def test_a_model_computes_what_transformers_does(changes: dict[str, Any], keys: dict[str, Any], tmp_path: Path) -> None:
    """GGUF → weights → Hugging Face: every tensor bit-equal to the first, and logits to 1e-5."""
    transformers = pytest.importorskip("transformers")
    published = publish(tmp_path / "theirs", "Llama", **changes)
    path = packed(published, tmp_path / "a.gguf", **keys)
    run.convert(gguf.open_source(path, None), weights.write, tmp_path / "weights", quiet=True)
    run.convert(weights.open_source(tmp_path / "weights"), huggingface.write, tmp_path / "back", quiet=True)
    source, back = huggingface.open_source(published.path), huggingface.open_source(tmp_path / "back")
    assert source.card.model == back.card.model
    assert all(torch.equal(source.read(name), back.read(name)) for name in source.card.shapes())
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    real = torch.arange(published.rows.tokens_BT.shape[1]) < published.rows.lengths_B[:, None]
    logits = model(published.rows.tokens_BT).logits
    torch.testing.assert_close(logits[real], published.logits[real], rtol=1e-5, atol=1e-5)


def test_rows_of_pairs_are_put_back() -> None:
    """A head of 4 rows: 0 and 2 turn together in halves, and lie side by side in the file."""
    rows = torch.tensor([0.0, 2, 1, 3, 10, 12, 11, 13])[:, None]
    assert gguf.halves(rows, 4)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_several_precisions_become_float32(tmp_path: Path) -> None:
    """Norms lie in F32 beside F16: --dtype is not needed, and no number changes."""
    published = publish(tmp_path / "theirs", "Llama")
    source = gguf.open_source(packed(published, tmp_path / "a.gguf", "F16"), None)
    assert source.card.model.precision == "fp32"
    name = "decoder.layers.0.mlp.linear_fc2.weight"
    assert torch.equal(source.read(name), published.tensors["model.layers.0.mlp.down_proj.weight"].half().float())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture=qwen2 is not llama"),
        ({"general.type": "adapter"}, "general.type=adapter is no whole model"),
        ({"split.count": 2}, "one of several files"),
        ({"adapter.lora.alpha": 2.0}, "the key adapter.lora.alpha"),
        ({"llama.attention.sliding_window": 8}, "attention.sliding_window=8"),
        ({"llama.expert_count": 8}, "expert_count=8: experts cannot be converted"),
        ({"llama.rope.scaling.type": "yarn"}, "rope.scaling.type=yarn is not one of none, linear"),
        ({"llama.rope.scaling.factor": 4.0}, "rope.scaling.factor=4.0: without a rope.scaling.type"),
        ({"llama.rope.dimension_count": 4}, "rope.dimension_count=4: only heads of 8"),
        ({"llama.attention.key_length": 16}, "rope.dimension_count=8: only heads of 16 that turn whole"),
        ({"llama.attention.value_length": 16}, "attention.value_length=16: it must be the width of keys, 8"),
        ({"llama.attention.head_count": None}, "attention.head_count is missing"),
        ({"llama.vocab_size": 7}, "token_embd.weight has 101 rows"),
        ({"tokenizer.ggml.tokens": ["a"]}, "1 tokens and 101 rows"),
    ],
)
def test_what_a_model_cannot_be_is_named(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    published = publish(tmp_path / "theirs", "Llama", num_hidden_layers=1)
    with pytest.raises(BadInput, match=sentence) as refused:
        gguf.open_source(packed(published, tmp_path / "a.gguf", **changes), None)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda held: held.pop("model.layers.0.mlp.up_proj.weight"), r"linear_fc1.weight \(blk.0.ffn_up.weight\) is"),
        (lambda held: held.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}), "blk.3.ffn_up.weight is left"),
        (lambda held: held.update({"model.norm.weight": torch.ones(3)}), r"output_norm.weight is \[3\], its metadata"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object], sentence: str, tmp_path: Path
) -> None:
    published = publish(tmp_path / "theirs", "Llama", num_hidden_layers=1)
    change(published.tensors)
    source = gguf.open_source(packed(published, tmp_path / "a.gguf"), None)
    with pytest.raises(BadInput, match=sentence):
        run.convert(source, weights.write, tmp_path / "weights", quiet=True)
    assert not (tmp_path / "weights").exists()


def test_a_scalar_role_needs_a_fresh_head(tmp_path: Path) -> None:
    path = packed(publish(tmp_path / "theirs", "Llama", num_hidden_layers=1), tmp_path / "a.gguf")
    with pytest.raises(BadInput, match="--fresh-head"):
        gguf.open_source(path, "reward")


X = made.row("x", (4, 32), 0, 0)
HUGE = struct.pack("<Q", 1 << 60)
BAD: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no GGUF file"),
    "another magic": (b"GGML" + bytes(40), "no GGUF file"),
    "version 1": (made.header({}, [], 1), "GGUF of version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(8), "big-endian"),
    "tensors": (b"GGUF" + struct.pack("<I", 3) + HUGE + bytes(8), "claims 1152921504606846976 tensors"),
    "keys": (b"GGUF" + struct.pack("<IQ", 3, 0) + HUGE, "claims 1152921504606846976 keys"),
    "a key's letters": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + HUGE + bytes(40), "letters of 'a key'"),
    "an array": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + made.string("k") + struct.pack("<II", 9, 8) + HUGE,
        "items of 'k'",
    ),
    "arrays of arrays": (made.header({"k": [[[1]]]}, []), "nests arrays more than 2 deep under 'k'"),
    "a type": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + made.string("k") + struct.pack("<I", 99) + bytes(8),
        "unknown type 99 under 'k'",
    ),
    "a key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (made.string("k") + struct.pack("<II", 4, 1)),
        "the key 'k' twice",
    ),
    "cut short": (made.header({"k": "letters"}, [X])[:-9], "ends inside its header"),
    "an alignment": (made.header({"general.alignment": 33}, []), "alignment=33"),
    "dimensions": (made.header({}, [made.row("x", (1,) * 5, 0, 0)]), "'x' 5 dimensions"),
    "no numbers": (made.header({}, [made.row("x", (4, 0), 0, 0)]), r"sizes \[0, 4\]"),
    "too many numbers": (made.header({}, [made.row("x", (1 << 40, 1 << 40), 0, 0)]), "sizes"),
    "half a block": (made.header({}, [made.row("x", (4, 16), 2, 0)]), "which Q4_0 blocks cannot make"),
    "a kind": (made.header({}, [made.row("x", (4, 256), 14, 0)]), "'x' in Q6_K, which cannot be read"),
    "an unknown kind": (made.header({}, [made.row("x", (4, 256), 77, 0)]), "of an unknown type 77"),
    "an offset": (made.header({}, [made.row("x", (4, 32), 0, 16)]) + bytes(900), "at 16, no multiple"),
    "beyond the end": (made.header({}, [X]) + bytes(300), "'x' beyond its end"),
    "far beyond": (made.header({}, [made.row("x", (4, 32), 0, (1 << 64) - 32)]) + bytes(600), "beyond its end"),
    "a tensor twice": (made.header({}, [X, X]) + bytes(2000), "the tensor 'x' twice"),
    "overlap": (made.header({}, [X, made.row("y", (4, 32), 0, 32)]) + bytes(2000), "overlap"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_header_is_refused_before_anything_is_allocated(name: str, tmp_path: Path) -> None:
    data, sentence = BAD[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(BadInput, match=sentence) as refused:
        gguf.open_source(path, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in str(refused.value) and peak < 1 << 20


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = made.write(tmp_path / "a.gguf", {}, {"x": made.plain(np.ones((9, 9)))})
    file = GgufFile(path)
    path.write_bytes(path.read_bytes()[:-80])
    with pytest.raises(BadInput, match="ends inside x"):
        file.read("x")


def tokens(pre: str = "smollm", **changes: Any) -> dict[str, Any]:
    """Metadata of a byte-level BPE that knows all bytes, 12, "the" and two control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_end|>", *alphabet, "12", "th", "the", "Ġthe"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(words) - 2)],
        "tokenizer.ggml.merges": ["1 2", "t h", "th e", "Ġ the"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": "{{ messages }}",
        **changes,
    }


def test_the_tokenizer_is_rebuilt(tmp_path: Path) -> None:
    """Merges apply, digits stand alone with smollm and not with gpt-2, the end token and the template are kept."""
    for pre, digits in (("smollm", ["1", "2"]), ("gpt-2", ["12"])):
        files = gguf_tokenizer.files(tokens(pre))
        folder = tmp_path / pre
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        read = Tokenizer.load(folder)
        words = tokens()["tokenizer.ggml.tokens"]
        assert [words[id] for id in read.encode("the the")] == ["the", "Ġthe"]
        assert [words[id] for id in read.encode("12")] == digits
        assert (read.vocabulary, read.end, read.opening) == (len(words), 1, [])
        assert read.decode([*read.encode("12 é\n the"), 1]) == "12 é\n the"
        settings = json.loads(files["tokenizer_config.json"])
        assert (settings["bos_token"], settings["chat_template"]) == ("<|endoftext|>", "{{ messages }}")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"tokenizer.ggml.pre": "mystery"}, "pre=mystery is not one of smollm, gpt-2"),
        ({"tokenizer.ggml.model": "llama"}, "only the byte-level BPE gpt2"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id=1000000 is none of its"),
        ({"tokenizer.ggml.merges": ["x zz"]}, "no byte-level BPE"),
        ({"tokenizer.ggml.merges": ["xzz"]}, "no byte-level BPE"),
        ({"tokenizer.ggml.token_type": [1]}, "one kind for each"),
        ({"tokenizer.ggml.tokens": None}, "no list of strings"),
    ],
)
def test_a_tokenizer_that_is_not_known_stays_behind(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        gguf_tokenizer.files(tokens(**changes))


def test_it_is_said_that_the_tokenizer_stays_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = packed(publish(tmp_path / "theirs", "Llama"), tmp_path / "a.gguf", **{"tokenizer.ggml.model": "llama"})
    assert gguf.open_source(path, None).card.tokenizer == {}
    said = " ".join(capsys.readouterr().err.split())
    assert "the tokenizer stays behind: tokenizer.ggml.model=llama" in said
