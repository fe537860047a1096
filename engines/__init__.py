"""Engines run a model on a kind of device; all outside this package is written for one device and one process."""

from args import Config
from engines.base import Engine, StepResult

__all__ = ["Engine", "StepResult", "create"]


def create(config: Config) -> Engine:
    """Return the engine for config.execution.device; `auto` takes a CUDA GPU where there is one, else the CPU."""
    if config.execution.device == "ipu":
        from engines.ipu import IpuEngine

        return IpuEngine(config)
    from engines.native import NativeEngine  # imported here: an IPU host need not be able to import it

    return NativeEngine(config)
