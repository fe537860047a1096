"""CUDA graphs for the CPU: what a function asks for is recorded, operation by operation, and done again without Python.

As on a GPU, a replay runs no Python and sees no Python value: every operation gets the tensors it was recorded with, at
their addresses, and its result goes where it went. What CUDA refuses while it records is refused here: whatever makes
the host wait for a number, and data that come from the host. What the recorded operations had computed is spoilt
afterwards, as a real recording computes nothing.
"""
from __future__ import annotations

import contextlib
import inspect

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

REFUSED = (
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "equal", "is_nonzero",
    "bincount", "lift_fresh",
)  # fmt: skip
REAL_GRAPH = torch.cuda.graph


def tensors(tree):
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def storages(tree):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors(tree)}


def place(tensor):
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def is_view(function, args, kwargs, result):
    """Whether an operation computes nothing: a view stays one of the same memory, and is nothing to replay."""
    return not function._schema.is_mutable and storages(result) <= storages((args, kwargs))


class Recorder(TorchDispatchMode):
    """Notes each operation with its tensors."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors(args[1:2]))
        if name in REFUSED or by_mask:
            raise RuntimeError(f"operation not permitted when stream is capturing: {function}")
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def spoil(self):
        """Overwrite what was made here; buffers that were there before stay as they are."""
        known = set()
        for _, args, kwargs, result in self.operations:
            known |= storages((args, kwargs))
            for tensor in tensors(result):
                if tensor.untyped_storage().data_ptr() not in known:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else tensor.dtype != torch.bool)
            known |= storages(result)


class StandInGraph:
    """torch.cuda.CUDAGraph."""

    recorded = replayed = 0

    def __init__(self):
        self.operations = None

    def pool(self):
        return "the pool of a recording"

    def replay(self):
        type(self).replayed += 1
        for function, args, kwargs, results in self.operations:
            for (old, where), new in zip(results, tensors(function(*args, **kwargs))):
                if place(new) != where:
                    old.copy_(new)


@contextlib.contextmanager
def record(graph, **options):
    """torch.cuda.graph."""
    inspect.signature(REAL_GRAPH).bind(graph, **options)  # the real one takes what ours is given
    with Recorder() as recorder:
        yield
    recorder.spoil()
    graph.operations = [
        (function, args, kwargs, [(tensor, place(tensor)) for tensor in tensors(result)])
        for function, args, kwargs, result in recorder.operations
        if not is_view(function, args, kwargs, result)
    ]
    type(graph).recorded += 1


class StandInStream:
    """torch.cuda.Stream and Event: everything is done in order anyway."""

    def __init__(self, *_):
        self.recorded = False

    def record(self, stream=None):
        self.recorded = True

    def synchronize(self):
        assert self.recorded

    def wait_stream(self, other):
        assert isinstance(other, StandInStream)


def install(monkeypatch):
    """Put stand-ins in torch.cuda for what sampling/graphs.py takes from there. Returns the class of the graphs."""

    class Graph(StandInGraph):
        pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "Stream", StandInStream)
    monkeypatch.setattr(torch.cuda, "Event", StandInStream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: StandInStream())
    for context in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, context, lambda *_: contextlib.nullcontext())
    return Graph
