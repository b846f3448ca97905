"""An order interrupted anywhere goes on as if it had not been, each element comes once an epoch.

Not proved here: that recipes save the cursor at the right moment (tests/resume).
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.data.cursor import Cursor


@settings(deadline=None, max_examples=60)
@given(size=st.integers(1, 12), seed=st.integers(0, 5), takes=st.lists(st.integers(0, 30), min_size=2, max_size=6))
def test_resumed_equals_straight(size, seed, takes):
    straight = Cursor(size, seed)
    expected = straight.take(sum(takes))
    parts, state = [], Cursor(size, seed).state()
    for number in takes:
        cursor = Cursor(size, seed)
        cursor.restore(state)
        parts.append(cursor.take(number))
        state = cursor.state()
    assert torch.equal(torch.cat(parts), expected)
    assert state == straight.state()


def test_every_element_once_an_epoch():
    epochs = Cursor(7, 3).take(21).reshape(3, 7)
    assert (epochs.sort(dim=1).values == torch.arange(7)).all()
    assert not torch.equal(epochs[0], epochs[1])


def test_seeds_differ():
    assert not torch.equal(Cursor(50, 1).take(50), Cursor(50, 2).take(50))
    assert not torch.equal(Cursor(50, 1).take(100)[50:], Cursor(50, 2).take(50))


def test_taking_nothing_is_an_empty_index():
    taken = Cursor(3, 0).take(0)
    assert taken.dtype == torch.int64
    assert len(taken) == 0


@pytest.mark.parametrize(("size", "seed", "word"), [(6, 1, "size 5"), (5, 2, "seed 1")])
def test_another_order_is_refused(size, seed, word):
    with pytest.raises(BadInput, match=word):
        Cursor(size, seed).restore(Cursor(5, 1).state())


def test_an_empty_order_is_refused():
    with pytest.raises(BadInput, match="at least 1"):
        Cursor(0, 1)
