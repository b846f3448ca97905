"""Bad input through the command line: exit code 2, one sentence that says what, where and what would work, and a run's
folder left as it was.

Proves it for every verb that reads something, each before a rank is started (the launcher is watched) or, for
`prepare`, before anything is written; where a sentence says which setting to write, those words get past it.
Not proved here: bad input that only one of several ranks sees (test_cli.py); every rule (config/test_rules.py).
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_rlhf import cli, launch
from megatron_rlhf.data import sentence_pieces

ROOT = Path(__file__).resolve().parents[1]
TEXT = "the cat dog sees likes a red blue house tree and why what who runs sleeps here there today never"
WORDS = TEXT.split()
PIECES = 64
SET = ("experiment=quickstart", "out=OUT", f"model.vocabulary={PIECES}", f"reward_model.vocabulary={PIECES}")
READ = (*SET, "data.source=SOURCE", "data.min_response_tokens=1")
RANKING = {"prompt": "the cat\n", "responses": ["runs", "sleeps"], "ranks": [1, 2]}
Change = Callable[[Path, Path], None]


def line(**fields: object) -> str:
    return json.dumps(fields) + "\n"


def told(users: int) -> str:
    """Demonstrations of so many users, three each."""
    rows = [
        line(prompt=f"{WORDS[user]} {WORDS[turn]} {user}?\n", response="it runs here.", user=f"u{user}")
        for user in range(users)
        for turn in range(3)
    ]
    return "".join(rows)


def weights(folder: Path, *, head: bool, vocabulary: int = PIECES) -> None:
    """What a stage's weights say of themselves, without the weights."""
    tensors = {"embedding.word_embeddings.weight": {}} | ({"head.weight": {}} if head else {})
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"tensors": tensors, "vocabulary": vocabulary, "digests": {}}))


@pytest.fixture(scope="module")
def model() -> bytes:
    return sentence_pieces.train([f"{WORDS[place % 20]} {WORDS[place * 7 % 20]}?" for place in range(400)], PIECES)


@pytest.fixture
def folders(tmp_path: Path, model: bytes, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A source folder and the folder of a run whose stages up to the reward model stand; nothing launched us."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    source, out = tmp_path / "source", tmp_path / "out"
    for folder in (source, out / "data"):
        folder.mkdir(parents=True)
        (folder / "tokenizer.model").write_bytes(model)
    (source / "demonstrations.jsonl").write_text(told(20))
    for split in ("train", "valid"):
        (out / "data" / f"demonstrations.{split}.jsonl").write_text(line(prompt="the cat\n", response="runs"))
        (out / "data" / f"rankings.{split}.jsonl").write_text(line(**RANKING))
        for suffix in ("bin", "idx"):
            (out / "data" / f"pretraining.{split}.{suffix}").write_bytes(b"")
    for name in ("train", "rank", "rank_valid", "test"):
        (out / "data" / f"prompts.{name}.jsonl").write_text(line(prompt="the cat\n"))
    for stage in ("pretrain", "sft", "rl_start", "reward"):
        weights(out / stage / "weights", head=stage == "reward")
    return source, out


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of ranks that were to be started; none is."""
    asked: list[int] = []
    monkeypatch.setattr(launch, "run", lambda processes, argv: asked.append(processes) or 0)
    return asked


def run(words: tuple[str, ...], folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and what was said on stderr."""
    source, out = folders
    code = cli.main([word.replace("=SOURCE", f"={source}").replace("=OUT", f"={out}") for word in words])
    return code, capsys.readouterr().err


def everything(folder: Path) -> dict[str, bytes]:
    """All files and folders under a folder."""
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def write(name: str, text: str, *, room: bool) -> Change:
    """Puts `text` into a file of the source, or of the data room."""
    return lambda source, out: (out / "data" / name if room else source / name).write_text(text) and None


def drop(name: str, *, room: bool) -> Change:
    return lambda source, out: (out / "data" / name if room else source / name).unlink()


def as_is(source: Path, out: Path) -> None:
    """The folders are good."""


def headless(source: Path, out: Path) -> None:
    (out / "reward" / "weights" / "manifest.json").write_text((out / "sft" / "weights" / "manifest.json").read_text())


def other_weights(source: Path, out: Path) -> None:
    (out / "rl_start" / "weights" / "manifest.json").unlink()
    (out / "rl_start" / "weights").rmdir()
    weights(out / "rl_start" / "weights", head=False, vocabulary=4096)


MORE_THAN_WORDS = {"tokenizer and checkpoint", "pretrained weights of another vocabulary"}
"""The words that the sentence names are not enough: the data must be prepared anew."""
# (what is wrong, how it comes about, the words, the sentence)
TABLE: list[tuple[str, Change, tuple[str, ...], str]] = [
    (
        "missing source file",
        drop("demonstrations.jsonl", room=False),
        ("prepare", *READ),
        "SOURCE/demonstrations.jsonl is missing; write one JSON object a line with prompt, response",
    ),
    (
        "missing source",
        as_is,
        ("prepare", *SET, "data.source=/nowhere"),
        "data.source=/nowhere is no folder; write chitchat, or a folder with demonstrations.jsonl",
    ),
    (
        "missing source of a chain",
        as_is,
        ("quickstart", *SET, "data.source=/nowhere"),
        "data.source=/nowhere is no folder; write chitchat, or a folder with demonstrations.jsonl",
    ),
    (
        "missing prepared file",
        drop("demonstrations.valid.jsonl", room=True),
        ("sft", *SET, "checkpoint.resume=never"),
        "OUT/data/demonstrations.valid.jsonl is missing; megatron-rlhf prepare writes it",
    ),
    (
        "missing text",
        drop("pretraining.valid.idx", room=True),
        ("pretrain", *SET, "checkpoint.resume=never"),
        "OUT/data/pretraining.valid.idx is missing; megatron-rlhf prepare writes it",
    ),
    (
        "missing weights",
        lambda source, out: (out / "rl_start" / "weights" / "manifest.json").unlink(),
        ("ppo", *SET),
        "no weights at OUT/rl_start/weights: run the step that writes them first",
    ),
    (
        "malformed line of the source",
        write("demonstrations.jsonl", told(2) + '{"prompt": "a"\n' + told(1), room=False),
        ("prepare", *READ),
        "SOURCE/demonstrations.jsonl line 7 is no JSON at column",
    ),
    (
        "malformed line of held-out data",
        write("prompts.rank_valid.jsonl", line(prompt="a") + line(promt="b"), room=True),
        ("rank", *SET),
        'OUT/data/prompts.rank_valid.jsonl line 2 has no "prompt"; it has promt',
    ),
    (
        "half a character",
        write("demonstrations.jsonl", told(2) + '{"prompt": "a\\ud83d", "response": "b"}\n', room=False),
        ("prepare", *READ),
        "SOURCE/demonstrations.jsonl line 7 has half a character",
    ),
    (
        "K = 1",
        write("rankings.valid.jsonl", line(**RANKING) + line(prompt="a", responses=["b"], ranks=[1]), room=True),
        ("reward", *SET, "checkpoint.resume=never"),
        "OUT/data/rankings.valid.jsonl line 2 has 1 response; a comparison needs at least 2, write a second one",
    ),
    (
        "K = 1 asked for",
        as_is,
        ("rank", *SET, "rank.responses_min=1"),
        "rank.responses_min=1; a ranking needs at least 2, write rank.responses_min=2",
    ),
    (
        "all prompts too long",
        as_is,
        ("prepare", *READ, "data.max_prompt_tokens=2"),
        "SOURCE: none of its 60 demonstrations is left (prompt too long: 60); write for example data.max_prompt_",
    ),
    (
        "all responses too short",
        as_is,
        ("prepare", *READ, "data.min_response_tokens=40"),
        "is left (response too short: 60); write for example data.min_response_tokens=",
    ),
    (
        "empty source",
        write("demonstrations.jsonl", "\n", room=False),
        ("prepare", *READ),
        "SOURCE/demonstrations.jsonl has no row; write one JSON object a line with prompt, response",
    ),
    (
        "empty side",
        write("demonstrations.jsonl", told(1), room=False),
        ("prepare", *READ),
        "nothing of SOURCE is left for pretraining.valid, as held-out users are apart from the others; give several",
    ),
    (
        "empty split",
        write("rankings.valid.jsonl", "", room=True),
        ("reward", *SET, "checkpoint.resume=never"),
        "OUT/data/rankings.valid.jsonl has no row; write one JSON object a line with prompt, responses, ranks",
    ),
    (
        "a layout of another world",
        as_is,
        ("ppo", *SET, "layout.policy=tp3"),
        "layout.policy: tp3 pp1 dp1 is 3 ranks, the world has 4; write for example layout.policy=tp1",
    ),
    (
        "unknown key",
        as_is,
        ("ppo", *SET, "ppo.klcoef=1"),
        "setting 'ppo.klcoef' is unknown; the nearest is 'ppo.kl.coef'",
    ),
    (
        "heads",
        as_is,
        ("ppo", *SET, "reward_model.heads=2", "layout.reward=tp4"),
        "layout.reward='tp4' splits reward_model.heads=2 in 4 (tp), which does not divide it; write for example "
        "reward_model.heads=4",
    ),
    (
        "tokenizer and model",
        as_is,
        ("prepare", *READ, "model.vocabulary=96", "reward_model.vocabulary=96"),
        "SOURCE/tokenizer.model has 64 tokens and model.vocabulary=96; write model.vocabulary=64 reward_model.vocab",
    ),
    (
        "prepared tokenizer and model",
        as_is,
        ("ppo", *SET, "model.vocabulary=96", "reward_model.vocabulary=96"),
        "OUT/data/tokenizer.model has 64 tokens and model.vocabulary=96; write model.vocabulary=64 reward_model.vocab",
    ),
    (
        "tokenizer and checkpoint",
        other_weights,
        ("ppo", *SET),
        "OUT/rl_start/weights holds a model of 4096 tokens and model.vocabulary=64; write model.vocabulary=4096",
    ),
    (
        "pretrained weights of another vocabulary",
        lambda source, out: weights(source / "published", head=False, vocabulary=50257),
        ("sft", *SET, "checkpoint.resume=never", "checkpoint.pretrained=SOURCE/published"),
        "SOURCE/published holds a model of 50257 tokens and model.vocabulary=64; write model.vocabulary=50257",
    ),
    (
        "no end token",
        as_is,
        ("prepare", *READ, "data.end_token=<|x|>"),
        "data.end_token=<|x|> is no token of SOURCE/tokenizer.model; write data.end_token=</s>",
    ),
    (
        "a checkpoint without a head",
        headless,
        ("ppo", *SET),
        "OUT/reward/weights has no tensor head.weight, the scalar head, it holds a language model; megatron-rlhf",
    ),
    *(
        (
            f"{word} in {verb}",
            as_is,
            (verb, *SET, word),
            f"{word} is for the verb sample alone, {verb} draws from the full softmax",
        )
        for verb in ("ppo", "quickstart", "rank")
        for word in ("sampling.top_p=0.9", "sampling.top_k=40")
    ),
    ("no probability", as_is, ("ppo", *SET, "sampling.top_p=0"), "sampling.top_p is 0.0; it must be above 0"),
]


@pytest.mark.parametrize(("name", "change", "words", "said"), TABLE, ids=[row[0] for row in TABLE])
def test_bad_input_is_one_sentence_and_leaves_no_trace(
    name: str,
    change: Change,
    words: tuple[str, ...],
    said: str,
    folders: tuple[Path, Path],
    started: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    change(*folders)
    if words[0] == "prepare":  # into a folder that is not there yet
        folders = (folders[0], folders[1].with_name("new"))
    before = everything(folders[0].parent)
    code, err = run(words, folders, capsys)
    assert code == 2, err
    assert err.startswith("megatron-rlhf: ") and err.endswith("\n")
    assert err.count("\n") == 1 and not re.search(r"[.!?] [A-Z]", err)
    assert said.replace("SOURCE", str(folders[0])).replace("OUT", str(folders[1])) in err
    assert started == []
    assert everything(folders[0].parent) == before
    advised = re.search(r"(?:write|for example) ((?:[a-z_.]+=[^ ,]+ ?)+)", err)
    if advised and name not in MORE_THAN_WORDS:
        code, err = run((*words, *advised[1].split()), folders, capsys)
        assert code == 0, err


def test_good_input_gets_to_the_ranks(
    folders: tuple[Path, Path], started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    weights(folders[1] / "ppo" / "weights", head=False)
    for verb in ("pretrain", "sft", "rank", "reward", "ppo", "sample", "evaluate"):
        assert run((verb, *SET, "checkpoint.resume=never"), folders, capsys) == (0, "")
    assert run(("sample", *SET, "sampling.top_p=0.9", "sampling.top_k=40"), folders, capsys) == (0, "")
    assert started == [4] * 8


def test_what_stands_is_not_asked_for_again(
    folders: tuple[Path, Path], started: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished stage whose inputs were thrown away says that it is done and does not complain."""
    drop("rankings.train.jsonl", room=True)(*folders)
    assert run(("reward", *SET), folders, capsys) == (0, "")
    assert run(("reward", *SET, "checkpoint.resume=never"), folders, capsys)[0] == 2


def test_inputs_are_looked_at_without_torch() -> None:
    code = "import megatron_rlhf.recipes.inputs, sys; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
