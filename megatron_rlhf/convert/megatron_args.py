"""Megatron's settings of an architecture and our Model, in both directions, under the words of Megatron-LM's args.

Hundreds of settings do not concern the network; those that do and that Model cannot express are named here, each with
the values that leave the network as it is, and any other value is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from megatron_rlhf.config.rules import BadInput
from megatron_rlhf.config.schema import Model, Rope
from megatron_rlhf.convert.architecture import check, normal

_SAME: dict[str, tuple[object, ...]] = {
    "num_experts": (1, 0),
    "multi_latent_attention": (False,),
    "qk_layernorm": (False,),
    "qk_l2_norm": (False,),
    "squared_relu": (False,),
    "quick_geglu": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "rotary_interleaved": (False,),
    "attention_output_gate": (False,),
    "mtp_num_layers": (0,),
    "window_size": (),
    "window_attn_skip_freq": (),
    "no_rope_freq": (),
    "softmax_type": ("vanilla",),
    "experimental_attention_variant": (),
    "linear_attention_type": (),
    "is_hybrid_model": (False,),
    "hybrid_override_pattern": (),
    "heterogeneous_layers_config_path": (),
    "heterogeneous_layers_config_encoded_json": (),
    "add_position_embedding": (True,),
    "encoder_num_layers": (),
    "decoder_num_layers": (),
}
"""Settings that would change the network, with the values beside None that do not."""
_STYLES = {
    ("LayerNorm", "learned_absolute", False, True): "gpt",
    ("LayerNorm", "rope", False, True): "neox",
    ("RMSNorm", "rope", True, False): "llama",
    ("RMSNorm", "rope", True, True): "llama",
}
"""(normalization, position_embedding_type, swiglu, add_bias_linear) and what we call them together."""
_YARN_FACTOR, _YARN_CONTEXT = "yarn_rotary_scaling_factor", "yarn_original_max_position_embeddings"
_YARN: dict[str, object] = {
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": True,
}
"""The constants of YaRN's paper, which models/rope.py has."""


def model_of(args: Mapping[str, Any], where: str, *, rows: int, precision: str) -> Model:
    """The Model of Megatron-LM's args; `rows` is what the word embedding has, which counts where no vocabulary is said.

    Raises BadInput naming a setting that is missing or that Model cannot express.
    """
    _refuse(args, where)
    style = _style(args, where)
    hidden, heads = _whole(args, "hidden_size", where), _whole(args, "num_attention_heads", where)
    grouped = args.get("group_query_attention") or args.get("num_query_groups") not in (None, heads)
    groups = _whole(args, "num_query_groups", where) if grouped else heads
    head = _whole(args, "kv_channels", where, max(1, hidden // heads))
    vocabulary = _whole(args, "vocab_size", where, rows)
    gated, biased = style == "llama", bool(args.get("add_bias_linear", True))
    fields: dict[str, Any] = {
        "style": style,
        "layers": _whole(args, "num_layers", where),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": 0 if groups == heads else groups,
        "ffn": _whole(args, "ffn_hidden_size", where, Model(layers=1, hidden=hidden, heads=1, vocabulary=1).ffn_width),
        "context": _whole(args, "max_position_embeddings", where, args.get("seq_length") or None),
        "vocabulary": min(vocabulary, rows),
        "head_dim": 0 if head * heads == hidden or args.get("kv_channels") is None else head,
        "qkv_bias": gated and not biased and bool(args.get("add_qkv_bias", False)),
        "linear_bias": gated and biased,
        "tied": not args.get("untie_embeddings_and_output_weights", False),
        "norm_epsilon": _number(args, where, 1e-5, "layernorm_epsilon", "norm_epsilon"),
        "init_std": _number(args, where, 0.02, "init_method_std"),
        "precision": precision,
        "rope": Rope() if style == "gpt" else replace(_rope(args, where), fraction=_fraction(args, where)),
        "activation": "gelu_tanh" if not gated and _approximate(args) else "gelu",
    }
    model = Model(**fields)
    check(model, where)
    return model


def args_of(model: Model, rows: int) -> dict[str, Any]:
    """The settings of `model` as Megatron-LM's args name them; `rows` is the padded vocabulary.

    Raises BadInput naming what they cannot say.
    """
    rope = model.rope
    yarn = model.rotary and rope.scaling == "yarn"
    args: dict[str, Any] = {
        "num_layers": model.layers,
        "hidden_size": model.hidden,
        "ffn_hidden_size": model.ffn_width,
        "num_attention_heads": model.heads,
        "kv_channels": model.head_width,
        "group_query_attention": model.groups != model.heads,
        "num_query_groups": model.groups,
        "max_position_embeddings": model.context,
        "seq_length": model.context,
        "position_embedding_type": ("yarn" if yarn else "rope") if model.rotary else "learned_absolute",
        "add_position_embedding": True,
        "normalization": "RMSNorm" if model.gated else "LayerNorm",
        "norm_epsilon": model.norm_epsilon,
        "layernorm_epsilon": model.norm_epsilon,
        "swiglu": model.gated,
        "add_bias_linear": model.biased,
        "add_qkv_bias": model.qkv_bias,
        "bias_gelu_fusion": model.activation == "gelu_tanh",
        "openai_gelu": False,
        "untie_embeddings_and_output_weights": not model.tied,
        "vocab_size": model.vocabulary,
        "padded_vocab_size": rows,
        "make_vocab_size_divisible_by": 128,
        "rotary_base": int(rope.base) if rope.base.is_integer() else rope.base,
        "rotary_percent": rope.fraction,
        "rotary_seq_len_interpolation_factor": rope.factor if rope.scaling == "linear" else None,
        "use_rope_scaling": rope.scaling == "llama3",
        "rope_scaling_factor": rope.factor if rope.scaling == "llama3" else 8.0,
        **({**_YARN, _YARN_FACTOR: rope.factor, _YARN_CONTEXT: rope.original_context} if yarn else {}),
        "init_method_std": model.init_std,
        "bf16": model.precision == "bf16",
        "fp16": model.precision == "fp16",
    }
    back = model_of(args, "Megatron's args", rows=model.vocabulary, precision=model.precision)
    for name, value in asdict(normal(model)).items():
        if asdict(normal(back))[name] != value:
            raise BadInput(f"Megatron-LM's args cannot say {name}={value}; write the format weights or hf")
    return args


def of_provider(config: Mapping[str, Any]) -> dict[str, Any]:
    """The `model` section of a run_config.yaml (Megatron-Core's TransformerConfig) under Megatron-LM's words."""
    args = {name: value for name, value in config.items() if isinstance(name, str)}
    function = args.pop("activation_func", "")
    activation = str(function.get("_target_", "") if isinstance(function, dict) else function)[:200].lower()
    args["swiglu"] = bool(args.get("gated_linear_unit", False)) and ("silu" in activation)
    known = "silu" in activation if args["swiglu"] else not activation or "gelu" in activation
    if bool(args.get("gated_linear_unit", False)) != args["swiglu"] or not known:
        raise BadInput(f"run_config.yaml: activation_func={activation} is not known; it must be gelu, or gated silu")
    args["untie_embeddings_and_output_weights"] = not args.get("share_embeddings_and_output_weights", True)
    args["max_position_embeddings"] = args.get("max_position_embeddings") or args.get("seq_length")
    args["num_experts"] = args.get("num_moe_experts")
    args["bias_gelu_fusion"] = bool(args.get("bias_activation_fusion", False)) or "tanh" in activation
    args["rotary_seq_len_interpolation_factor"] = args.get("seq_len_interpolation_factor")
    args["use_rope_scaling"] = bool(args.get("rope_scaling", args.get("use_rope_scaling", False)))
    return args


def _style(args: Mapping[str, Any], where: str) -> str:
    rope = args.get("position_embedding_type", "learned_absolute")
    if args.get("use_rotary_position_embeddings"):
        rope = "rope"
    norm = args.get("normalization") or "LayerNorm"
    said = (
        norm,
        "rope" if rope == "yarn" else rope,
        bool(args.get("swiglu", False)),
        bool(args.get("add_bias_linear", True)),
    )
    if said not in _STYLES:
        raise BadInput(
            f"{where}: normalization={norm}, position_embedding_type={rope}, swiglu={said[2]}, "
            f"add_bias_linear={said[3]} together are neither the gpt style (LayerNorm, learned_absolute, False, True), "
            "nor neox (LayerNorm, rope, False, True), nor llama (RMSNorm, rope, True, False or True)"
        )
    return _STYLES[said]


def _refuse(args: Mapping[str, Any], where: str) -> None:
    for name, same in _SAME.items():
        value = args.get(name)
        if value is not None and not any(type(value) is type(known) and value == known for known in same):
            raise BadInput(f"{where}: {name}={str(value)[:60]} is a network that is not known here")


def _approximate(args: Mapping[str, Any]) -> bool:
    """Whether GELU is its tanh approximation: Megatron-LM's fused kernel and OpenAI's are."""
    return bool(args.get("openai_gelu")) or bool(args.get("bias_gelu_fusion", False))


def _rope(args: Mapping[str, Any], where: str) -> Rope:
    base = _number(args, where, 10000.0, "rotary_base")
    if args.get("position_embedding_type") == "yarn":
        for name, value in _YARN.items():
            if args.get(name) not in (None, value):
                raise BadInput(f"{where}: {name}={str(args[name])[:40]}: only the paper's {value} can be converted")
        factor = _number(args, where, 1.0, _YARN_FACTOR)
        context = _whole(args, _YARN_CONTEXT, where, 4096)
        return Rope(base=base, scaling="yarn", factor=factor, original_context=context)
    interpolation = args.get("rotary_seq_len_interpolation_factor")
    scaled = bool(args.get("use_rope_scaling", False))
    if scaled and interpolation not in (None, 1):
        raise BadInput(f"{where}: use_rope_scaling and rotary_seq_len_interpolation_factor; only one can be converted")
    if scaled:
        # the other constants of llama3's scaling are fixed in Megatron-Core (rotary_pos_embedding.py)
        return Rope(base=base, scaling="llama3", factor=_number(args, where, 8.0, "rope_scaling_factor"))
    if interpolation not in (None, 1):
        factor = _number(args, where, 1.0, "rotary_seq_len_interpolation_factor")
        return Rope(base=base, scaling="linear", factor=factor)
    return Rope(base=base)


def _fraction(args: Mapping[str, Any], where: str) -> float:
    fraction = _number(args, where, 1.0, "rotary_percent")
    if fraction > 1:
        raise BadInput(f"{where}: rotary_percent is {fraction:g}; it must be above 0 and at most 1")
    return fraction


def _whole(args: Mapping[str, Any], name: str, where: str, default: int | None = None) -> int:
    value = args.get(name)
    value = default if value is None else value
    if type(value) is not int or not 0 < value < 1 << 40:
        said = "is missing" if value is None else f"is {str(value)[:40]}"
        raise BadInput(f"{where}: {name} {said}; it must be a whole number above 0, or give --model FILE.yaml")
    return value


def _number(args: Mapping[str, Any], where: str, default: float, *names: str) -> float:
    value = next((args[name] for name in names if args.get(name) is not None), default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise BadInput(f"{where}: {names[0]} is {str(value)[:40]}; it must be a number above 0")
    return float(value)
