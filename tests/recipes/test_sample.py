"""`sample` draws as `sampling.top_k` and `sampling.top_p` say, for it alone.

Not proved here: the draw itself (generate/test_sampling.py), nor that other verbs refuse them (test_bad_input.py).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_rlhf.config.load import load
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.recipes import sample


def test_people_see_what_they_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Draw] = []

    def answers(run: object, folder: Path, prompts: object, draw_as: Draw) -> None:
        seen.append(draw_as)
        raise InterruptedError

    tokenizer = SimpleNamespace(encode_prompt=lambda text: [1, 2])
    run = SimpleNamespace(data=tmp_path, tokenizer=lambda: tokenizer, weights=lambda stage: tmp_path / stage)
    (tmp_path / "prompts.test.jsonl").write_text('{"prompt": "a"}\n')
    monkeypatch.setattr(sample.session, "start", lambda config, *, writes: run)
    monkeypatch.setattr(sample, "answers", answers)
    words = ["experiment=quickstart", "sampling.top_k=40", "sampling.top_p=0.9", "evaluate.temperature=0.5", "seed=3"]
    with pytest.raises(InterruptedError):
        sample.run(load("sample", words))
    assert seen == [Draw(temperature=0.5, top_k=40, top_p=0.9, seed=3)]
