"""One rank of a grid pool: runs what it is told by name and reports what happened."""

from __future__ import annotations

import ast
import datetime
import faulthandler
import gc
import importlib.util
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from _pytest.assertion.rewrite import rewrite_asserts

from megatron_rlhf.parallel import cpu

_modules: dict[str, ModuleType] = {}


def main(rank: int, ranks: int, descriptor: int) -> None:
    """Serves tasks from the pipe until its other end closes; then the process ends, whatever it is waiting for."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    connection = Connection(descriptor)
    tasks: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, tasks), daemon=True).start()
    warnings.filterwarnings("ignore", module=r"(megatron|torch)\.")
    torch.set_num_threads(1)
    cpu.install()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{Path.cwd() / 'rendezvous'}",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(hours=1),
    )
    while True:
        answer = _answer(tasks.get())
        sys.stdout.flush()
        sys.stderr.flush()
        connection.send_bytes(answer)


def _listen(connection: Connection, tasks: queue.SimpleQueue[bytes]) -> None:
    while True:
        try:
            tasks.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(1)


def _answer(task: bytes) -> bytes:
    """(outcome, value) of one task, pickled: ok with what it returned, skipped with why, failed with the traceback."""
    try:
        path, name, arguments = pickle.loads(task)
        function = getattr(_module(path), name)
        torch.manual_seed(1234)
        value: Any = getattr(function, "__wrapped__", function)(**arguments)
        return pickle.dumps(("ok", value))
    except pytest.skip.Exception as skipped:
        return pickle.dumps(("skipped", str(skipped)))
    except BaseException:
        return pickle.dumps(("failed", traceback.format_exc()))
    finally:
        gc.collect()


def _module(path: str) -> ModuleType:
    """The test file at `path`, with pytest's asserts that show values."""
    if path not in _modules:
        name = f"grid_case_{len(_modules)}_{Path(path).stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        source = Path(path).read_bytes()
        tree = ast.parse(source, path)
        rewrite_asserts(tree, source, path)
        exec(compile(tree, path, "exec", dont_inherit=True), module.__dict__)
        _modules[path] = module
    return _modules[path]
