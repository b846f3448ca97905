"""Megatron-Core 0.16 on machines without CUDA: every `cuda` it asks for by name becomes the CPU.

Call `install` before anything builds a model or a process group; where CUDA is available it changes nothing.
The comment at each patch names the upstream lines (megatron/core, 0.16.1) that need it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from megatron_rlhf.config.rules import BadInput

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor",
    "as_tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "arange",
    "eye",
    "linspace",
    "rand",
    "randn",
    "randint",
    "zeros_like",
    "ones_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
)
_NOTHING = ("synchronize", "set_device", "empty_cache", "reset_peak_memory_stats")
_installed = False


class NoStream:
    """A stream or an event of a device that has none: everything asked of it has already happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        """Accepts what torch.cuda.Stream and torch.cuda.Event accept."""

    def _nothing(self, *_args: Any, **_kwargs: Any) -> NoStream:
        return self

    wait = wait_stream = wait_event = record = record_event = synchronize = _nothing

    def query(self) -> bool:
        """True: the work is done."""
        return True

    def elapsed_time(self, _end: NoStream) -> float:
        """0 milliseconds."""
        return 0.0


def install() -> None:
    """Megatron-Core runs on CPU with gloo afterwards; returns at once where CUDA is available or when done before.

    Raises BadInput for a megatron-core other than 0.16.
    """
    global _installed
    if _installed or torch.cuda.is_available():
        return
    version = importlib.metadata.version("megatron-core")
    if not version.startswith("0.16."):
        raise BadInput(
            f"megatron-core {version} cannot run without CUDA here; install 'megatron-core>=0.16.1,<0.17' or use a GPU"
        )
    _devices()
    _tensor_methods()
    _streams()
    _random()
    _installed = True


def _put(owner: object, name: str, value: object) -> None:
    setattr(owner, name, value)


def _on_cpu(device: Any) -> Any:
    """The CPU instead of any CUDA device; other values unchanged."""
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    return _CPU if isinstance(device, str) and device.startswith("cuda") else device


def _devices() -> None:
    # tensor_parallel/mappings.py:91, layers.py:261, pipeline_parallel/p2p_communication.py:313,
    # distributed/param_and_grad_buffer.py:783, models/common/embeddings/rotary_pos_embedding.py:78,
    # optimizer/distrib_optimizer.py:791, dist_checkpointing/strategies/async_utils.py:165 and others
    _put(torch.cuda, "current_device", lambda: _CPU)
    # pipeline_parallel/schedules.py:596, optimizer/clip_grads.py:90, optimizer/optimizer.py:473, utils.py:1207,
    # transformer/utils.py:35, dist_checkpointing/exchange_utils.py:110
    for name in _FACTORIES:
        _put(torch, name, _factory(getattr(torch, name)))


def _factory(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(original)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original(*args, **kwargs)

    return create


def _tensor_methods() -> None:
    to, type_of = Tensor.to, Tensor.type

    @functools.wraps(to)
    def to_cpu(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return to(self, *map(_on_cpu, args), **kwargs)

    @functools.wraps(type_of)
    def cuda_type(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    # optimizer/distrib_optimizer.py:1089, dist_checkpointing/exchange_utils.py:499,
    # models/common/language_module/language_module.py:244, models/gpt through transformer_layer.py:936
    _put(Tensor, "cuda", lambda self, *_args, **_kwargs: self)
    _put(nn.Module, "cuda", lambda self, *_args, **_kwargs: self)
    _put(Tensor, "to", to_cpu)
    # optimizer/clip_grads.py:167, optimizer/optimizer.py:671,690, optimizer/distrib_optimizer.py:361,420,582
    _put(Tensor, "type", cuda_type)


def _streams() -> None:
    # pipeline_parallel/p2p_communication.py:398, dist_checkpointing/strategies/filesystem_async.py:230,
    # fully_parallel.py:272, optimizer/optimizer.py:362
    for name in _NOTHING:
        _put(torch.cuda, name, _returning(lambda: None))
    # utils.py:2186
    for name in ("range_push", "range_pop", "mark"):
        _put(torch.cuda.nvtx, name, _returning(lambda: None))
    _put(torch.cuda.nvtx, "range", _returning(contextlib.nullcontext))
    # distributed/distributed_data_parallel.py:230, param_and_grad_buffer.py:417,
    # resharding/copy_services/gloo_copy_service.py:46,146
    for name in ("Stream", "Event"):
        _put(torch.cuda, name, type(name, (NoStream,), {}))
    for name in ("current_stream", "default_stream"):
        _put(torch.cuda, name, _returning(NoStream))
    _put(torch.cuda, "stream", _returning(contextlib.nullcontext))


def _returning(make: Callable[[], Any]) -> Callable[..., Any]:
    """A new function of any arguments; torch._dynamo refuses to import where two torch names share one function."""

    def call(*_args: Any, **_kwargs: Any) -> Any:
        return make()

    return call


def _random() -> None:
    # tensor_parallel/random.py:235-238,422
    for owner in (torch.cuda, torch.cuda.random):
        _put(owner, "manual_seed", _seeder())
        _put(owner, "get_rng_state", _returning(torch.get_rng_state))
        _put(owner, "set_rng_state", _setter())
    upstream = _megatron_random()
    # tensor_parallel/random.py:41-110: `_set` only queues its call until CUDA initialises, which never happens
    _put(upstream, "_get_cuda_rng_state", _returning(torch.get_rng_state))
    _put(upstream, "_set_cuda_rng_state", _setter())
    # tensor_parallel/random.py:243-281: warns whenever the CPU generator moved inside the context, its purpose here
    _put(upstream.CudaRNGStatesTracker, "fork", _fork)


def _megatron_random() -> Any:
    """Megatron's module of random states, imported while torch.compile returns its function unchanged.

    jit.py:19 compiles every fused function; without a GPU that only costs a C++ compilation in each process.
    """
    compile_function = torch.compile
    _put(torch, "compile", _uncompiled)
    try:
        return importlib.import_module("megatron.core.tensor_parallel.random")
    finally:
        _put(torch, "compile", compile_function)


def _uncompiled(function: Any = None, **_settings: Any) -> Any:
    return _uncompiled if function is None else function


def _seeder() -> Callable[[int], None]:
    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    return manual_seed


def _setter() -> Callable[..., None]:
    def set_state(new_state: Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(new_state)

    return set_state


@contextlib.contextmanager
def _fork(tracker: Any, name: str = "model-parallel-rng") -> Iterator[None]:
    """Draws inside the context come from the tracker's state `name`; the caller's own state is back afterwards."""
    if name not in tracker.states_:
        raise KeyError(f"random state '{name}' was not added to the tracker")
    outer, outer_name = torch.get_rng_state(), tracker._current_state_name
    if outer_name != "default-rng":
        tracker.states_[outer_name] = outer
    torch.set_rng_state(tracker.states_[name])
    tracker._current_state_name = name
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outer if outer_name == "default-rng" else tracker.states_[outer_name])
        tracker._current_state_name = outer_name
