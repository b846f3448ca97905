"""Proves that a Hugging Face folder of GPT-2, Llama, Mistral, Qwen2 or GPT-NeoX becomes weights that a tp2 pp2 network
loads, computing what transformers computes, and comes back with every bit of every tensor; and that what cannot be
expressed, and files that are not whole, are refused by name in one sentence.

Not proved here: published checkpoints; families with a file of their own (their tests are beside these).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhf.checkpoint import weights as stage
from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Compute, Model, Rope
from megatron_rlhf.convert import huggingface, huggingface_names, run, weights
from megatron_rlhf.convert.huggingface_files import Folder
from megatron_rlhf.models import roles
from megatron_rlhf.train.engine import Engine
from tests.helpers import roles as tiny
from tests.helpers.grid import on_grid
from tests.helpers.logits import all_logits
from tests.helpers.published import VOCABULARY, Published, publish

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, tied, 1 shard, as trained": ("GPT2", {"activation_function": "gelu_new"}),
    "gpt2, untied, 4 shards": ("GPT2", {"tie_word_embeddings": False, "shards": 4}),
    "llama, untied, 1 shard": ("Llama", {}),
    "llama, tied, 4 shards": ("Llama", {"tie_word_embeddings": True, "shards": 4}),
    "mistral, untied, 4 shards": ("Mistral", {"shards": 4}),
    "mistral, tied, 1 shard, one key-value head a head": (
        "Mistral",
        {"tie_word_embeddings": True, "num_key_value_heads": 8},
    ),
    "qwen2, untied, 1 shard": ("Qwen2", {}),
    "qwen2, tied, 4 shards": ("Qwen2", {"tie_word_embeddings": True, "shards": 4}),
    "llama, wide heads, biases, 4 shards": (
        "Llama",
        {"head_dim": 12, "attention_bias": True, "mlp_bias": True, "shards": 4},
    ),
    "gpt-neox, untied, 1 shard, a quarter of a head": ("GPTNeoX", {}),
    "gpt-neox, tied, 4 shards, half of heads of 12": (
        "GPTNeoX",
        {"tie_word_embeddings": True, "shards": 4, "hidden_size": 96, "rotary_pct": 0.5, "hidden_act": "gelu_new"},
    ),
}
HEADS = {"gpt_neox": "GPTNeoX", "qwen2": "Qwen2", "gpt2": "GPT2", "llama": "Llama", "mistral": "Mistral"}
ROPES = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
}


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's files."""
    files = Folder(path)
    return {name: files.read(name).clone() for name in files.names()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Both have the same tensors with the same bits."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


def through(source: Path, folder: Path, role: str | None = None, **shards: Any) -> None:
    """`source` as weights, and these as a Hugging Face folder again."""
    run.convert(huggingface.open_source(source, role), weights.write, folder / "weights", quiet=True)

    def write(*arguments: Any) -> None:
        huggingface.write(*arguments, **shards)

    run.convert(weights.open_source(folder / "weights", None), write, folder / "back", quiet=True)


@pytest.fixture(scope="module", params=CASES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder, what it computes, and the weights it was converted to."""
    family, settings = CASES[request.param]
    folder = tmp_path_factory.mktemp("published")
    made = publish(folder / "theirs", family, **settings)
    run.convert(huggingface.open_source(made.path, None), weights.write, folder / "weights", quiet=True)
    return {"made": made, "folder": folder}


@on_grid(4)
def test_a_trained_layout_computes_the_same_and_gives_every_bit_back(published: dict[str, Any]) -> None:
    """HF → weights → tp2 pp2 with padded words → saved as a stage saves → HF: logits to 1e-5, tensors to the bit."""
    made, folder = published["made"], published["folder"]
    model = weights.open_source(folder / "weights", None).card.model
    built = tiny.network("tp2 pp2", model)
    stage.load(built, folder / "weights")
    read = all_logits(made.rows.tokens_BT.shape[1], VOCABULARY)
    found = Engine(built, read, Compute(forward_micro_batch=2)).forward(made.rows)
    real = torch.arange(found.shape[1]) < made.rows.lengths_B[:, None]
    assert float(made.logits[real].std()) > 1
    torch.testing.assert_close(found[real], made.logits[real], rtol=1e-5, atol=1e-5)
    stage.save(built, folder / "trained", {"model": asdict(model), "role": "policy"})
    if dist.get_rank() == 0:
        source = weights.open_source(folder / "trained", None)
        run.convert(source, huggingface.write, folder / "back", quiet=True)
        same(tensors(folder / "back"), made.tensors)
    dist.barrier()


@pytest.mark.parametrize("count", [1, 4])
def test_files_come_back(published: dict[str, Any], count: int, tmp_path: Path) -> None:
    """In one file and in several, with an index where there are several, and transformers reads what comes out."""
    transformers = pytest.importorskip("transformers")
    made: Published = published["made"]
    size = sum(tensor.numel() * tensor.element_size() for tensor in made.tensors.values())
    through(made.path, tmp_path, largest_shard=10 * size if count == 1 else size // 3)
    back = tmp_path / "back"
    same(tensors(back), made.tensors)
    assert (
        (len(list(back.glob("*.safetensors"))) > 1) == (back / "model.safetensors.index.json").exists() == (count > 1)
    )
    model, told = transformers.AutoModelForCausalLM.from_pretrained(back, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"] and not told["mismatched_keys"]
    logits = model.eval()(made.rows.tokens_BT).logits
    real = torch.arange(logits.shape[1]) < made.rows.lengths_B[:, None]
    torch.testing.assert_close(logits[real], made.logits[real], rtol=1e-5, atol=1e-5)
    assert huggingface.open_source(back, None).card.model == huggingface.open_source(made.path, None).card.model


@pytest.fixture(scope="module", params=HEADS)
def scored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A *ForSequenceClassification of one label and its weights, once as it is and once with a bias on its head."""
    folder = tmp_path_factory.mktemp("scored")
    made = publish(folder / "theirs", HEADS[request.param], head="ForSequenceClassification")
    run.convert(huggingface.open_source(made.path, None), weights.write, folder / "weights", quiet=True)
    return {"made": made, "folder": folder}


@on_grid(4)
def test_a_scalar_head_comes_along(scored: dict[str, Any]) -> None:
    """Scores to 1e-5 under tp2 pp2, back with every bit; a bias that training moved is one more tensor, read back."""
    made, folder = scored["made"], scored["folder"]
    source = weights.open_source(folder / "weights", "value")
    assert source.card.role == "value"
    built = tiny.network("tp2 pp2", source.card.model, scalar=True)
    stage.load(built, folder / "weights")
    found = Engine(built, roles.scores(), Compute(forward_micro_batch=2)).forward(made.rows)
    torch.testing.assert_close(found, made.logits, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        for bias in (0.0, 0.25):
            if "head.bias" in built.parameters:
                built.parameters["head.bias"].fill_(bias)
            where = folder / f"bias{bias}"
            stage.save(built, where / "trained", {"model": asdict(source.card.model), "role": "reward"})
            if dist.get_rank() == 0:
                run.convert(weights.open_source(where / "trained", None), huggingface.write, where / "back", quiet=True)
                extra = {} if bias == 0 else {"score.bias": torch.tensor([bias])}
                same(tensors(where / "back"), made.tensors | extra)
                assert huggingface.open_source(where / "back", "reward").read("head.bias").item() == bias
            dist.barrier()


def test_the_bias_is_said(scored: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line where it is not 0, none where it is; transformers reads the rest and the scores differ by the bias."""
    transformers = pytest.importorskip("transformers")
    made: Published = scored["made"]
    source = huggingface.open_source(made.path, "reward")
    run.convert(source, huggingface.write, tmp_path / "plain", quiet=True)
    assert "bias" not in capsys.readouterr().err

    class Moved:
        card = source.card
        leftover, missing = source.leftover, source.missing

        def read(self, name: str) -> Tensor:
            return torch.tensor([0.25]) if name == "head.bias" else source.read(name)

    run.convert(Moved(), huggingface.write, tmp_path / "moved", quiet=True)
    assert "the head's bias is 0.25: score.bias holds it" in capsys.readouterr().err
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "moved", pad_token_id=0)
    real = torch.arange(made.rows.tokens_BT.shape[1]) < made.rows.lengths_B[:, None]
    scores = loaded.eval()(made.rows.tokens_BT, attention_mask=real.long()).logits.squeeze(-1)
    torch.testing.assert_close(scores, made.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("old", [True, False], ids=["rotary_pct", "rope_parameters"])
def test_the_part_of_a_head_that_turns_comes_along(old: bool, tmp_path: Path) -> None:
    """Half of it, with a base of its own and a scaling, spelled as either generation of transformers spells it."""
    turned = {"rope_type": "linear", "factor": 4.0}
    spelled = turned | {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    made = publish(tmp_path / "theirs", "GPTNeoX", rope_parameters=spelled)
    config = json.loads((made.path / "config.json").read_text())
    assert config["rope_parameters"]["partial_rotary_factor"] == 0.5
    if old:
        del config["rope_parameters"]
        # what both names of the base and the fraction say is one thing
        config |= {"rotary_pct": 0.5, "partial_rotary_factor": 0.5, "rotary_emb_base": 500, "rope_theta": 500}
        (made.path / "config.json").write_text(json.dumps(config | {"rope_scaling": turned}))
    rope = huggingface.open_source(made.path, None).card.model.rope
    assert rope == Rope(base=500.0, scaling="linear", factor=4.0, fraction=0.5)
    through(made.path, tmp_path)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    real = torch.arange(made.rows.tokens_BT.shape[1]) < made.rows.lengths_B[:, None]
    logits = model(made.rows.tokens_BT).logits
    torch.testing.assert_close(logits[real], made.logits[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("old", [True, False], ids=["rope_scaling", "rope_parameters"])
def test_rotary_positions_come_along(name: str, old: bool, tmp_path: Path) -> None:
    """Every scaling, spelled as either generation of transformers spells it, and back."""
    made = publish(tmp_path / "theirs", "Llama", rope_parameters=ROPES[name] | {"rope_theta": 500.0})
    config = json.loads((made.path / "config.json").read_text())
    if old:
        config |= {"rope_theta": 500.0, "rope_scaling": ROPES[name], "rope_parameters": None}
        (made.path / "config.json").write_text(json.dumps(config))
    rope = huggingface.open_source(made.path, None).card.model.rope
    assert (rope.scaling, rope.factor, rope.base) == (name, ROPES[name]["factor"], 500.0)
    through(made.path, tmp_path)
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    real = torch.arange(made.rows.tokens_BT.shape[1]) < made.rows.lengths_B[:, None]
    logits = model(made.rows.tokens_BT).logits
    torch.testing.assert_close(logits[real], made.logits[real], rtol=1e-5, atol=1e-5)


def test_parts_lie_where_megatron_wants_them() -> None:
    """Known answers: gate above up; of a group its queries, its key, its value; Conv1D transposed."""
    model = Model(layers=1, hidden=4, heads=4, kv_heads=2, vocabulary=5, style="llama")
    gates = huggingface_names.fused(huggingface_names.LLAMA, model, "decoder.layers.0.mlp.linear_fc1.weight")
    parts = {f"model.layers.0.mlp.{name}_proj.weight": torch.full((2, 4), value) for name, value in
             (("gate", 1.0), ("up", 2.0))}  # fmt: skip
    assert gates.join((4, 4), parts.__getitem__)[:, 0].tolist() == [1, 1, 2, 2]
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    heads = {"q": [10, 11, 12, 13], "k": [20, 21], "v": [30, 31]}
    parts = {f"model.layers.0.self_attn.{part}_proj.weight": torch.tensor(values).float()[:, None].expand(-1, 4) for
             part, values in heads.items()}  # fmt: skip
    qkv = huggingface_names.fused(huggingface_names.LLAMA, model, name)
    assert qkv.join((8, 4), parts.__getitem__)[:, 0].tolist() == [10, 11, 20, 30, 12, 13, 21, 31]
    gpt = replace(model, kv_heads=0, heads=2, style="gpt")
    conv = huggingface_names.fused(huggingface_names.GPT2, gpt, name)
    stored = torch.tensor([[10, 11, 20, 21, 30, 31]]).float().expand(4, -1)
    joined = conv.join((6, 4), {"transformer.h.0.attn.c_attn.weight": stored}.__getitem__)
    assert joined[:, 0].tolist() == [10, 20, 30, 11, 21, 31]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an architecture": ("Llama", {"architectures": ["BloomForCausalLM"]}, "architectures: BloomForCausalLM is not one"),
    "another kind": ("Llama", {"model_type": "mistral"}, "model_type=mistral does not go with LlamaForCausalLM"),
    "an activation": ("GPT2", {"activation_function": "relu"}, "activation_function=relu is not one of gelu, gelu_new"),
    "scaled attention": ("GPT2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
    "unscaled attention": ("GPT2", {"scale_attn_weights": False}, "scale_attn_weights=false: only true"),
    "a gate": ("Llama", {"hidden_act": "gelu"}, "hidden_act=gelu is not one of silu"),
    "a window": ("Mistral", {"sliding_window": 16}, "sliding_window=16 is not supported"),
    "a window of some layers": ("Qwen2", {"use_sliding_window": True}, "use_sliding_window=true is not supported"),
    "a window by layer": ("Qwen2", {"layer_types": ["sliding_attention"]}, "only full_attention in every layer"),
    "biases of Llama": (
        "Llama",
        {"attention_bias": True},
        "attention_bias=true and mlp_bias=false: Megatron-Core's layers have both biases or neither",
    ),
    "a parallel residual": (
        "GPTNeoX",
        {"use_parallel_residual": True},
        "use_parallel_residual=true, as it is where the key is missing, adds attention and feed-forward block",
    ),
    "a parallel residual that is not said": ("GPTNeoX", {"use_parallel_residual": None}, "use_parallel_residual=true"),
    "GPT-NeoX without biases": ("GPTNeoX", {"attention_bias": False}, "attention_bias=false: only true can"),
    "two fractions": (
        "GPTNeoX",
        {"rotary_pct": 0.5, "partial_rotary_factor": 0.25},
        "rotary_pct=0.5 and partial_rotary_factor=0.25 disagree",
    ),
    "a fraction that is odd": (
        "GPTNeoX",
        {"rope_parameters": None, "rotary_pct": 0.4},
        "3 of the 8 numbers of a head turn (rope.fraction=0.4); it must be an even number above 0",
    ),
    "a fraction above the whole": (
        "GPTNeoX",
        {"rope_parameters": None, "rotary_pct": 2},
        "rope.fraction=2; it must be",
    ),
    "a fraction of Llama's": (
        "Llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "has partial_rotary_factor=0.5, which may change what the network computes",
    ),
    "a head that is not said": (
        "Llama",
        {"num_attention_heads": 7, "num_key_value_heads": 7, "head_dim": None},
        "7 heads",
    ),
    "a rope": (
        "Llama",
        {"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rope_type=dynamic",
    ),
    "a constant of yarn": (
        "Llama",
        {"rope_parameters": ROPES["yarn"] | {"beta_fast": 16}},
        "beta_fast=16: only the paper's 32",
    ),
    "a key": ("Llama", {"logit_cap": 30.0}, "has logit_cap=30.0, which may change what the network computes"),
    "code": ("Llama", {"auto_map": {"AutoModel": "evil.Model"}}, "auto_map names code of its own"),
    "quantised": ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config; convert the weights before"),
    "labels": (
        "Llama",
        {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3},
        "num_labels=3; a reward or value head has 1",
    ),
    "layers": ("Llama", {"num_hidden_layers": 10**9}, "layers=1000000000; it must be from 1 to"),
    "a number": ("Llama", {"hidden_size": "big"}, "hidden_size=big; it must be a whole number above 0"),
    "nothing": ("Llama", {"hidden_size": None}, "hidden_size is missing"),
    "heads": ("Llama", {"num_key_value_heads": 3}, "3 key-value heads do not divide"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder a family, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("folders")
    return {family: publish(folder / family, family).path for family in HEADS.values()}


def spoilt(source: Path, target: Path, **changes: Any) -> Path:
    """A copy of a folder with other settings; None takes one out."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None or key == "sliding_window"}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """By the name of the setting, in one sentence."""
    family, changes, sentence = REFUSED[name]
    with pytest.raises(BadInput) as refused:
        huggingface.open_source(spoilt(folders[family], tmp_path / "spoilt", **changes), None)
    assert sentence in str(refused.value) and "\n" not in str(refused.value)


def test_a_window_that_no_row_outgrows_is_none(folders: dict[str, Path], tmp_path: Path) -> None:
    """And a config of Mistral without the key has one, as transformers reads it."""
    folder = spoilt(folders["Mistral"], tmp_path / "wide", sliding_window=64)
    assert huggingface.open_source(folder, None).card.model.context == 64
    config = json.loads((folder / "config.json").read_text())
    del config["sliding_window"]
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8192}))
    with pytest.raises(BadInput, match="sliding_window=4096 is not supported"):
        huggingface.open_source(folder, None)


@pytest.mark.parametrize("head", ["policy", "reward"])
def test_a_head_is_not_made_up(head: str, tmp_path: Path) -> None:
    """A language model is no reward model and the other way round."""
    scalar = head == "reward"
    made = publish(tmp_path / "theirs", "Llama", head="ForSequenceClassification" if scalar else "ForCausalLM")
    sentence = "has no output layer" if scalar else "without a scalar head, which the role value ends in"
    with pytest.raises(BadInput, match=sentence):
        huggingface.open_source(made.path, "policy" if scalar else "value")


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Model(layers=1, hidden=8, heads=4, kv_heads=2, vocabulary=9), "gpt2 has no kv_heads=2"),
        (Model(layers=1, hidden=8, heads=4, head_dim=4, vocabulary=9), "gpt2 has no head_dim=4"),
        (Model(layers=1, hidden=8, heads=4, kv_heads=2, vocabulary=9, style="neox"), "gpt_neox has no kv_heads=2"),
        (Model(layers=1, hidden=8, heads=4, head_dim=4, vocabulary=9, style="neox"), "gpt_neox has no head_dim=4"),
        (
            Model(layers=1, hidden=8, heads=2, vocabulary=9, style="llama", rope=Rope(fraction=0.5)),
            "llama has no rope={'base': 10000.0",
        ),
        (Model(layers=1, hidden=8, heads=4, vocabulary=9, style="llama", tied=True, rope=Rope(scaling="odd")), "odd"),
    ],
)
def test_what_no_family_holds_is_not_written(model: Model, sentence: str, tmp_path: Path) -> None:
    """What was written is read back and compared before a tensor is asked for."""
    with pytest.raises(BadInput, match=sentence):
        huggingface.write(tmp_path / "back", huggingface.Card(model), iter(()), torch.float32)
    assert not any(tmp_path.iterdir())


def rewritten(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """The folder with its one file's tensors changed."""
    torch_file = pytest.importorskip("safetensors.torch")
    held = torch_file.load_file(folder / "model.safetensors")
    change(held)
    torch_file.save_file(held, folder / "model.safetensors")
    return folder


FAULTS: dict[str, tuple[str, Callable[[dict[str, Tensor]], object], str]] = {
    "a tensor is gone": (
        "Llama",
        lambda held: held.pop("model.layers.1.mlp.up_proj.weight"),
        r"decoder\.layers\.1\.mlp\.linear_fc1\.weight \(model\.layers\.1\.mlp\.up_proj\.weight\) is missing",
    ),
    "a tensor more": (
        "Llama",
        lambda held: held.update({"model.layers.4.mlp.up_proj.weight": torch.ones(2)}),
        r"model\.layers\.4\.mlp\.up_proj\.weight is left over",
    ),
    "a shape": (
        "GPT2",
        lambda held: held.update({"transformer.h.0.mlp.c_fc.weight": torch.ones(256, 64)}),
        r"h\.0\.mlp\.c_fc\.weight is \[256, 64\], config\.json asks for \[64, 256\]",
    ),
    "a vocabulary": (
        "Llama",
        lambda held: held.update({"lm_head.weight": torch.ones(VOCABULARY + 3, 64)}),
        r"lm_head\.weight is \[104, 64\], config\.json asks for \[101, 64\]",
    ),
    "a dtype": (
        "Llama",
        lambda held: held.update({"model.norm.weight": torch.ones(64).bfloat16()}),
        r"decoder\.final_layernorm\.weight is stored in bfloat16, the model's precision is fp32; write --dtype",
    ),
    "a tied head of its own": (
        "GPT2",
        lambda held: held.update({"lm_head.weight": held["transformer.wte.weight"] + 1}),
        r"lm_head\.weight differs from transformer\.wte\.weight; write tie_word_embeddings false",
    ),
    "a head that is not told": (
        "Mistral",
        lambda held: held.update({"score.weight": torch.ones(1, 64)}),
        r"score\.weight is left over",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tensors_that_do_not_fit_are_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Missing, left over, of another shape or dtype: nothing is written."""
    family, change, sentence = FAULTS[name]
    folder = rewritten(spoilt(folders[family], tmp_path / "spoilt"), change)
    with pytest.raises(BadInput, match=sentence):
        through(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["spoilt"]


def test_what_is_harmless_is_left(folders: dict[str, Path], tmp_path: Path) -> None:
    """GPT-2 as first published: names of the bare body, its masks, and the tied head once more."""

    def change(held: dict[str, Tensor]) -> None:
        for name in list(held):
            held[name.removeprefix("transformer.")] = held.pop(name)
        for layer in range(4):
            held[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            held[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
        held["lm_head.weight"] = held["wte.weight"].clone()

    folder = rewritten(spoilt(folders["GPT2"], tmp_path / "first"), change)
    through(folder, tmp_path)
    same(tensors(tmp_path / "back"), tensors(folders["GPT2"]))


def test_what_is_harmless_in_gpt_neox_is_left(folders: dict[str, Path], tmp_path: Path) -> None:
    """As first published: causal masks, the value behind them, and the frequencies; and a tied head once more."""

    def change(held: dict[str, Tensor]) -> None:
        for layer in range(4):
            where = f"gpt_neox.layers.{layer}.attention"
            held[f"{where}.bias"] = torch.ones(1, 1, 64, 64).tril()
            held[f"{where}.masked_bias"] = torch.tensor(-1e9)
            held[f"{where}.rotary_emb.inv_freq"] = torch.ones(1)

    folder = rewritten(spoilt(folders["GPTNeoX"], tmp_path / "first"), change)
    through(folder, tmp_path)
    same(tensors(tmp_path / "back"), tensors(folders["GPTNeoX"]))
    tied = rewritten(spoilt(folders["GPTNeoX"], tmp_path / "tied", tie_word_embeddings=True), lambda held: None)
    with pytest.raises(BadInput, match=r"embed_out\.weight differs from gpt_neox\.embed_in\.weight; write tie_word"):
        through(tied, tmp_path / "never")
    rewritten(tied, lambda held: held.update({"embed_out.weight": held["gpt_neox.embed_in.weight"].clone()}))
    assert huggingface.open_source(tied, None).leftover() == []


def test_old_pickles_are_read(folders: dict[str, Path], tmp_path: Path) -> None:
    """pytorch_model.bin, whole and with an index, without running what it pickles."""
    held = tensors(folders["Llama"])
    for count in (1, 2):
        folder = spoilt(folders["Llama"], tmp_path / f"old{count}")
        (folder / "model.safetensors").unlink()
        names = list(held)
        if count == 1:
            torch.save(held, folder / "pytorch_model.bin")
        else:
            halves = {f"pytorch_model-{number}.bin": names[number::2] for number in range(2)}
            for file, part in halves.items():
                torch.save({name: held[name] for name in part}, folder / file)
            index = {name: file for file, part in halves.items() for name in part}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))
        through(folder, tmp_path / f"{count}")
        same(tensors(tmp_path / f"{count}" / "back"), held)


def test_an_index_leads_nowhere_else(tmp_path: Path) -> None:
    """A name outside the folder, a file that is not there, a tensor in two files, a tensor elsewhere."""
    made = publish(tmp_path / "theirs", "Llama", shards=4)
    where = made.path / "model.safetensors.index.json"
    index = json.loads(where.read_text())
    first = sorted(set(index["weight_map"].values()))[0]
    for name, sentence in (
        ("../theirs/" + first, "it must be a .safetensors file of its own folder"),
        (str(made.path / first), "it must be a .safetensors file of its own folder"),
        ("model-9.safetensors", "names model-9.safetensors, which is not there"),
    ):
        moved = {tensor: name if file == first else file for tensor, file in index["weight_map"].items()}
        where.write_text(json.dumps({"weight_map": moved}))
        with pytest.raises(BadInput, match=sentence):
            huggingface.open_source(made.path, None)
    swapped = dict(index["weight_map"])
    tensor = next(name for name, file in swapped.items() if file == first)
    swapped[tensor] = sorted(set(swapped.values()))[1]
    where.write_text(json.dumps({"weight_map": swapped}))
    with pytest.raises(BadInput, match=f"the index says that {tensor} is in"):
        huggingface.open_source(made.path, None)
    shutil.copy(made.path / first, made.path / "model-copy.safetensors")
    where.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "model-copy.safetensors"}}))
    with pytest.raises(BadInput, match="and again in"):
        huggingface.open_source(made.path, None)


def test_a_folder_without_weights_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    """No files, no config, a config that is none."""
    folder = spoilt(folders["Llama"], tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BadInput, match="holds no weights: neither"):
        huggingface.open_source(folder, None)
    for text in ("{", "[]", "[" * 100_000):
        (folder / "config.json").write_text(text)
        with pytest.raises(BadInput, match="is no JSON"):
            huggingface.open_source(folder, None)
    (folder / "config.json").unlink()
    with pytest.raises(BadInput, match="config.json cannot be read: No such file"):
        huggingface.open_source(folder, None)
