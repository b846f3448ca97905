"""What leaves the device while a role does not need it: gradient buffers, optimizer state, and a frozen role's weights.

Tensors stay the tensors they are. Their device storage is shrunk to nothing and given back its size, so that whoever
refers to them (Megatron's buffers, Adam's state, the weight average) need not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_rlhf.config.schema import Compute
from megatron_rlhf.models.roles import Read
from megatron_rlhf.train.engine import Engine
from megatron_rlhf.train.microbatch import Batch

_ALIGNED = 512
"""Bytes that a tensor's place in the arena is rounded up to."""
_CHUNK = 64 << 20
"""Bytes of device memory through which weights are exchanged."""


class Arena:
    """One stretch of host memory, pinned where CUDA is; it is allocated once, and again only where more is needed."""

    def __init__(self) -> None:
        """Nothing is allocated yet."""
        self._memory = torch.empty(0, dtype=torch.uint8)

    @property
    def size(self) -> int:
        """Its bytes."""
        return self._memory.numel()

    def room(self, size: int) -> Tensor:
        """Its first `size` bytes; what they hold is lost where it must grow."""
        if size > self.size:
            self._pin(False)
            self._memory = torch.empty(size, dtype=torch.uint8)
            self._pin(True)
        return self._memory[:size]

    def _pin(self, pinned: bool) -> None:
        # torch's own pinned allocator would round up to a power of two, which is up to twice the state
        if self.size and torch.cuda.is_available():
            runtime, address = torch.cuda.cudart(), self._memory.data_ptr()
            failed = runtime.cudaHostRegister(address, self.size, 0) if pinned else runtime.cudaHostUnregister(address)
            torch.cuda.check_error(int(failed))


class Offload:
    """The gradient buffers of one role, freed for the time in which it does not learn, and with `state` its fp32 main
    weights, moments and average, parked on the host meanwhile.

    Between `start` and `restore` the role's weights can be read, and anything else of it raises RuntimeError. State
    that lies on the host anyway (`adam.host`) stays where it is.
    """

    def __init__(self, role: Engine, *, state: bool) -> None:
        """Take charge of a role that learns."""
        self.role = role
        self.state = state
        self.arena = Arena()
        self._freed: list[tuple[Tensor, int]] = []
        self._parked: list[tuple[torch.UntypedStorage, Tensor]] = []
        self._stream = torch.cuda.Stream() if torch.cuda.is_available() else None

    def start(self) -> None:
        """Free the gradient buffers and start copying the state; the device may do other work meanwhile.

        Raises RuntimeError where gradients have been accumulated that no update has used: they would be lost.
        """
        if self.role.open:
            raise RuntimeError("accumulated gradients would be lost: call update() before the generate phase")
        optimizer = self.role.optimizer
        if optimizer is None:
            return
        self._parked = self._places() if self.state else []
        optimizer.away = True
        self._freed = [(buffer, buffer.nbytes) for buffer in optimizer.gradients()]
        for buffer, _ in self._freed:
            buffer.untyped_storage().resize_(0)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for storage, place in self._parked:
                place.copy_(_bytes(storage), non_blocking=True)

    def finish(self) -> None:
        """Free the state's device memory once it is copied."""
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)
        for storage, _ in self._parked:
            storage.resize_(0)

    def restore(self) -> None:
        """The state is back bit for bit and the gradient buffers are zero; after `start` or `finish`, or neither."""
        optimizer = self.role.optimizer
        if optimizer is None or not optimizer.away:
            return
        for storage, place in self._parked:
            if storage.nbytes() == 0:
                storage.resize_(place.numel())
                _bytes(storage).copy_(place, non_blocking=True)
        self._parked = []
        for buffer, size in self._freed:
            buffer.untyped_storage().resize_(size)
            buffer.zero_()
        self._freed = []
        optimizer.away = False

    @torch.no_grad()
    def _places(self) -> list[tuple[torch.UntypedStorage, Tensor]]:
        """Every storage of the state with its place in the arena, which has room for moments that are still to come."""
        optimizer, average = self.role.optimizer, self.role.average
        assert optimizer is not None
        if optimizer.hosted:
            return []
        shards, adams = optimizer.shards(), optimizer.adams()
        moments = [
            value
            for adam in adams
            for shard, entry in adam.state.items()
            for value in entry.values()
            if isinstance(value, Tensor) and value.shape == shard.shape
        ]
        # of fp32 weights the shards are ranges of the model's own
        weights = {parameter.untyped_storage().data_ptr() for parameter in self.role.network.parameters.values()}
        storages = [t.untyped_storage() for t in (*shards, *moments, *(average.shards if average else ()))]
        found = {storage.data_ptr(): storage for storage in storages if storage.data_ptr() not in weights}
        coming = sum(2 * _up(4 * shard.numel()) for shard in shards) if not moments else 0
        sizes = [_up(storage.nbytes()) for storage in found.values()]
        places = self.arena.room(sum(sizes) + coming)[: sum(sizes)].split(sizes)
        return [(storage, place[: storage.nbytes()]) for storage, place in zip(found.values(), places, strict=True)]


class Lodger(Engine):
    """A frozen role without device memory of its own: its weights wait on the host, and while it is `resident` they are
    where the weights of `owner` are otherwise, which has the same model and layout."""

    def __init__(self, owner: Engine, read: Read, compute: Compute) -> None:
        """Its weights are those that the owner has now."""
        super().__init__(owner.network, read, compute)
        self.owner = owner
        self.resident = False
        weights = [_bytes_of(parameter) for parameter in owner.network.parameters.values()]
        sizes = [_up(weight.numel()) for weight in weights]
        self._arena = Arena()
        places = self._arena.room(sum(sizes)).split(sizes)
        self._pairs = [(weight, place[: weight.numel()]) for weight, place in zip(weights, places, strict=True)]
        for weight, place in self._pairs:
            place.copy_(weight)

    def forward(self, batch: Batch, read: Read | None = None) -> Tensor:
        """As an Engine's. Raises RuntimeError outside `resident`. Collective: world."""
        if not self.resident:
            raise RuntimeError("this role's weights wait in host memory; read it inside `with resident(role)`")
        return super().forward(batch, read)

    @torch.no_grad()
    def exchange(self) -> None:
        """The weights on the device and those that wait change places, a bounded chunk at a time."""
        for weight, place in self._pairs:
            for here, there in zip(weight.split(_CHUNK), place.split(_CHUNK), strict=True):
                kept = here.clone()
                here.copy_(there, non_blocking=True)
                there.copy_(kept, non_blocking=True)
        self.resident = self.owner.lent = not self.resident


@contextmanager
def resident(role: Engine) -> Iterator[None]:
    """The role can be read inside: a Lodger's weights take its owner's place, which keeps every bit and raises
    RuntimeError meanwhile; other roles are there anyway."""
    if not isinstance(role, Lodger):
        yield
        return
    if role.owner.lent:
        raise RuntimeError("the owner's place is taken: leave the other `with resident(role)` first")
    role.exchange()
    try:
        yield
    finally:
        role.exchange()


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _bytes_of(parameter: Tensor) -> Tensor:
    return parameter.detach().view(-1).view(torch.uint8)


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
