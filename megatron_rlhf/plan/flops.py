"""Floating-point operations of a network and of the paper's runs. Pure, no torch.

A product of [n, a] and [a, b] is 2 n a b operations. Counted are matrix products; norms, activations and softmax are
bytes (plan/roofline.py).
"""

from __future__ import annotations

from megatron_rlhf.config.schema import Config, Model
from megatron_rlhf.plan.parameters import count

PETAFLOPS_DAY = 1e15 * 86400
"""One petaFLOP/s for a day, the unit of the paper's compute (Brown et al. 2020, appendix D)."""


def layer(model: Model, tokens: float) -> float:
    """Operations of one layer's four products for `tokens` positions, forward: 2 a weight and position.

    With gpt's widths 24 tokens h^2 (Narayanan et al. 2021, arXiv 2104.04473, appendix).
    """
    return 2 * tokens * layer_weights(model)


def layer_weights(model: Model) -> int:
    """Weights of one layer's four products: queries, keys and values; projection; feed-forward up, gate and down."""
    width, gates = model.hidden, 2 if model.gated else 1
    queries, keys = (heads * model.head_width for heads in (model.heads, model.groups))
    return width * (2 * queries + 2 * keys) + (gates + 1) * width * model.ffn_width


def attention(model: Model, rows: float, queries: float, keys: float) -> float:
    """Operations of q kT and of the weights times v, 4 queries keys h a row, every key seen (Narayanan et al. 2021)."""
    return 4 * rows * queries * keys * model.heads * model.head_width


def head(model: Model, positions: float) -> float:
    """Operations of the output layer at `positions`: 2 h V each."""
    return 2 * positions * model.hidden * model.vocabulary


def forward(model: Model, rows: float, length: float, positions: float | None = None) -> float:
    """Operations of a forward pass over `rows` of `length`, the output layer at `positions` (every one by default).

    This is a third of Megatron's 72 B l s h^2 (1 + s/6h + V/12lh): attention counts every pair of positions, those
    that the causal mask leaves out too (Korthikanti et al. 2022, arXiv 2205.05198, appendix A).
    """
    layers = layer(model, rows * length) + attention(model, rows, length, length)
    return model.layers * layers + head(model, rows * length if positions is None else positions)


def learned(model: Model, rows: float, length: float, positions: float | None = None) -> float:
    """Operations of forward and backward, which is twice a forward; nothing that is computed again counts (MFU)."""
    return 3 * forward(model, rows, length, positions)


def of_the_paper(config: Config, demonstrations: int, pretraining_tokens: float) -> dict[str, dict[str, float]]:
    """Petaflop/s-days of pretraining, SFT and PPO-ptx by pass, as the paper counts them (InstructGPT, section 5.1).

    2 N a token forward and 6 N forward and backward (Kaplan et al. 2020, section 2.1), each row a full context. What
    this library adds, the old log-probs scored again before training, is not in the paper's count.
    """
    model, ppo = config.model, config.ppo
    policy, critic = count(model), count(config.reward_model, scalar=True)
    tokens = ppo.iterations * ppo.episodes * model.context
    mixed = ppo.iterations * ppo.episodes * ppo.pretraining_ratio * config.pretrain.length
    passes: dict[str, dict[str, float]] = {
        "pretraining": {"learn": 6 * policy * pretraining_tokens},
        "sft": {"learn": 6 * policy * demonstrations * config.sft.epochs * model.context},
        "ppo": {
            "generate": 2 * policy * tokens,
            "reference": 2 * policy * tokens,
            "reward": 2 * critic * tokens,
            "value": 2 * critic * tokens,
            "learn value": 6 * critic * tokens * ppo.epochs,
            "learn policy": 6 * policy * tokens * ppo.epochs,
            "learn pretraining mix": 6 * policy * mixed * ppo.epochs if ppo.pretraining_coef else 0.0,
        },
    }
    return {run: {name: work / PETAFLOPS_DAY for name, work in found.items()} for run, found in passes.items()}
