"""Rows of pretraining text are the documents' tokens, all of them in order, in files that Megatron itself reads.

Not proved here: Megatron's own blending and sharding of indexed datasets, which are not used.
"""

import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.pretraining import PretrainingStream, write


@pytest.fixture
def prefix(tmp_path, tokens, made_up):
    path = tmp_path / "text.train"
    write([*made_up(40), "a", ""], tokens, path)
    return path


def joined(tokens, texts):
    return [token for text in texts for token in [*tokens.encode(text), tokens.end]]


@pytest.mark.parametrize("length", [1, 2, 7, 64, 200])
def test_rows_cover_all_tokens_in_order(prefix, tokens, made_up, length):
    expected = joined(tokens, [*made_up(40), "a", ""])
    stream = PretrainingStream(prefix, length, seed=0)
    assert len(stream) == len(expected) // length
    rows = stream.first(len(stream))
    assert rows.tokens_BT.flatten().tolist() == expected[: len(stream) * length]
    assert rows.tokens_BT.dtype == torch.int64
    assert (rows.prompt_lengths_B == 1).all()
    assert (rows.lengths_B == length).all()


def test_taken_rows_are_each_row_once_an_epoch(prefix):
    stream = PretrainingStream(prefix, 16, seed=4)
    taken = stream.take(2 * len(stream)).tokens_BT.tolist()
    rows = sorted(stream.first(len(stream)).tokens_BT.tolist())
    assert sorted(taken[: len(stream)]) == rows
    assert sorted(taken[len(stream) :]) == rows
    assert taken[: len(stream)] != taken[len(stream) :]


def test_a_saved_stream_goes_on(prefix):
    straight, resumed = PretrainingStream(prefix, 16, seed=4), PretrainingStream(prefix, 16, seed=4)
    straight.take(5)
    resumed.restore(straight.state())
    assert torch.equal(resumed.take(9).tokens_BT, straight.take(9).tokens_BT)


def test_rows_of_another_length_are_another_order(prefix):
    state = PretrainingStream(prefix, 16, seed=4).state()
    with pytest.raises(BadInput, match="size"):
        PretrainingStream(prefix, 8, seed=4).restore(state)


def test_megatron_reads_one_document_a_text(prefix, tokens, made_up):
    documents = IndexedDataset(str(prefix))
    assert len(documents.document_indices) - 1 == len(documents) == 42
    assert documents[3].tolist() == [*tokens.encode(made_up(40)[3]), tokens.end]
    assert sorted(path.name for path in prefix.parent.iterdir()) == ["text.train.bin", "text.train.idx"]


def test_the_number_of_tokens_is_returned(tmp_path, tokens, made_up):
    assert write(made_up(10), tokens, tmp_path / "t") == len(joined(tokens, made_up(10)))


def test_too_short_a_text_names_a_length_that_works(tmp_path, tokens):
    write(["the cat sees a dog"], tokens, tmp_path / "short")
    with pytest.raises(BadInput, match="pretrain.length=") as error:
        PretrainingStream(tmp_path / "short", 500, seed=0)
    length = int(str(error.value).split("pretrain.length=")[1].split()[0])
    assert len(PretrainingStream(tmp_path / "short", length, seed=0)) == 1


def test_no_text_and_no_file_are_refused(tmp_path, tokens, prefix):
    with pytest.raises(BadInput, match="no text"):
        write([], tokens, tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))
    with pytest.raises(BadInput, match="missing"):
        PretrainingStream(tmp_path / "absent", 8, seed=0)
    with pytest.raises(BadInput, match="rows of 100 tokens, 10 are asked for"):
        PretrainingStream(prefix, 100, seed=0).first(10)
