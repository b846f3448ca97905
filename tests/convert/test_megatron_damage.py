"""Proves that a damaged or hostile distributed checkpoint is refused in one sentence before anything of it is run, and
that a write that fails leaves nothing.

Not proved here: damage of every kind (test_fuzz.py has thousands by chance).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlhf.convert import megatron, megatron_args
from megatron_rlhf.convert.logical import Card
from tests.helpers import checkpoints as tiny

GPT, LLAMA, NEOX = tiny.GPT, tiny.LLAMA, tiny.NEOX


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """Neither a folder nor a part of one; and what is there already is not written over."""
    found = tiny.tensors(Card(GPT))

    with pytest.raises(OSError, match="planted"):
        megatron.write(tmp_path / "out", Card(GPT), tiny.interrupted(found), torch.float32)
    assert list(tmp_path.iterdir()) == []
    tiny.megatron_folder(tmp_path / "out", Card(GPT), found)
    assert "is there already" in tiny.refused(
        megatron.write, tmp_path / "out", Card(GPT), tiny.stream(found), torch.float32
    )


def test_nothing_of_a_hostile_checkpoint_is_run(tmp_path: Path) -> None:
    """os.system in the metadata, in the settings and in a piece: one sentence each, and no command was run."""
    victim = tmp_path / "bitten"
    bite = tiny.Bite(victim)
    folder = tiny.megatron_folder(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)))
    whole = {file.name: file.read_bytes() for file in folder.iterdir()}

    (folder / ".metadata").write_bytes(pickle.dumps(bite))
    assert "asks for posix.system, which no metadata has" in tiny.refused(megatron.open_source, folder)
    for protocol in (0, 2, 4):
        (folder / ".metadata").write_bytes(pickle.dumps({"a": bite}, protocol=protocol))
        tiny.refused(megatron.open_source, folder)
    (folder / ".metadata").write_bytes(whole[".metadata"])

    torch.save({"args": bite}, folder / "common.pt")
    assert "asks for posix.system, which no weights need" in tiny.refused(megatron.open_source, folder)
    (folder / "common.pt").write_bytes(whole["common.pt"])

    stored = megatron.dist_metadata.tensors(folder)["decoder.final_layernorm.weight"].pieces[0]
    evil = io.BytesIO()
    torch.save(bite, evil)
    data = bytearray(whole[stored.file])
    data[stored.start : stored.start + stored.length] = evil.getvalue().ljust(stored.length, b"\0")
    (folder / stored.file).write_bytes(data)
    source = megatron.open_source(folder)
    assert "is no file of torch.save" in tiny.refused(source.read, "decoder.final_layernorm.weight")
    assert not victim.exists()


class Other:
    """A class of Megatron's in someone's args."""

    __module__ = "megatron.training.enums"
    __qualname__ = __name__ = "Other"


def test_classes_of_megatron_in_the_settings_are_not_needed(tmp_path: Path) -> None:
    """Args hold enumerations of Megatron; they are read as stand-ins, where Megatron-LM is not installed too."""
    folder = tiny.megatron_folder(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)))
    args = argparse.Namespace(**megatron_args.args_of(GPT, 128), params_dtype=torch.bfloat16)
    data = pickle.dumps({"args": args}, protocol=2)
    # one more entry in the Namespace: an object of a class that cannot be imported
    other = b"X\x05\x00\x00\x00othercmegatron.training.enums\nOther\n)\x81"
    cut = data.rindex(b"ub")
    file = io.BytesIO()
    torch.save({"args": 1}, file)
    with zipfile.ZipFile(file) as plain, zipfile.ZipFile(folder / "common.pt", "w") as archive:
        for member in plain.infolist():
            inner = data[:cut] + other + data[cut:] if member.filename.endswith("data.pkl") else plain.read(member)
            archive.writestr(member.filename, inner)
    assert megatron.open_source(folder).card.model == replace(GPT, ffn=128)


def with_metadata(folder: Path, **changes: Any) -> None:
    """Change the piece of the final norm as the metadata has it."""
    file = folder / ".metadata"
    found = pickle.loads(file.read_bytes())
    key = "decoder.final_layernorm.weight"
    index = next(index for index in found.storage_data if index.fqn == key)
    for name, value in changes.items():
        if name in ("relative_path", "offset", "length", "transform_descriptors"):
            setattr(found.storage_data[index], name, value)
        elif name == "size":
            found.state_dict_metadata[key].size = torch.Size(value)
        elif name == "sizes":
            found.state_dict_metadata[key].chunks[0].sizes = torch.Size(value)
        else:
            found.storage_data.pop(index)
    file.write_bytes(pickle.dumps(found))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"relative_path": "../secret"}, "must be a file of its own folder"),
        ({"relative_path": "/etc/passwd"}, "must be a file of its own folder"),
        ({"relative_path": "gone.distcp"}, "names gone.distcp, which is not there"),
        ({"offset": 1 << 40}, "ends at"),
        ({"length": 1 << 47}, "ends at"),
        ({"length": 8}, "does not fit"),
        ({"offset": -1}, "no size"),
        ({"size": [1 << 45], "sizes": [1 << 45]}, "does not fit"),
        ({"size": [64]}, "do not fill"),
        ({"sizes": [16]}, "do not fill"),
        ({"transform_descriptors": ["zstd"]}, "is compressed"),
        ({"gone": True}, "has no place for the piece"),
    ],
)
def test_sizes_and_places_are_checked_before_anything_is_read(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = tiny.megatron_folder(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)))
    with_metadata(folder, **changes)
    assert said in tiny.refused(megatron.open_source, folder)


def test_pieces_that_overlap_are_refused(tmp_path: Path) -> None:
    """Two pieces that fill a tensor by count, one over the other."""
    folder = tiny.megatron_folder(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)), layout="tp2")
    found = pickle.loads((folder / ".metadata").read_bytes())
    key = "decoder.layers.mlp.linear_fc2.weight"
    chunks = found.state_dict_metadata[key].chunks
    moved = next(chunk for chunk in chunks if chunk.offsets[0] == 1 and chunk.offsets[2])
    index = next(i for i in found.storage_data if i.fqn == key and tuple(i.offset) == tuple(moved.offsets))
    moved.offsets = torch.Size([1, 0, 1])
    found.storage_data[type(index)(key, moved.offsets)] = found.storage_data.pop(index)
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    source = megatron.open_source(folder)
    assert "overlap or leave a hole" in tiny.refused(source.read, "decoder.layers.1.mlp.linear_fc2.weight")
    source.read("decoder.layers.0.mlp.linear_fc2.weight")


def test_damage_is_one_sentence(tmp_path: Path) -> None:
    """Every file cut in half and every file with garbage; a bomb of memory in a pickle's opcodes; another backend."""
    folder = tiny.megatron_folder(tmp_path / "out", Card(GPT), tiny.tensors(Card(GPT)))
    for name in (".metadata", "common.pt", "metadata.json"):
        whole = (folder / name).read_bytes()
        for damage in (whole[: len(whole) // 2], b"", b"\x80\x04garbage", os.urandom(200)):
            (folder / name).write_bytes(damage)
            tiny.refused(megatron.open_source, folder)
        (folder / name).write_bytes(whole)
    (folder / ".metadata").write_bytes(b"\x80\x04]r\xff\xff\xff\x7f.")
    assert "is no pickled metadata (memo 2147483647)" in tiny.refused(megatron.open_source, folder)
    (folder / ".metadata").write_bytes(b"\x80\x05\x96" + (1 << 50).to_bytes(8, "little") + b".")
    tiny.refused(megatron.open_source, folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert "sharded_backend 'zarr' is not read" in tiny.refused(megatron.open_source, folder)


def test_a_piece_that_is_another_tensor_is_refused(tmp_path: Path) -> None:
    """The metadata and the piece must agree, and a compressed piece is not unpacked."""
    found = tiny.tensors(Card(GPT))
    folder = tiny.megatron_folder(tmp_path / "out", Card(GPT), found)
    key = "decoder.final_layernorm.weight"
    stored = megatron.dist_metadata.tensors(folder)[key].pieces[0]

    def put(data: bytes) -> str:
        file = folder / stored.file
        start = file.stat().st_size
        file.write_bytes(file.read_bytes() + data)
        with_metadata(folder, offset=start, length=len(data))
        return tiny.refused(megatron.open_source(folder).read, key)

    for wrong in (torch.zeros(32, dtype=torch.float64), torch.zeros(31), torch.zeros(1).expand(32), [1, 2]):
        file = io.BytesIO()
        torch.save(wrong, file)
        assert "holds no tensor of torch.float32 [32]" in put(file.getvalue())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(1 << 22))
    assert "is compressed" in put(packed.getvalue())
