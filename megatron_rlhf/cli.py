"""The command line: one verb a recipe, `key=value` words, exit codes.

0 done; 1 a crash, with its traceback; 2 bad input, one sentence; 75 stopped by a signal after saving: submit again;
76 ended by the watchdog, or because ranks did not come, the last state saved stands: submit again.
"""

from __future__ import annotations

import atexit
import importlib
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rlhf import __version__, doctor, launch, status
from megatron_rlhf.config import env
from megatron_rlhf.config.load import load
from megatron_rlhf.config.rules import BadInput, check
from megatron_rlhf.config.world import needed
from megatron_rlhf.observe.quiet import silence
from megatron_rlhf.observe.watchdog import HUNG, Absent

RECIPES = {
    "quickstart": "the whole chain, small: prepare, pretrain, sft, rank, reward, ppo, evaluate, report",
    "prepare": "read the corpus; write tokenizer, prompts, demonstrations and pretraining text",
    "pretrain": "language modelling on text, where no pretrained model is at hand",
    "sft": "the SFT baseline and the policy PPO starts from",
    "rank": "sample K responses a prompt and rank them",
    "reward": "train the reward model on the rankings",
    "ppo": "PPO-ptx against the reward model",
    "sample": "answer prompts with a trained policy",
    "evaluate": "the win rate of the PPO policy over the SFT baseline",
}
PLAN = "what a run will need: bytes and seconds by phase, layouts that fit (plan search); plan --help"
REPORT = "table and pictures of a sweep: report scaling DIR"
STATUS = "how a run is doing, from its folder: status RUN_DIR [--json]"
SUBMIT = "a recipe, or pipeline (sft, reward, ppo), as SLURM jobs: submit NAME [--dry-run] [--yes] [--anyway]"
DOCTOR = "what is installed, what is missing and what is lost without it"
_ALONE = {"prepare"}
_EXAMPLES = """\
Examples:
  megatron-rlhf quickstart --out runs/quickstart
  megatron-rlhf ppo experiment=quickstart ppo.kl.coef=0.02 'layout.policy=tp2 pp2'
  srun megatron-rlhf sft experiment=instructgpt_1b3 out=/scratch/run1
  megatron-rlhf ppo --multirun experiment=quickstart scaling=laptop_strong checkpoint.untrained=true out=runs/strong
  megatron-rlhf submit ppo experiment=instructgpt_1b3 layout=8gpu out=/scratch/run1 slurm.partition=gpu --dry-run
  megatron-rlhf plan experiment=instructgpt_6b cluster=h100

A recipe that needs several ranks starts them on this machine, unless torchrun or srun started it as one of them.
experiment=, model=, model@reward_model=, layout=, cluster= and slurm= choose a file of configs/, key=value sets one
setting.
Exit codes: 0 done; 1 crashed; 2 bad input; 75 stopped by a signal after saving, 76 by the watchdog, submit again.
"""
# Longer than the launcher needs to end the ranks that outlive the first failure (launch.py: 2 s).
_LATER_SECONDS = 4.0
# What a rank says that lost its neighbour: the cause is another rank's error.
_LOST = (
    *("connection closed by peer", "connection reset", "connection refused", "broken pipe"),
    *("remote process exited", "got 0 bytes"),
)


def run(argv: Sequence[str] | None = None) -> NoReturn:
    """Ends this process with the code of the command line `argv`, by default its own.

    A rank of a world leaves out the interpreter's own end, which the threads of a process group do not always survive
    (SIGABRT, after all was saved).
    """
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    if env.launched():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code of the command line `argv`, by default the process's own."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(words)
    except BadInput as error:
        return _leave(2, f"megatron-rlhf: {error}\n", later=_is_follower())
    except Absent as error:
        return _leave(HUNG, f"megatron-rlhf: {error}\n", later=_is_follower())
    except KeyboardInterrupt:
        return _leave(130, "megatron-rlhf: interrupted\n", later=_is_follower())
    except Exception as error:
        if not env.launched():
            raise
        text = f"rank {env.rank()} of {env.world_size()} failed:\n{traceback.format_exc()}"
        return _leave(1, text, later=any(sign in str(error).lower() for sign in _LOST))


def _is_follower() -> bool:
    try:
        return env.rank() > 0
    except BadInput:  # the environment itself was the bad input
        return False


def _dispatch(words: Sequence[str]) -> int:
    verb, rest = (words[0], words[1:]) if words else ("--help", [])
    if verb == "plan":
        sys.stdout.write(importlib.import_module("megatron_rlhf.plan.verb").run(rest))
        return 0
    if verb in ("--help", "-h", "help") or "--help" in rest or "-h" in rest:
        sys.stdout.write(_help())
        return 0
    if verb == "--version":
        sys.stdout.write(f"megatron-rlhf {__version__}\n")
        return 0
    if verb == "doctor":
        sys.stdout.write(doctor.report())
        return 0
    if verb == "submit":
        sys.stdout.write(_submit(rest))
        return 0
    if verb == "status":
        sys.stdout.write(_status(rest))
        return 0
    if verb == "report":
        return _report(rest)
    if verb not in RECIPES:
        verbs = ", ".join(_verbs())
        raise BadInput(f"there is no verb '{verb}'; write one of {verbs}, for example megatron-rlhf quickstart")
    if "--multirun" in rest:
        settings = _settings([word for word in rest if word != "--multirun"])
        return int(importlib.import_module("megatron_rlhf.sweep").run(verb, settings))
    return _recipe(verb, _settings(rest))


def _recipe(name: str, settings: Sequence[str]) -> int:
    config = load(name, settings)
    world = env.world_size() if env.launched() else needed(config.layout)
    check(config, world, name)
    importlib.import_module("megatron_rlhf.recipes.inputs").check(name, config)
    if world > 1 and not env.launched() and name not in _ALONE:
        return launch.run(world, [name, *settings])
    if name in _ALONE and env.launched() and env.rank() > 0:
        return 0
    silence()
    importlib.import_module(f"megatron_rlhf.recipes.{name}").run(config)
    return 0


def _status(words: Sequence[str]) -> str:
    folders = [word for word in words if word != "--json"]
    if len(folders) != 1 or folders[0].startswith("-"):
        raise BadInput("status takes the folder of one run; write for example megatron-rlhf status runs/quickstart")
    found = status.look(Path(folders[0]))
    return found.as_json() if "--json" in words else found.as_text()


def _report(words: Sequence[str]) -> int:
    if len(words) != 2 or words[0] != "scaling" or words[1].startswith("-"):
        raise BadInput("report knows the scaling of a sweep; write for example megatron-rlhf report scaling runs/sweep")
    importlib.import_module("megatron_rlhf.eval.scaling").report(Path(words[1]))
    return 0


def _submit(words: Sequence[str]) -> str:
    command = importlib.import_module("megatron_rlhf.submit.command")
    flags = [word for word in words if word in command.FLAGS]
    settings = _settings([word for word in words if word not in flags])
    names = [word for word in settings if "=" not in word]
    ready = importlib.import_module("megatron_rlhf.recipes.inputs").check
    text: str = command.submit(names, [word for word in settings if "=" in word], flags, ready)
    return text


def _settings(words: Sequence[str]) -> list[str]:
    """`key=value` words, with `--out DIR` written as `out=DIR`."""
    settings: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--out":
            word = f"--out={next(rest, '')}"
            if word == "--out=":
                raise BadInput("--out names no folder; write for example --out runs/quickstart")
        if word.startswith("-") and not word.startswith("--out="):
            raise BadInput(f"flag '{word}' is unknown; settings are key=value words and --out DIR")
        settings.append(word.removeprefix("--"))
    return settings


def _verbs() -> dict[str, str]:
    return {**RECIPES, "plan": PLAN, "submit": SUBMIT, "status": STATUS, "report": REPORT, "doctor": DOCTOR}


def _help() -> str:
    verbs = "".join(f"  {verb:<11} {text}\n" for verb, text in _verbs().items())
    return f"Usage: megatron-rlhf VERB [--out DIR] [key=value ...]\n\n{verbs}\n{_EXAMPLES}"


def _leave(code: int, message: str, later: bool = False) -> int:
    """Says `message` and gives `code`; a launched rank ends at once, so that its neighbours notice and nothing hangs.

    `later` lets the rank that has the cause speak first: by then the launcher has ended this one unheard.
    """
    if later:
        time.sleep(_LATER_SECONDS)
    sys.stdout.flush()
    sys.stderr.write(message)
    sys.stderr.flush()
    if env.launched():
        os._exit(code)
    return code
