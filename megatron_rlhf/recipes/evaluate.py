"""The policy against its baseline on held-out prompts: win rates with intervals, judged by the gold preference."""

from __future__ import annotations

from typing import Any

from megatron_rlhf.batch import Rollout
from megatron_rlhf.checkpoint.manifest import manifest
from megatron_rlhf.config.schema import Config
from megatron_rlhf.data.prompts import PromptStream
from megatron_rlhf.eval import diversity, gold
from megatron_rlhf.eval.win_rate import win_rate
from megatron_rlhf.generate.sampling import Draw
from megatron_rlhf.models import roles
from megatron_rlhf.observe.log import write_json
from megatron_rlhf.parallel import collectives
from megatron_rlhf.recipes import session
from megatron_rlhf.recipes.generation import answers
from megatron_rlhf.recipes.judge import gold_preference, texts
from megatron_rlhf.recipes.pretrain import held_out_text, language_loss
from megatron_rlhf.recipes.session import Session
from megatron_rlhf.recipes.sft import demonstrations_of
from megatron_rlhf.train.engine import Engine

COMPARED = ("sft", "ppo")
SHOWN = 5


def run(config: Config) -> None:
    """Write `<out>/evaluation.json`. Collective: world."""
    evaluate(session.start(config))


def evaluate(run: Session) -> dict[str, Any]:
    """Win rates, gold components, diversity, losses of baseline and policy; empty but on rank 0. Collective: world."""
    settings, config = run.config.evaluate, run.config
    preference = gold_preference(run)
    tokenizer = run.tokenizer()
    stream = PromptStream.load(
        run.data / "prompts.test.jsonl", tokenizer, max_tokens=config.data.max_prompt_tokens, seed=config.seed
    )
    prompts = stream.first(min(settings.prompts, len(stream)))
    draws = {name: Draw(settings.temperature, seed=config.seed, iteration=-1 - at) for at, name in enumerate(COMPARED)}
    rollouts = {
        name: answers(run, run.weights(name), prompts, draw_as, settings.max_tokens) for name, draw_as in draws.items()
    }
    losses = {name: _losses(run, name) for name in ("pretrain", *COMPARED)}
    scores = _scores(run, rollouts)
    found: dict[str, Any] = {}
    if preference is not None:
        places = prompts.ids_B.tolist()
        responses = {name: texts(rollout, tokenizer) for name, rollout in rollouts.items()}
        responses["human"] = [stream.fields[place]["reference"] for place in places]
        ended = {name: rollout.ended_B.bool().tolist() for name, rollout in rollouts.items()}
        ended["human"] = [True] * len(places)
        asked = [stream.texts[place] for place in places]
        golds = {name: preference.scores(asked, responses[name], ended[name]) for name in responses}
        found = {
            "weights": manifest(run.weights("ppo"))["which"],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens or config.sampling.max_tokens,
            "win_rate": _win_rates(golds, config.seed),
            "gold": {name: gold.means(values) for name, values in golds.items()},
            "score": scores,
            "unique_share": {name: diversity.unique_share(values) for name, values in responses.items()},
            "end_share": {name: diversity.end_share(values) for name, values in ended.items()},
            "response_words": {name: diversity.mean_length(values) for name, values in responses.items()},
            "loss": losses,
            "samples": [
                {"prompt": asked[i], **{name: values[i] for name, values in responses.items()}}
                for i in range(min(SHOWN, len(asked)))
            ],
        }
        write_json(run.out / "evaluation.json", found)
    collectives.wait_for_all()
    return found


def _win_rates(golds: dict[str, list[gold.Gold]], seed: int) -> dict[str, dict[str, float]]:
    totals = {name: [one.total for one in values] for name, values in golds.items()}
    pairs = (("ppo", "sft"), ("ppo", "human"), ("sft", "human"))
    return {f"{left}_vs_{right}": win_rate(totals[left], totals[right], seed).as_dict() for left, right in pairs}


def _losses(run: Session, stage: str) -> dict[str, float]:
    """Nats a token on held-out text and demonstrations: what fine-tuning cost the language model. Collective: world."""
    network = run.network(run.config.model, run.config.layout.policy)
    run.fill(network, run.weights(stage))
    engine = Engine(network, roles.logprobs(), run.config.compute)
    valid = demonstrations_of(run, "valid", 256).all_rows()
    return {"pretraining": language_loss(engine, held_out_text(run)), "demonstrations": language_loss(engine, valid)}


def _scores(run: Session, rollouts: dict[str, Rollout]) -> dict[str, float]:
    """The reward model's mean score. Collective: world."""
    network = run.network(run.config.reward_model, run.config.layout.reward, scalar=True)
    run.fill(network, run.weights("reward"))
    engine = Engine(network, roles.scores(), run.config.compute)
    return {name: float(engine.forward(rollout.rows).double().mean()) for name, rollout in rollouts.items()}
