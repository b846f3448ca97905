"""Proves that `.nemo` archives are read and written without NeMo: config, tokenizer and every bit of the weights, in
each of the forms that NeMo has them in; that NeMo's own code reads what is written, where it is installed; and that a
hostile archive is refused in one sentence with nothing written outside and nothing run.

Not proved here: archives of NeMo's GPT collection itself, which NeMo 3 no longer has; theirs are imitated by renaming.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert import archive, megatron, megatron_args, nemo, nemo_config
from megatron_rlhf.convert.logical import Card
from megatron_rlhf.data.tokenizer import Tokenizer
from megatron_rlhf.models.names import Split
from megatron_rlhf.observe import nemo as adapter
from megatron_rlhf.reshard import layout as places
from tests.helpers import checkpoints as tiny

ROOT = Path(__file__).parents[2]
GPT, LLAMA = tiny.GPT, tiny.LLAMA


def written(path: Path, card: Card, found: dict[str, Tensor], layout: str = "") -> Path:
    """An archive of ours."""
    nemo.write(path, card, tiny.stream(found), next(iter(found.values())).dtype, layout=layout)
    return path


@pytest.mark.parametrize(
    ("model", "role", "layout", "dtype"),
    [
        (GPT, "policy", "", torch.float32),
        (LLAMA, "value", "tp2 pp2", torch.bfloat16),
        (replace(LLAMA, tied=True, rope=Rope(scaling="llama3", factor=8.0)), "reward", "", torch.float16),
        (
            replace(LLAMA, rope=Rope(base=5e5, scaling="linear", factor=2.0), norm_epsilon=1e-6),
            "policy",
            "tp4",
            torch.float32,
        ),
        (replace(LLAMA, qkv_bias=True), "policy", "", torch.float32),
        (replace(LLAMA, linear_bias=True, head_dim=6), "policy", "tp2", torch.float32),
        (replace(tiny.NEOX, activation="gelu_tanh"), "policy", "tp2 pp2", torch.float32),
    ],
)
def test_there_and_back(model: Model, role: str, layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Architecture, role, tokenizer and every bit; nothing stays beside the archive, and it is a plain tar."""
    precision = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    card = Card(replace(model, precision=precision), role, {"tokenizer.model": tiny.pieces(), "vocab.json": b"{}"})
    expected = tiny.tensors(card, dtype=dtype)
    written(tmp_path / "a.nemo", card, expected, layout)
    assert [file.name for file in tmp_path.iterdir()] == ["a.nemo"]
    source = nemo.open_source(tmp_path / "a.nemo")
    assert tiny.same(tiny.everything(source), expected)
    assert megatron_args.normal(source.card.model) == megatron_args.normal(card.model)
    assert (source.card.role, source.card.tokenizer) == (role, card.tokenizer)
    assert tarfile.is_tarfile(tmp_path / "a.nemo")


def repacked(source: Path, target: Path, change: Callable[[Path], None], mode: str = "w") -> Path:
    """The archive after `change` was made to the folder of its files; packed by tarfile, as NeMo does."""
    folder = target.with_suffix(".files")
    folder.mkdir()
    with tarfile.open(source) as packed:
        packed.extractall(folder, filter="data")
    change(folder)
    with tarfile.open(target, mode) as packed:  # type: ignore[call-overload]
        packed.add(folder, arcname="./")
    return target


def edited(folder: Path, **changes: Any) -> dict[str, Any]:
    """Change settings of the config in `folder`; None takes one out."""
    file = folder / nemo.CONFIG
    config = {**yaml.safe_load(file.read_text()), **changes}
    file.write_text(yaml.safe_dump({name: value for name, value in config.items() if value is not None}))
    return config


def in_old_names(folder: Path) -> None:
    """mcore_gpt: false, with the gate and the up projection apart."""
    weights = torch.load(folder / "model_weights.ckpt")
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        plain = name.removeprefix("model.").replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
        plain = tiny.old_name(plain.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."))
        plain = plain.replace("input_norm", "input_layernorm").replace(
            "post_attention_norm", "post_attention_layernorm"
        )
        plain = f"model.language_model.{plain.replace('final_norm', 'final_layernorm')}"
        if "dense_h_to_4h" in plain:
            found[plain], up = (part.clone() for part in tensor.chunk(2))
            found[plain.replace("dense_h_to_4h", "dense_h_to_4h_2")] = up
        else:
            found[plain] = tensor
    found["model.language_model.rotary_pos_emb.inv_freq"] = torch.ones(4)
    torch.save(found, folder / "model_weights.ckpt")
    edited(folder, mcore_gpt=False, activation="swiglu", megatron_rlhf=None)


def as_ranks(folder: Path) -> None:
    """A folder a rank of tp2 pp2 in place of the one file, with the prefix of O2."""
    weights = torch.load(folder / "model_weights.ckpt")
    (folder / "model_weights.ckpt").unlink()
    specs = {spec.name: spec for spec in places.specs(replace(LLAMA, vocabulary=102), 102)}
    for rank in range(4):
        tp, pp = rank % 2, rank // 2
        held = {}
        for name, tensor in weights.items():
            plain, half = megatron.megatron_names.logical(name)
            assert not half
            spec = specs[plain]
            if spec.layer < 0 and (spec.place is places.Place.EMBEDDING) != (pp == 0):
                continue
            if spec.layer >= 0 and spec.layer // 2 != pp:
                continue
            part = Split(spec.dim, spec.blocks).part(tensor, 2, tp).clone()
            local = name.replace(f"layers.{spec.layer}.", f"layers.{spec.layer % 2}.")
            held[local.replace("model.", "model.module.", 1)] = part
        inner = folder / f"tp_rank_{tp:02d}_pp_rank_{pp:03d}"
        inner.mkdir()
        torch.save(held, inner / "model_weights.ckpt")


def as_distributed(folder: Path) -> None:
    """A distributed checkpoint in place of the one file, as NeMo's Megatron-Core models have it."""
    weights = torch.load(folder / "model_weights.ckpt")
    (folder / "model_weights.ckpt").unlink()
    (folder / nemo.WEIGHTS).mkdir()
    named = {megatron.megatron_names.logical(name)[0]: tensor for name, tensor in weights.items()}
    card = Card(LLAMA)
    ordered = {name: named[name] for name in card.shapes()}
    megatron.save(folder / nemo.WEIGHTS, card, tiny.stream(ordered), tp=2, prefix="model.")


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        (lambda folder: None, "w:gz"),
        (in_old_names, "w"),
        (as_ranks, "w"),
        (as_distributed, "w:gz"),
        (
            lambda folder: edited(folder, layernorm_epsilon="1e-5", max_position_embeddings="${.encoder_seq_length}"),
            "w",
        ),
    ],
)
def test_every_form_that_nemo_has_is_read(change: Callable[[Path], None], mode: str, tmp_path: Path) -> None:
    """Compressed, of before Megatron-Core, a folder a rank, a distributed checkpoint inside, numbers as text."""
    model = replace(LLAMA, vocabulary=102) if change is as_ranks else LLAMA
    card = Card(model, tokenizer={"tokenizer.model": b"unreadable"})
    expected = tiny.tensors(card)
    plain = written(tmp_path / "plain.nemo", card, expected)
    source = nemo.open_source(repacked(plain, tmp_path / "other.nemo", change, mode))
    assert tiny.same(tiny.everything(source), expected)
    assert source.card.tokenizer == card.tokenizer
    unpacked = nemo.open_source(tmp_path / "other.files")
    assert tiny.same(tiny.everything(unpacked), expected)


def test_the_vocabulary_is_the_tokenizers(tmp_path: Path) -> None:
    """NeMo's configs do not say it; rows beyond the tokenizer's tokens are padding."""
    model = replace(GPT, vocabulary=128)
    data = tiny.pieces(100)
    card = Card(model, tokenizer={"tokenizer.model": data})
    plain = written(tmp_path / "plain.nemo", card, tiny.tensors(card))
    source = nemo.open_source(
        repacked(plain, tmp_path / "b.nemo", lambda f: edited(f, override_vocab_size=None) and None)
    )
    (tmp_path / "tokenizer.model").write_bytes(data)
    tokens = Tokenizer.load(tmp_path).vocabulary
    assert source.card.model.vocabulary == tokens < 128
    assert len(source.read("embedding.word_embeddings.weight")) == tokens


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"normalization": "layernorm1p"}, "normalization=layernorm1p is not one of layernorm"),
        ({"activation": "reglu"}, "activation=reglu is not one of gelu"),
        ({"transformer_block_type": "post_ln"}, "transformer_block_type=post_ln is a network that is not known"),
        ({"num_moe_experts": 8}, "num_experts=8"),
        ({"rotary_percentage": 1.5}, "rotary_percent is 1.5; it must be above 0 and at most 1"),
        ({"rotary_percentage": 0.3}, "1 of the 4 numbers of a head turn (rope.fraction=0.3)"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"tokenizer": {"model": "nemo:../../etc/passwd"}, "megatron_rlhf": None}, "which the archive does not hold"),
        ({"megatron_rlhf": {"files": {"tokenizer.model": "nemo:gone"}}}, "which the archive does not hold"),
    ],
)
def test_another_network_is_refused_by_name(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.nemo", Card(LLAMA), tiny.tensors(Card(LLAMA)))
    other = repacked(plain, tmp_path / "other.nemo", lambda folder: edited(folder, **change) and None)
    assert said in tiny.refused(nemo.open_source, other)


def test_nemos_own_words_are_written() -> None:
    """Those that its models look for, some of which Megatron-LM calls otherwise."""
    said = nemo_config.config_of(replace(LLAMA, qkv_bias=True, head_dim=8, rope=Rope(fraction=0.5)))
    assert (said["qkv_bias"], said["rotary_percentage"], said["kv_channels"]) == (True, 0.5, 8)
    assert not {"add_qkv_bias", "rotary_percent"} & said.keys()
    said = nemo_config.config_of(tiny.NEOX)
    assert (said["normalization"], said["activation"], said["bias"]) == ("layernorm", "gelu", True)
    assert (said["position_embedding_type"], said["rotary_percentage"], said["qkv_bias"]) == ("rope", 0.5, False)


def test_what_nemos_config_cannot_say_is_refused() -> None:
    rope = Rope(scaling="yarn", factor=4.0)
    assert "NeMo has no rope.scaling=yarn" in tiny.refused(nemo_config.config_of, replace(LLAMA, rope=rope))


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    found = tiny.tensors(Card(GPT))

    with pytest.raises(OSError, match="planted"):
        nemo.write(tmp_path / "a.nemo", Card(GPT), tiny.interrupted(found), torch.float32)
    assert list(tmp_path.iterdir()) == []
    written(tmp_path / "a.nemo", Card(GPT), found)
    said = tiny.refused(nemo.write, tmp_path / "a.nemo", Card(GPT), tiny.stream(found), torch.float32)
    assert "is there already" in said


def member(name: str, data: bytes = b"", **settings: Any) -> tuple[tarfile.TarInfo, bytes]:
    """A member of a tar with any header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in settings.items():
        setattr(info, key, value)
    return info, data


def packed(path: Path, *members: tuple[tarfile.TarInfo, bytes], compressed: bool = False) -> Path:
    """An archive of these members, sizes as their headers say."""
    stream = io.BytesIO()
    for info, data in members:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.write(data + bytes(-len(data) % 512))
    content = stream.getvalue() + bytes(1024)
    path.write_bytes(gzip.compress(content) if compressed else content)
    return path


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (member("../outside", b"x"), "a name that leaves the folder"),
        (member("a/../../outside", b"x"), "a name that leaves the folder"),
        (member("/tmp/outside", b"x"), "a name that leaves the folder"),
        (member("..\\outside", b"x"), "a name that leaves the folder"),
        (member("link", type=tarfile.SYMTYPE, linkname="/etc"), "is a link, a device or a sparse file"),
        (member("link", type=tarfile.LNKTYPE, linkname="../outside"), "is a link, a device or a sparse file"),
        (member("null", type=tarfile.CHRTYPE, devmajor=1, devminor=3), "is a link, a device or a sparse file"),
        (member("pipe", type=tarfile.FIFOTYPE), "is a link, a device or a sparse file"),
        (member("huge", size=1 << 50), "more than it holds"),
        (member("model_config.yaml", b"x"), "twice, or without a name"),
        (member("huge", type=tarfile.GNUTYPE_LONGNAME, size=1 << 40), "is no tar archive that can be read"),
        (member("huge", type=tarfile.XHDTYPE, size=1 << 34), "is no tar archive that can be read"),
    ],
)
def test_a_hostile_archive_writes_nothing(
    bad: tuple[tarfile.TarInfo, bytes], said: str, compressed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that leave the folder, links, devices, sizes: refused before the first file is written anywhere."""
    room = tmp_path / "a" / "b" / "room"
    room.mkdir(parents=True)
    monkeypatch.setattr("tempfile.tempdir", str(room))
    path = packed(tmp_path / "a.nemo", member("model_config.yaml", b"{}"), bad, compressed=compressed)
    before = sorted(tmp_path.rglob("*"))
    assert said in tiny.refused(nemo.open_source, path)
    assert sorted(tmp_path.rglob("*")) == before and not Path("/tmp/outside").exists()
    assert said in tiny.refused(archive.unpack, path, room)
    assert list(room.iterdir()) == []


def test_a_link_is_never_written_through(tmp_path: Path) -> None:
    """A member where a link lies already is refused by the file system."""
    target = tmp_path / "room"
    target.mkdir()
    (target / "model_config.yaml").symlink_to(tmp_path / "outside")
    path = packed(tmp_path / "a.nemo", member("model_config.yaml", b"x"))
    tiny.refused(archive.unpack, path, target)
    assert not (tmp_path / "outside").exists()


def test_nothing_of_a_hostile_archive_is_run(tmp_path: Path) -> None:
    """os.system in the weights, Python tags in the YAML; archives cut short, and what is no archive."""
    victim = tmp_path / "bitten"
    plain = written(tmp_path / "plain.nemo", Card(GPT), tiny.tensors(Card(GPT)))

    def bite_weights(folder: Path) -> None:
        torch.save({"model.a": tiny.Bite(victim)}, folder / "model_weights.ckpt")

    def bite_config(folder: Path) -> None:
        (folder / nemo.CONFIG).write_text(f'a: !!python/object/apply:os.system ["touch {victim}"]')

    said = tiny.refused(nemo.open_source, repacked(plain, tmp_path / "w.nemo", bite_weights))
    assert "asks for posix.system, which no weights need" in said
    said = tiny.refused(nemo.open_source, repacked(plain, tmp_path / "c.nemo", bite_config))
    assert "model_config.yaml is no plain YAML" in said
    for text in ("", "[]", "a: [", "x" * (1 << 24) + "y"):
        other = packed(tmp_path / "t.nemo", member(nemo.CONFIG, text.encode()))
        tiny.refused(nemo.open_source, other)
    whole = plain.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", os.urandom(4096), b"\x1f\x8b" + whole[:4096], bytes(2048)):
        (tmp_path / "d.nemo").write_bytes(damage)
        tiny.refused(nemo.open_source, tmp_path / "d.nemo")
    assert "is not there" in tiny.refused(nemo.open_source, tmp_path / "nowhere.nemo")
    assert not victim.exists()


@pytest.mark.skipif(not adapter.installed(), reason="the extra nemo (nemo-toolkit) is not installed")
class TestWithNeMo:
    def test_nemo_reads_config_tokenizer_and_weights(self, tmp_path: Path) -> None:
        """NeMo's own connector restores a model from the archive: its config, artifact and state, strictly."""
        from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer
        from nemo.core.classes import ModelPT
        from nemo.core.connectors.save_restore_connector import SaveRestoreConnector

        (tmp_path / "tokenizer.model").write_bytes(tiny.pieces())
        tokenizer = Tokenizer.load(tmp_path)
        model = replace(LLAMA, vocabulary=tokenizer.vocabulary)
        card = Card(model, tokenizer={"tokenizer.model": (tmp_path / "tokenizer.model").read_bytes()})
        expected = tiny.tensors(card)
        path = str(written(tmp_path / "a.nemo", card, expected))
        connector = SaveRestoreConnector()

        config = connector.restore_from(ModelPT, path, return_config=True)
        assert (config.num_layers, config.hidden_size, config.mcore_gpt) == (4, 32, True)
        assert config.tokenizer.library == "sentencepiece"

        state = connector.extract_state_dict_from(path, str(tmp_path / "state"))
        fused = {megatron.megatron_names.logical(name)[0]: tensor for name, tensor in state.items()}
        assert all(name.startswith("model.decoder.layers.") for name in state if ".layers." in name)
        assert tiny.same({name: fused[name] for name in expected}, expected) and len(fused) == len(expected)

        class Reader(ModelPT):
            """A model of any tensors, as NeMo's are restored."""

            def __init__(self, cfg: Any, trainer: Any = None) -> None:
                super().__init__(cfg=cfg, trainer=trainer)
                self.tokenizer = SentencePieceTokenizer(self.register_artifact("tokenizer.model", cfg.tokenizer.model))
                for name, tensor in state.items():
                    place: torch.nn.Module = self
                    *way, leaf = name.split(".")
                    for part in way:
                        if not hasattr(place, part):
                            place.add_module(part, torch.nn.Module())
                        place = getattr(place, part)
                    place.register_parameter(leaf, torch.nn.Parameter(torch.zeros_like(tensor)))

            def setup_training_data(self, train_data_config: Any) -> None: ...

            def setup_validation_data(self, val_data_config: Any) -> None: ...

            @classmethod
            def list_available_models(cls) -> None: ...

        restored = connector.restore_from(Reader, path, strict=True)
        assert tiny.same({n: t.detach() for n, t in restored.named_parameters()}, state)
        text = "the quick brown fox"
        assert restored.tokenizer.text_to_ids(text) == tokenizer.encode(text)

    def test_nemos_sentence_pieces_are_a_tokenizer_here(self, tmp_path: Path) -> None:
        """Through the adapter, NeMo's class gives our Tokenizer the same ids, texts and end as ours."""
        (tmp_path / "tokenizer.model").write_bytes(tiny.pieces())
        ours = Tokenizer.load(tmp_path)
        theirs = Tokenizer(adapter.NemoPieces(tmp_path / "tokenizer.model"), tmp_path / "tokenizer.model", {})
        texts = ["the quick brown fox", "", "a  b\n\nc", "dozen </s> jugs"]
        assert theirs.encode_all(texts) == ours.encode_all(texts)
        assert [theirs.decode(ids) for ids in ours.encode_all(texts)] == [
            ours.decode(i) for i in ours.encode_all(texts)
        ]
        assert (theirs.vocabulary, theirs.end, theirs.newline) == (ours.vocabulary, ours.end, ours.newline)

    def test_the_experiment_manager_has_the_folder_and_the_loggers(self, tmp_path: Path) -> None:
        """exp_manager chooses the folder and opens the loggers; a run's numbers go to them."""
        experiment = adapter.Experiment(tmp_path, "ppo", version="first")
        experiment.scalars("ppo", 3, {"kl": 0.5, "score": float("nan"), "text": "x"})
        experiment.close()
        assert experiment.directory == tmp_path / "ppo" / "first"
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        found = EventAccumulator(str(experiment.directory))
        found.Reload()
        assert [(event.step, event.value) for event in found.Scalars("ppo/kl")] == [(3, 0.5)]
        assert "ppo/score" not in found.Tags()["scalars"]


def test_without_nemo_the_adapter_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adapter, "installed", lambda: False)
    assert "pip install 'megatron-rlhf[nemo]'" in tiny.refused(adapter.NemoPieces, tmp_path)
    assert "pip install 'megatron-rlhf[nemo]'" in tiny.refused(adapter.Experiment, tmp_path, "ppo")


def test_the_tool_converts_and_refuses_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tools/convert.py from NeMo to Megatron by a YAML of the model, and back."""
    plain = written(tmp_path / "a.nemo", Card(LLAMA), tiny.tensors(Card(LLAMA)))
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(asdict(LLAMA)))
    spec = importlib.util.spec_from_file_location("convert_tool", ROOT / "tools" / "convert.py")
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)

    there = ["--from", "nemo", "--to", "megatron", str(plain), f"{tmp_path}/m", "--layout", "tp2 pp2"]
    assert tool.main([*there, "--model", f"{tmp_path}/model.yaml"]) == 0
    assert (
        tool.main(["--from", "megatron", "--to", "nemo", f"{tmp_path}/m", f"{tmp_path}/b.nemo", "--dtype", "bf16"]) == 0
    )
    assert "a policy model of 27 tensors in bf16, 9" in capsys.readouterr().out
    assert nemo.open_source(tmp_path / "b.nemo").card.model.precision == "bf16"
    assert tool.main(["--from", "megatron", "--to", "nemo", str(tmp_path), f"{tmp_path}/c.nemo"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no Megatron checkpoint" in said and not (tmp_path / "c.nemo").exists()
    assert tool.main(["--from", "weights", "--to", "nemo", "a", "b", "--model", "c"]) == 2
    assert "--model is for megatron and nemo" in capsys.readouterr().err
