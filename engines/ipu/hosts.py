"""The processes of one training run: a single one, or several that `poprun` started (popdist), with horovod.

The devices reduce gradients themselves. The hosts share the initial weights, the seed and logged values.
"""
from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor

from utils.errors import UsageError

NO_POPTORCH = (
    "--device ipu: PopTorch cannot be imported ({}); install the PopTorch wheel of Poplar SDK 3.4 and "
    "source the SDK's enable script, or use --device cpu"
)
NO_POPDIST = "poprun: {0} cannot be imported ({1}); install the {0} wheel of the Poplar SDK, or start without poprun"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def find_poptorch() -> tuple[Any | None, str]:
    """Return the module `poptorch` and "", or None and why it cannot be used: "" if it is not installed."""
    try:
        poptorch = importlib.import_module("poptorch")
    except ModuleNotFoundError as error:
        return None, "" if error.name == "poptorch" else str(error)
    except Exception as error:  # without its SDK or with the wrong PyTorch it fails in many ways
        return None, first_line(error)
    if not hasattr(poptorch, "ipuHardwareIsAvailable"):
        return None, "{} is not PopTorch".format(getattr(poptorch, "__file__", None) or poptorch)
    return poptorch, ""


def import_poptorch() -> Any:
    """Return the module `poptorch`. Raises UsageError if it is missing or its SDK is not enabled."""
    poptorch, reason = find_poptorch()
    if poptorch is None:
        raise UsageError(NO_POPTORCH.format(reason or "it is not installed"))
    return poptorch


def find_popdist() -> Any | None:
    """Return the module `popdist` if poprun has started this process, else None."""
    try:
        popdist = importlib.import_module("popdist")
        return popdist if popdist.isPopdistEnvSet() else None
    except Exception as error:
        if any(name.startswith("POPDIST_") for name in os.environ):  # set by poprun
            raise UsageError(NO_POPDIST.format("popdist", first_line(error))) from None
        return None


class Hosts:
    """One process that drives all replicas."""

    index = 0
    """Index of this process; 0 logs and saves."""
    count = 1

    def __init__(self, replicas: int) -> None:
        self.replicas = self.local_replicas = replicas

    def options(self, poptorch: Any, ipus_per_replica: int) -> Any:
        """Return new PopTorch options with the number of replicas set."""
        return poptorch.Options().replicationFactor(self.local_replicas)

    def broadcast_seed(self, seed: int) -> int:
        """Return the seed of process 0."""
        return seed

    def broadcast_weights(self, weights: dict[str, Tensor]) -> None:
        """Overwrite the weights with those of process 0."""

    def gather(self, values: Tensor) -> Tensor:
        """Return the values (n,) of all processes by index: (count, n). n must be the same in each."""
        return values.unsqueeze(0)

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over all processes."""
        return value

    def barrier(self) -> None:
        """Wait for all processes."""


class PoprunHosts(Hosts):
    """One of several instances, each of which drives some of the replicas."""

    def __init__(self, popdist: Any, replicas: int) -> None:
        super().__init__(int(popdist.getNumTotalReplicas()))
        if self.replicas != replicas:
            raise UsageError(
                f"--replication-factor {replicas}: poprun has started {self.replicas} replicas; give both the same "
                "number (poprun --num-replicas)"
            )
        self.local_replicas = int(popdist.getNumLocalReplicas())
        self.count, self.index = int(popdist.getNumInstances()), int(popdist.getInstanceIndex())
        try:
            self.horovod = importlib.import_module("horovod.torch")
        except ImportError as error:
            raise UsageError(NO_POPDIST.format("horovod", error)) from None
        self.horovod.init()

    def options(self, poptorch: Any, ipus_per_replica: int) -> Any:
        # These options take the replicas from poprun and must not be given them.
        return importlib.import_module("popdist.poptorch").Options(ipus_per_replica=ipus_per_replica)

    def broadcast_seed(self, seed: int) -> int:
        return int(self.horovod.broadcast(torch.tensor([seed], dtype=torch.int64), root_rank=0))

    def broadcast_weights(self, weights: dict[str, Tensor]) -> None:
        self.horovod.broadcast_parameters(weights, root_rank=0)

    def gather(self, values: Tensor) -> Tensor:
        rows = [self.horovod.broadcast(values, root_rank=index) for index in range(self.count)]
        return torch.stack(rows)

    def mean(self, value: Tensor) -> Tensor:
        return self.horovod.allreduce(value)

    def barrier(self) -> None:
        self.horovod.allreduce(torch.zeros(1))


def find_hosts(replicas: int) -> Hosts:
    """Return the processes of this run. replicas: --replication-factor, the replicas of all processes together."""
    popdist = find_popdist()
    return Hosts(replicas) if popdist is None else PoprunHosts(popdist, replicas)
