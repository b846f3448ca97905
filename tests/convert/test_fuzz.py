"""Proves that damaged and hostile safetensors, archives, manifests, GGUF, Megatron's and Hugging Face's files are read
or refused in one sentence: no crash, no hang, no file elsewhere, no memory of a size that a header claims.

Not proved here: that what is read is what was written (test_run and its neighbours).
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from megatron_rlhf.checkpoint import manifest
from megatron_rlhf.config.schema import Model
from megatron_rlhf.convert import archive, gguf, huggingface, megatron, nemo, weights
from megatron_rlhf.convert.gguf_file import GgufFile
from megatron_rlhf.convert.huggingface_files import Folder
from megatron_rlhf.convert.logical import Card, Source
from megatron_rlhf.convert.safetensors_file import SafetensorsFile
from tests.helpers import checkpoints as tiny
from tests.helpers import gguf as made
from tests.helpers import guard
from tests.helpers.damage import NUMBERS, changed, damaged, json_bytes, tar_bytes

Files = dict[str, bytes]
MODEL = Model(style="llama", layers=1, hidden=8, heads=2, kv_heads=1, ffn=16, vocabulary=64, context=64, tied=False)


def whole(source: Source) -> None:
    """All that a conversion asks for."""
    lacking, _ = source.missing(), source.leftover()
    for name in [] if lacking else source.card.shapes():
        source.read(name)


def contents(folder: Path) -> Files:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder: Path, files: Files) -> None:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """One tiny model in every format, each read whole as it is."""
    folder = tmp_path_factory.mktemp("bases")
    card = Card(MODEL, "policy", {"tokenizer.model": tiny.pieces(64)})
    found = tiny.tensors(card)
    for name, module in (("safetensors", huggingface), ("weights", weights), ("megatron", megatron)):
        module.write(folder / name, card, tiny.stream(found), torch.float32)  # type: ignore[attr-defined]
        whole(module.open_source(folder / name))  # type: ignore[attr-defined]
    for name, layout in (("nemo", ""), ("nemo distributed", "tp1")):
        nemo.write(folder / f"{name}.tar", card, tiny.stream(found), torch.float32, layout=layout)
        (folder / name).mkdir()
        archive.unpack(folder / f"{name}.tar", folder / name)
        whole(nemo.open_source(folder / name))
    bases = {path.name: contents(path) for path in folder.iterdir() if path.is_dir()}
    files = Folder(folder / "safetensors")
    torch.save({name: files.read(name) for name in files.names()}, folder / "pytorch_model.bin")
    bases["pickle"] = {name: data for name, data in bases["safetensors"].items() if not name.endswith("safetensors")}
    bases["pickle"]["pytorch_model.bin"] = (folder / "pytorch_model.bin").read_bytes()
    put(folder / "pickle", bases["pickle"])
    whole(huggingface.open_source(folder / "pickle"))
    return bases


def safetensors(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """A header of two tensors, and now and then that of a model."""
    header: object = {
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "__metadata__": {"format": "pt"},
    }
    files, rest = bases["safetensors"], bytes(32)
    model = chance.random() < 0.3
    if model:
        data = files["model.safetensors"]
        size = 8 + int.from_bytes(data[:8], "little")
        header, rest = json.loads(data[8:size]), data[size:]
    text = json_bytes(changed(header, chance), chance)
    length = chance.choice(NUMBERS) % 2**64 if chance.random() < 0.1 else len(text)
    data = length.to_bytes(8, "little") + text + rest
    data = damaged(data, chance) if chance.random() < 0.2 else data
    put(folder, {**(files if model else {}), "model.safetensors": data})
    if model:
        return lambda: whole(huggingface.open_source(folder))

    def read() -> None:
        file = SafetensorsFile(folder / "model.safetensors")
        for name in file.tensors:
            file.read(name)

    return read


def hugging_face(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """The config, the index of shards, the tokenizer's settings, or a pickle."""
    files = dict(bases[chance.choice(("safetensors", "pickle"))])
    name = chance.choice(("config.json", "config.json", "pytorch_model.bin", "index", *files))
    if name == "index" and "model.safetensors" in files:
        header = json.loads(files["model.safetensors"][8:].split(b"}}")[0].rstrip() + b"}}")
        index = {"metadata": {}, "weight_map": {tensor: "model-1.safetensors" for tensor in header}}
        files["model-1.safetensors"] = files.pop("model.safetensors")
        files["model.safetensors.index.json"] = json_bytes(changed(index, chance), chance)
    elif name.endswith(".json"):
        files[name] = json_bytes(changed(json.loads(files[name]), chance, 1), chance)
    elif name in files:
        files[name] = damaged(files[name], chance)
    put(folder, files)
    role = chance.choice((None, None, "reward", "value"))
    return lambda: whole(huggingface.open_source(folder, role))


def tar(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """An archive of four members, or of that packed."""
    members = {"config.yaml": b"a: 1\n", "inner/common.pt": b"x" * 700, "b" * 120 + "/c": b"", "d": b"e" * 512}
    data = tar_bytes(members, chance)
    if chance.random() < 0.3:
        data = gzip.compress(data, 1)
        data = damaged(data, chance) if chance.random() < 0.5 else data
    (folder / "a.nemo").write_bytes(data)
    (folder / "target").mkdir()
    (folder / "beside").mkdir()

    def read() -> None:
        try:
            archive.unpack(folder / "a.nemo", folder / "target")
        finally:
            assert {path.name for path in folder.iterdir()} == {"a.nemo", "target", "beside"}
            assert not list((folder / "beside").iterdir())
            assert not [path for path in folder.rglob("*") if path.is_symlink()]

    return read


def nemo_archive(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """An archive with another config, or with a damaged member, or one already unpacked."""
    files = dict(bases[chance.choice(("nemo", "nemo distributed"))])
    name = chance.choice(list(files))
    if chance.random() < 0.6:
        name = "model_config.yaml"
        tree = changed(yaml.safe_load(files[name]), chance, 2)
        files[name] = yaml.safe_dump(tree, allow_unicode=chance.random() < 0.5).encode("utf-8", "replace")
    if name != "model_config.yaml" or chance.random() < 0.2:
        files[name] = damaged(files[name], chance)
    path = folder / "a.nemo"
    if chance.random() < 0.5:
        put(path, files)
    else:
        path.write_bytes(tar_bytes(files, chance))

    def read() -> None:
        source = nemo.open_source(path)
        try:
            whole(source)
        finally:
            if source._unpacked:  # type: ignore[attr-defined]
                source._unpacked.cleanup()  # type: ignore[attr-defined]

    return read


def manifests(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """A manifest of weights, mostly with a seal that fits it, or a damaged file of them."""
    files = dict(bases["weights"])
    facts = json.loads(files[manifest.FILE])
    if chance.random() < 0.85:
        facts = changed(facts, chance)
        if isinstance(facts, dict) and chance.random() < 0.9:
            facts.pop("seal", None)
            facts["seal"] = manifest._seal(facts)
        files[manifest.FILE] = json_bytes(facts, chance)
    else:
        name = chance.choice(list(files))
        files[name] = damaged(files[name], chance)
    put(folder, files)

    def read() -> None:
        found = manifest.manifest(folder)
        manifest.check(found, folder, vocabulary=64, head=False)
        whole(weights.open_source(folder))

    return read


def megatron_folder(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """Any file of a distributed checkpoint."""
    files = dict(bases["megatron"])
    name = chance.choice(list(files))
    if name.endswith(".json"):
        files[name] = json_bytes(changed(json.loads(files[name]), chance), chance)
    else:
        files[name] = damaged(files[name], chance, 2)
    put(folder, files)
    return lambda: whole(megatron.open_source(folder))


def gguf_file(bases: dict[str, Files], folder: Path, chance: random.Random) -> guard.Load:
    """A header with rows by chance, and its bytes damaged."""
    metadata = {"general.architecture": "llama", "general.alignment": 32, "llama.block_count": 1, "x": [[1, 2], [3]]}
    metadata |= {"tokenizer.ggml.tokens": ["a", "b"], "f": 0.5}
    rows = [made.row("x", (2, 3), 0, 0), made.row("y", (32,), 3, 32)]
    if chance.random() < 0.3:
        shape = tuple(chance.choice((0, 1, 32, 2**40, 2**63)) for _ in range(chance.randrange(6)))
        rows.append(made.row(chance.choice(("x", "z", "")), shape, chance.randrange(40), chance.choice((64, 1, 2**63))))
    head = made.header(metadata, rows)
    data = head + bytes(-len(head) % 32) + bytes(64)
    (folder / "a.gguf").write_bytes(damaged(data, chance, 2) if chance.random() < 0.9 else data)

    def read() -> None:
        file = GgufFile(folder / "a.gguf")
        for name in file.tensors:
            file.read(name)
        if chance.random() < 0.5:
            gguf.open_source(folder / "a.gguf")

    return read


Kind = Callable[[dict[str, Files], Path, random.Random], guard.Load]
COUNTS: dict[Kind, tuple[int, int]] = {
    safetensors: (150, 2000),
    hugging_face: (60, 600),
    tar: (100, 2000),
    nemo_archive: (10, 400),
    manifests: (40, 1000),
    megatron_folder: (30, 300),
    gguf_file: (60, 600),
}
"""Cases of `make test`, and in all."""


@pytest.mark.parametrize(
    ("kind", "numbers"),
    [
        pytest.param(kind, numbers, id=f"{kind.__name__}-{len(numbers)}", marks=marks)
        for kind, (few, all_) in COUNTS.items()
        for numbers, marks in ((range(few), ()), (range(few, all_), (pytest.mark.slow,)))
    ],
)
def test_damage_is_read_or_refused(kind: Kind, numbers: range, bases: dict[str, Files], tmp_path: Path) -> None:
    """And of many cases some are read and some are not, so that both ways are walked."""
    found = guard.each(kind.__name__, lambda folder, chance: kind(bases, folder, chance), numbers, tmp_path)
    assert found["refused"] and (found["read"] or len(numbers) < 200), found
