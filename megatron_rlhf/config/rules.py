"""The rules a configuration obeys across its fields, and the one exception for bad input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from math import gcd

from megatron_rlhf.config.layout import Layout, LayoutError
from megatron_rlhf.config.schema import Config, Model, Sft


class BadInput(ValueError):
    """One sentence for a person: what is wrong, where it stands, and a value that would work (exit code 2).

    Further arguments are sentences on lines of their own. Words of a file or of the command line that a terminal would
    not show, or would obey, are written as escapes, and the middle of far too long a sentence is left out.
    """

    def __str__(self) -> str:
        """The sentences, a line each."""
        return "\n  ".join(_line(str(sentence)) for sentence in self.args)


_LONGEST = 2000
"""Letters of a sentence."""


def _line(text: str) -> str:
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


_MODELS = ("model", "reward_model")
_SIZES = ("layers", "hidden", "heads", "vocabulary", "context")
_LEARNINGS = ("pretrain.learning", "sft.learning", "rl_start.learning", "reward.learning", "ppo.policy", "ppo.value")
_ROLES = {
    "policy": "model",
    "generate": "model",
    "reference": "model",
    "value": "reward_model",
    "reward": "reward_model",
    "pretrain": "model",
}

# what observe.boards may name
_BOARDS = ("tensorboard", "wandb", "mlflow")

# verbs that draw responses to learn from or to measure
_FULL_SOFTMAX = ("quickstart", "rank", "ppo", "evaluate")

# (settings, the words they may be)
_WORDS: list[tuple[tuple[str, ...], tuple[str, ...]]] = [
    (tuple(f"{model}.precision" for model in _MODELS), ("fp32", "bf16", "fp16")),
    (tuple(f"{model}.style" for model in _MODELS), ("gpt", "llama", "neox")),
    (tuple(f"{model}.activation" for model in _MODELS), ("gelu", "gelu_tanh")),
    (tuple(f"{model}.rope.scaling" for model in _MODELS), ("none", "linear", "llama3", "yarn")),
    (("compute.transformer_engine",), ("auto", "never")),
    (tuple(f"{learning}.schedule" for learning in _LEARNINGS), ("cosine", "constant")),
    (("compute.recompute",), ("none", "selective", "full")),
    (("sft.loss_on", "rl_start.loss_on"), ("response", "sequence")),
    (("reward.denominator",), ("surviving", "all")),
    (("rank.policy",), ("sft", "rl_start")),
    (("ppo.kl.estimator",), ("k1", "k2", "k3", "exact")),
    (("ppo.normalisation",), ("tokens", "rows")),
    (("ppo.missing_end",), ("replace", "subtract", "keep")),
    (("ppo.average_unit",), ("update", "iteration")),
    (("reshard.proof",), ("always", "never")),
    (("checkpoint.verify",), ("digest", "size")),
    (("checkpoint.resume",), ("auto", "never")),
]

# (settings, the numbers they may be in words, the same as a predicate, a number that works)
_BOUNDS: list[tuple[tuple[str, ...], str, Callable[[float], bool], str]] = [
    (
        (
            *(f"{model}.{size}" for model in _MODELS for size in _SIZES),
            *("compute.micro_batch", "compute.forward_micro_batch", "compute.buckets"),
            *("sampling.max_tokens", "reshard.staging_mb"),
            *("data.max_prompt_tokens", "data.max_response_tokens", "data.min_response_tokens"),
            *("data.prompts_per_user", "data.shared_prefix_tokens"),
            *(f"{model}.rope.{number}" for model in _MODELS for number in ("factor", "original_context")),
            *("pretrain.steps", "pretrain.batch", "pretrain.length", "sft.epochs", "sft.batch"),
            *("rl_start.epochs", "rl_start.batch", "reward.epochs", "reward.batch", "rank.prompts"),
            *("rank.valid_prompts", "ppo.iterations", "ppo.episodes", "ppo.minibatches", "ppo.epochs"),
            *("ppo.pretraining_ratio", "evaluate.prompts"),
            *(f"adam.loss_scale.{count}" for count in ("growth_interval", "hysteresis", "patience")),
            *("cluster.node", "checkpoint.keep", "slurm.signal", "slurm.attempts"),
        ),
        "at least 1",
        lambda x: x >= 1,
        "8",
    ),
    (
        (
            *(f"{learning}.{share}" for learning in _LEARNINGS for share in ("final", "warmup_start")),
            *("ppo.gamma", "ppo.lam"),
        ),
        "from 0 to 1",
        lambda x: 0 <= x <= 1,
        "0.1",
    ),
    (
        (
            *("adam.beta1", "adam.beta2", "ppo.average_decay", "sft.dropout", "rl_start.dropout"),
            *("sft.pretraining_fraction", "rl_start.pretraining_fraction"),
        ),
        "at least 0 and below 1",
        lambda x: 0 <= x < 1,
        "0.1",
    ),
    (("data.valid_share", "adam.loss_scale.backoff"), "above 0 and below 1", lambda x: 0 < x < 1, "0.1"),
    (("adam.loss_scale.growth",), "above 1", lambda x: x > 1, "2"),
    (
        ("sampling.top_p", *(f"{model}.rope.fraction" for model in _MODELS)),
        "above 0 and at most 1",
        lambda x: 0 < x <= 1,
        "1",
    ),
    (
        (
            *(f"{learning}.{number}" for learning in _LEARNINGS for number in ("rate", "epsilon")),
            *(f"{model}.{number}" for model in _MODELS for number in ("init_std", "norm_epsilon", "rope.low")),
        ),
        "above 0",
        lambda x: x > 0,
        "1e-5",
    ),
    (
        (
            *("adam.clip", "ppo.clip", "sampling.temperature", "rank.temperature", "evaluate.temperature"),
            *("ppo.kl.target", "ppo.kl.horizon", "adam.loss_scale.initial", "adam.loss_scale.minimum"),
        ),
        "above 0",
        lambda x: x > 0,
        "1",
    ),
    (
        (
            *(f"{model}.{number}" for model in _MODELS for number in ("ffn", "kv_heads", "head_dim")),
            *(f"{learning}.warmup" for learning in _LEARNINGS),
            *("evaluate.max_tokens", "sampling.top_k", "sampling.batch", "sampling.groups"),
            *("compute.pack_tokens", "compute.head_rows"),
            *(
                "adam.weight_decay",
                "sft.examples",
                "rl_start.examples",
                "rank.noise",
                "checkpoint.every",
                "checkpoint.keep_every",
                "seed",
                "reshard.node",
                "slurm.nodes",
                "slurm.tasks",
                "slurm.cpus",
                "watchdog.seconds",
            ),
            *("ppo.value_clip", "ppo.score_clip", "ppo.pretraining_coef", "ppo.kl.coef", "reshard.node"),
        ),
        "at least 0",
        lambda x: x >= 0,
        "0",
    ),
    (
        tuple(f"cluster.{n}" for n in ("nvlink", "nic", "memory", "flops", "bandwidth", "host", "ram", "disk")),
        "above 0",
        lambda x: x > 0,
        "50e9",
    ),
    (("cluster.watts", "cluster.price"), "at least 0", lambda x: x >= 0, "0"),
    (("watchdog.start",), "above 0", lambda x: x > 0, "600"),
    (
        tuple(f"cluster.factors.{n}" for n in ("gemm", "memory", "nvlink", "nic")),
        "above 0 and at most 1",
        lambda x: 0 < x <= 1,
        "0.7",
    ),
    (("cluster.factors.launch", "cluster.factors.latency"), "at least 0", lambda x: x >= 0, "1e-5"),
    (("cluster.factors.straggler",), "at least 1", lambda x: x >= 1, "1.02"),
    (("ppo.entropy_coef",), "0: an entropy bonus is not supported", lambda x: x == 0, "0"),
]


def check(config: Config, world: int, verb: str = "") -> None:
    """Raises BadInput with every rule that `config` breaks in a world of `world` ranks, one sentence a line.

    With `verb`, the rules of that recipe too.
    """
    failures = [*_words(config), *_bounds(config)]
    # the rules across fields divide by numbers that must first be in their bounds
    across: tuple[Iterator[str], ...]
    if verb == "plan":  # of a reshard: the other roles and the data have no say
        across = (_shape("model", config.model), _layouts(config, world, ("policy", "generate")))
    else:
        across = (
            *(_shape(name, getattr(config, name)) for name in _MODELS),
            *(_tokenizer(config), _lengths(config), _counts(config), _states(config), _watching(config)),
            *(_layouts(config, world, tuple(_ROLES)), _draws(config, verb)),
        )
    failures = failures or [sentence for sentences in across for sentence in sentences]
    if failures:
        head = [] if len(failures) == 1 else [f"{len(failures)} settings do not fit:"]
        raise BadInput(*head, *failures)


def _read(config: Config, key: str) -> object:
    return reduce(getattr, key.split("."), config)


def _words(config: Config) -> Iterator[str]:
    for keys, words in _WORDS:
        for key in keys:
            if (word := _read(config, key)) not in words:
                yield f"{key} is '{word}'; it must be one of {', '.join(words)}, for example {key}={words[0]}"


def _bounds(config: Config) -> Iterator[str]:
    for keys, bound, holds, example in _BOUNDS:
        for key in keys:
            number = _read(config, key)
            assert isinstance(number, (int, float))
            if not holds(number):
                yield f"{key} is {number}; it must be {bound}, for example {key}={example}"


def _draws(config: Config, verb: str) -> Iterator[str]:
    if verb in _FULL_SOFTMAX:
        for key, off in (("sampling.top_k", "0"), ("sampling.top_p", "1")):
            if (number := _read(config, key)) != int(off):
                yield (
                    f"{key}={number} is for the verb sample alone, {verb} draws from the full softmax, which log-probs "
                    f"are of; write {key}={off}"
                )


def _states(config: Config) -> Iterator[str]:
    best = config.checkpoint.best
    if best and (len(best.split()) != 2 or best.split()[0] not in ("max", "min")):
        yield f"checkpoint.best is '{best}'; it must be max or min and a number of log.jsonl, for example max score"
    for key in allowed(config.checkpoint.allow):
        try:
            _read(config, key)
        except AttributeError:
            if not key.startswith("weights."):
                yield f"checkpoint.allow names '{key}', which is no setting; name those that differ, as ppo.clip"


def allowed(words: str) -> tuple[str, ...]:
    """The keys that `checkpoint.allow` names, as `a,b` or `[a, b]`."""
    return tuple(word.strip() for word in words.strip("[] ").split(",") if word.strip())


def _watching(config: Config) -> Iterator[str]:
    for name in chosen(config.observe.boards):
        if name not in _BOARDS:
            yield (
                f"observe.boards names '{name}'; it may name {', '.join(_BOARDS)}, with commas between, or be none, "
                "for example observe.boards=tensorboard"
            )
    file = config.observe.prometheus
    if file and not file.endswith(".prom"):
        yield f"observe.prometheus is '{file}'; the collector reads files that end in .prom, write {file}.prom"


def chosen(words: str) -> tuple[str, ...]:
    """The boards that `observe.boards` names, none for none."""
    return tuple(dict.fromkeys(word for word in allowed(words) if word != "none"))


def _shape(name: str, model: Model) -> Iterator[str]:
    if not model.head_dim and model.hidden % model.heads:
        yield (
            f"{name}.hidden={model.hidden} is no multiple of {name}.heads={model.heads}; "
            f"write for example {name}.hidden={_up(model.hidden, model.heads)}"
        )
    elif model.rotary and (model.rotary_width < 2 or model.rotary_width % 2):
        yield (
            f"{name} turns {model.rotary_width} of the {model.head_width} numbers of a head ({name}.rope.fraction="
            f"{model.rope.fraction:g}), which must be an even number above 0; write for example "
            f"{name}.rope.fraction=1 {name}.head_dim={_up(model.head_width, 2)}"
        )
    if model.heads % model.groups:
        yield (
            f"{name}.heads={model.heads} is no multiple of {name}.kv_heads={model.kv_heads}; "
            f"write for example {name}.kv_heads={gcd(model.heads, model.kv_heads)}"
        )
    if model.gated and model.activation != "gelu":
        yield (
            f"{name}.activation={model.activation} is of the gpt style, {name}.style=llama has SwiGLU; "
            f"write {name}.activation=gelu"
        )
    for key in ("qkv_bias", "linear_bias"):
        if not model.gated and getattr(model, key):
            yield (
                f"{name}.{key}=true is of the llama style, {name}.style={model.style} has every bias; "
                f"write {name}.{key}=false"
            )
    if model.rope.high <= model.rope.low:
        yield (
            f"{name}.rope.high={model.rope.high:g} must be above {name}.rope.low={model.rope.low:g}; "
            f"write for example {name}.rope.high={4 * model.rope.low:g}"
        )
    if model.rotary and model.rope.base <= 1:
        yield f"{name}.rope.base={model.rope.base:g} must be above 1; write for example {name}.rope.base=10000"


def _tokenizer(config: Config) -> Iterator[str]:
    if config.reward_model.vocabulary != config.model.vocabulary:
        yield (
            f"reward_model.vocabulary={config.reward_model.vocabulary} differs from model.vocabulary="
            f"{config.model.vocabulary}; one tokenizer serves both, so write "
            f"reward_model.vocabulary={config.model.vocabulary}"
        )


def _lengths(config: Config) -> Iterator[str]:
    data = config.data
    for key, response in (
        ("data.max_response_tokens", data.max_response_tokens),
        ("sampling.max_tokens", config.sampling.max_tokens),
        ("evaluate.max_tokens", config.evaluate.max_tokens),
    ):
        for name in _MODELS:
            context = getattr(config, name).context
            if data.max_prompt_tokens + response > context:
                yield (
                    f"data.max_prompt_tokens={data.max_prompt_tokens} and {key}={response} make rows of "
                    f"{data.max_prompt_tokens + response} tokens, {name}.context={context}; write for example "
                    f"data.max_prompt_tokens={context // 2} {key}={context - context // 2}"
                )
    if data.min_response_tokens > data.max_response_tokens:
        yield (
            f"data.min_response_tokens={data.min_response_tokens} is above data.max_response_tokens="
            f"{data.max_response_tokens}; write for example data.min_response_tokens=1"
        )
    if config.compute.pack_tokens and not config.compute.packing:
        yield f"compute.pack_tokens={config.compute.pack_tokens} needs packed rows; write compute.packing=true"
    if config.pretrain.length > config.model.context:
        yield (
            f"pretrain.length={config.pretrain.length} is above model.context={config.model.context}; "
            f"write for example pretrain.length={config.model.context}"
        )


def _counts(config: Config) -> Iterator[str]:
    ppo, rank, sampling, scale = config.ppo, config.rank, config.sampling, config.adam.loss_scale
    if sampling.groups > sampling.batch > 0:
        yield (
            f"sampling.groups={sampling.groups} is more than the rows to share out, sampling.batch={sampling.batch}; "
            f"write for example sampling.groups={sampling.batch}"
        )
    if scale.minimum > scale.initial:
        yield (
            f"adam.loss_scale.minimum={scale.minimum} is above adam.loss_scale.initial={scale.initial}; "
            f"write for example adam.loss_scale.minimum={scale.initial}"
        )
    if ppo.episodes % ppo.minibatches:
        yield (
            f"ppo.episodes={ppo.episodes} is no multiple of ppo.minibatches={ppo.minibatches}; "
            f"write for example ppo.episodes={_up(ppo.episodes, ppo.minibatches)}"
        )
    if rank.responses_min < 2:
        yield f"rank.responses_min={rank.responses_min}; a ranking needs at least 2, write rank.responses_min=2"
    if rank.responses_min > rank.responses_max:
        yield (
            f"rank.responses_min={rank.responses_min} is above rank.responses_max={rank.responses_max}; "
            f"write for example rank.responses_max={rank.responses_min}"
        )
    for name, steps in (("pretrain.learning", config.pretrain.steps), ("ppo.policy", ppo.iterations)):
        warmup = _read(config, f"{name}.warmup")
        assert isinstance(warmup, int)
        if warmup > steps:
            yield f"{name}.warmup={warmup} is longer than the run's {steps}; write for example {name}.warmup={steps}"
    for name in ("sft", "rl_start"):
        sft: Sft = getattr(config, name)
        if 0 < sft.examples < sft.batch:
            yield (
                f"{name}.examples={sft.examples} is less than one step of {name}.batch={sft.batch}; "
                f"write for example {name}.examples={sft.batch}"
            )


def _layouts(config: Config, world: int, roles: Sequence[str]) -> Iterator[str]:
    parsed: dict[str, Layout] = {}
    for role in roles:
        model_name = _ROLES[role]
        words = getattr(config.layout, role)
        try:
            layout = Layout.parse(words, world)
        except LayoutError as error:
            remedy = "" if "write" in str(error) else f"; write for example layout.{role}=tp1"
            yield f"layout.{role}: {error}{remedy}"
            continue
        parsed[role] = layout
        if role == "generate" and layout.vp > 1:
            yield f"layout.generate='{words}' asks for virtual stages, useless for generation; leave vp{layout.vp} out"
        if role == "generate" and layout.sp:
            yield f"layout.generate='{words}' asks for sequence parallelism, useless for generation; leave sp out"
        yield from _splits(f"layout.{role}='{words}'", layout, model_name, getattr(config, model_name))
    policy, reference = (" ".join(sorted(words.split())) for words in (config.layout.policy, config.layout.reference))
    if config.reshard.share_reference and policy != reference:
        yield (
            f"reshard.share_reference=true puts the reference in the policy's place, layout.reference="
            f"'{config.layout.reference}' is another one; write 'layout.reference={config.layout.policy}'"
        )
    exact = config.ppo.kl.estimator == "exact" and {"policy", "reference"} <= parsed.keys()
    if exact and parsed["policy"] != parsed["reference"]:
        yield (
            f"ppo.kl.estimator=exact puts the reference's logits beside the policy's, layout.reference="
            f"'{config.layout.reference}' keeps them elsewhere; write 'layout.reference={config.layout.policy}'"
        )


def _splits(words: str, layout: Layout, name: str, model: Model) -> Iterator[str]:
    stages = layout.pp * layout.vp
    if model.kv_heads % layout.tp:
        yield (
            f"{words} splits {name}.kv_heads={model.kv_heads} in {layout.tp} (tp), which does not divide it; "
            f"write for example tp{gcd(model.kv_heads, layout.tp)} there, or {name}.kv_heads="
            f"{_up(model.kv_heads, layout.tp)}"
        )
    for key, number, axis, degree in (
        # where key-value heads are split, so are the heads that share them
        ("heads", 0 if model.kv_heads else model.heads, "tp", layout.tp),
        ("hidden", model.hidden, "tp", layout.tp),
        ("ffn", model.ffn_width, "tp", layout.tp),
        ("layers", model.layers, "pp x vp", stages),
        ("context", model.context, "tp, as sp splits rows", layout.tp if layout.sp else 1),
    ):
        if number % degree:
            yield (
                f"{words} splits {name}.{key}={number} in {degree} ({axis}), which does not divide it; "
                f"write for example {name}.{key}={_up(number, degree)}"
            )
    if layout.vp > 1 and layout.pp == 1:
        yield f"{words} has virtual stages without a pipeline; write for example 'pp2 vp{layout.vp}', or leave vp out"


def _up(number: int, divisor: int) -> int:
    """The next multiple of `divisor`, at least one of it."""
    return -(-number // divisor) * divisor
