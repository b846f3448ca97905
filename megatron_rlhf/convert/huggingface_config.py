"""config.json of Hugging Face and our Model, in both directions: every key is mapped, checked or known to be idle.

A key that is none of these is refused by name, so that no setting of the computation is ever dropped; a config that is
written is read back and compared, so that a family never holds a model that it cannot express.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert.architecture import check, normal
from megatron_rlhf.convert.huggingface_names import Row

IDLE = re.compile(
    r"_name_or_path|architectures|model_type|torch_dtype|dtype|transformers_version|use_cache|torchscript|use_bfloat16|"
    r"(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id|tokenizer_class|prefix|"
    r".*dropout|.*_pdrop|summary_.*|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|"
    r"output_attentions|output_hidden_states|output_scores|return_dict.*|gradient_checkpointing|chunk_size_feed_forward|"
    r"pretraining_tp|_attn_implementation.*|_flash_attn_2_enabled|"
    # how text is drawn, which older files keep here
    r"max_length|min_length|max_new_tokens|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|"
    r"temperature|top_k|top_p|typical_p|repetition_penalty|length_penalty|no_repeat_ngram_size|"
    r"encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|remove_invalid_values|suppress_tokens|"
    r"begin_suppress_tokens|exponential_decay_length_penalty"
)
"""Keys that leave the logits as they are: names, tokens, dropout, what is returned, how text is drawn."""
NEUTRAL: dict[str, object] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "pruned_heads": {},
    "is_decoder": False,
}
"""Keys of any family that would change the network, with the value that does not."""


class Settings:
    """The keys of one config.json, each of which must be read once."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        """`where` names them in errors."""
        self.where = where
        self.values = dict(values)
        self._left = {key for key, value in values.items() if value is not None}

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key; the default where it is absent or null."""
        self._left.discard(key)
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number above 0. Raises BadInput for anything else, and where it is absent without default."""
        value = self.take(key, default)
        if type(value) is not int or not 0 < value < 1 << 40:
            raise BadInput(f"{self._said(key, value)}; it must be a whole number above 0")
        return value

    def given(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self.values.get(key) is not None

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0. Raises BadInput as `whole` does."""
        value = self.take(key, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise BadInput(f"{self._said(key, value)}; it must be a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false. Raises BadInput for anything else."""
        value = self.take(key, default)
        if type(value) is not bool:
            raise BadInput(f"{self._said(key, value)}; it must be true or false")
        return value

    def word(self, key: str, words: Mapping[str, str], default: str) -> str:
        """What the key's word is called here. Raises BadInput, naming `words`, where it is none of them."""
        value = self.take(key, default)
        if not isinstance(value, str) or value not in words:
            raise BadInput(f"{self._said(key, value)} is not one of {', '.join(words)}")
        return words[value]

    def neutral(self, key: str, *values: object, why: str) -> None:
        """Raises BadInput with `why` unless the key is absent, null or one of `values`."""
        value = self.take(key)
        if value is not None and not any(type(value) is type(known) and value == known for known in values):
            raise BadInput(f"{self._said(key, value)}: {why}")

    def close(self) -> None:
        """Raises BadInput naming the keys that nobody has read and that are not known to be idle."""
        for key, value in NEUTRAL.items():
            self.neutral(key, value, why=f"only {value} can be converted")
        if self.values.get("auto_map"):
            raise BadInput(f"{self.where}: auto_map names code of its own, which is never run here")
        if self.values.get("quantization_config"):
            raise BadInput(f"{self.where}: quantization_config; convert the weights before they were quantised")
        left = sorted(key for key in self._left if not IDLE.fullmatch(key))
        if left:
            said = ", ".join(f"{key}={_brief(self.values[key])}" for key in left[:8])
            raise BadInput(
                f"{self.where} has {said}{' and more' if len(left) > 8 else ''}, which may change what the network "
                "computes and is not known here; take it out if it does not"
            )

    def _said(self, key: str, value: object) -> str:
        return f"{self.where}: {key} is missing" if value is None else f"{self.where}: {key}={_brief(value)}"


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture of Hugging Face.

    `kind` is its model_type, `policy` and `scalar` are the classes of its two heads; `read` takes every key of a
    config that concerns the network (`Settings.close` follows), `write` gives the keys back. Names that match
    `harmless` may be left over: buffers that are functions of the config.
    """

    kind: str
    policy: str
    scalar: str
    table: tuple[Row, ...]
    read: Callable[[Settings], Model]
    write: Callable[[Model], dict[str, Any]]
    prefix: str = "model."
    """What the tensors of the body start with, unless the file is of the bare body."""
    harmless: str = r"(?!)"

    @property
    def language_head(self) -> str:
        """The tensor of the output layer."""
        return next(row.theirs[0] for row in self.table if row.ours == "output_layer.weight")

    def model(self, settings: Settings) -> Model:
        """The Model of a config. Raises BadInput where a key has no counterpart here."""
        model = self.read(settings)
        settings.close()
        check(model, settings.where)
        return normal(model)

    def config(self, model: Model) -> dict[str, Any]:
        """The keys of config.json for `model`. Raises BadInput naming what this family cannot express."""
        values = self.write(model)
        found = asdict(self.model(Settings(values, f"a {self.kind} config")))
        for name, value in asdict(normal(model)).items():
            if name != "precision" and found[name] != value:
                raise BadInput(f"{self.kind} has no {name}={_brief(value)}")
        return {"model_type": self.kind} | values


def read_rope(settings: Settings, context: int, base: float = 10000.0, fraction: float | None = None) -> Rope:
    """The rotary positions of `rope_theta` and `rope_scaling`, or of the newer `rope_parameters`.

    `fraction` is what turns of a head where `partial_rotary_factor` does not say it, None in families whose heads turn
    whole. Raises BadInput for a kind that is none of default, linear, llama3 and yarn, and for constants that ours
    fixes.
    """
    base = settings.number("rope_theta", base)
    old, new = settings.take("rope_scaling", {}), settings.take("rope_parameters", {})
    if not isinstance(old, dict) or not isinstance(new, dict) or (old and new):
        raise BadInput(f"{settings.where}: rope_scaling and rope_parameters; give one of them, as an object")
    inner = Settings(old or new, f"{settings.where}: {'rope_scaling' if old else 'rope_parameters'}")
    base = inner.number("rope_theta", base)
    if fraction is not None:
        fraction = inner.number("partial_rotary_factor", fraction)
    inner.take("type")
    inner.values.setdefault("rope_type", inner.values.get("type"))
    kinds = {"default": "none", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    rope = Rope(base=base, scaling=inner.word("rope_type", kinds, "default"), fraction=fraction or 1.0)
    if rope.scaling != "none":
        rope = replace(rope, factor=inner.number("factor"))
    if rope.scaling in ("llama3", "yarn"):
        rope = replace(rope, original_context=inner.whole("original_max_position_embeddings", context))
    else:
        inner.take("original_max_position_embeddings")
    if rope.scaling == "llama3":
        rope = replace(rope, low=inner.number("low_freq_factor"), high=inner.number("high_freq_factor"))
    if rope.scaling == "yarn":
        _check_yarn(inner, rope)
    inner.close()
    return rope


def write_rope(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which every version of transformers reads."""
    if rope.scaling == "none":
        return {"rope_theta": rope.base, "rope_scaling": None}
    scaling: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = rope.original_context
    if rope.scaling == "llama3":
        scaling |= {"low_freq_factor": rope.low, "high_freq_factor": rope.high}
    return {"rope_theta": rope.base, "rope_scaling": scaling}


def _check_yarn(inner: Settings, rope: Rope) -> None:
    """Megatron-side YaRN (models/rope.py) has the paper's constants."""
    if (beta := inner.number("beta_fast", 32.0)) != 32:
        raise BadInput(f"{inner.where}: beta_fast={beta:g}: only the paper's 32 can be converted")
    if (beta := inner.number("beta_slow", 1.0)) != 1:
        raise BadInput(f"{inner.where}: beta_slow={beta:g}: only the paper's 1 can be converted")
    usual = 0.1 * math.log(rope.factor) + 1 if rope.factor > 1 else 1.0
    if not math.isclose(factor := inner.number("attention_factor", usual), usual, rel_tol=1e-6):
        raise BadInput(f"{inner.where}: attention_factor={factor:g}: only the paper's {usual:g} can be converted")
    inner.neutral("truncate", True, why="only true can be converted")
    for key in ("mscale", "mscale_all_dim"):
        inner.neutral(key, why="only the paper's attention factor can be converted")


def _brief(value: object) -> str:
    said = str(value).lower() if isinstance(value, bool) else str(value)
    return said if len(said) <= 60 else f"{said[:57]}..."
