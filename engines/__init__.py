"""Engines run a model on a kind of device; code outside this package is written for one device and one process."""
from __future__ import annotations

import os

from args import Config
from engines.base import Engine, StepResult
from utils.errors import UsageError

__all__ = ["Engine", "StepResult", "create"]


def create(config: Config) -> Engine:
    """Return the engine for config.execution.device.

    `auto` takes IPUs if PopTorch finds some or poprun has started this process, else a CUDA GPU if there is one, else
    the CPU; the engine's `device_choice` says why. Raises UsageError for options that the device does not support.
    """
    use_ipus, reason = _choose(config)
    if use_ipus:
        from engines.ipu import IpuEngine

        try:
            engine: Engine = IpuEngine(config.replace(device="ipu"))
        except UsageError as error:
            raise UsageError(f"{error} ({reason})" if reason else str(error)) from None
    else:
        from engines.native import NativeEngine  # lazily: it may not import on an IPU host

        engine = NativeEngine(config)
    engine.device_choice = reason
    return engine


def _choose(config: Config) -> tuple[bool, str]:
    """Whether to train on IPUs, and what --device auto found, for the log."""
    from engines.ipu.hosts import find_popdist, find_poptorch, first_line

    device, num_processes = config.execution.device, int(os.environ.get("WORLD_SIZE", "1"))
    if find_popdist() is not None:
        if device in ("cpu", "cuda"):
            raise UsageError(
                f"--device {device}: poprun has started this process, and each would train separately there; omit "
                "--device, or start without poprun"
            )
        return True, "--device auto: IPUs, because poprun has started this process" if device == "auto" else ""
    if device == "ipu" and num_processes > 1:
        raise UsageError(
            f"--device ipu: torchrun has started {num_processes} processes, and each would train separately there; "
            "start one, or several with poprun"
        )
    if device != "auto":
        return device == "ipu", ""
    poptorch, problem = find_poptorch()
    if poptorch is None:
        return False, f"--device auto: no IPUs, PopTorch cannot be imported ({problem})" if problem else ""
    if num_processes > 1:
        return False, "--device auto: no IPUs, because torchrun has started this process"
    if config.ipu.compile_only:
        return True, "--device auto: IPUs, for --compile-only"
    try:
        found = poptorch.ipuHardwareIsAvailable()
    except Exception as error:
        return False, f"--device auto: no IPUs, PopTorch cannot look for them ({first_line(error)})"
    if not found:
        return False, "--device auto: no IPUs, PopTorch finds none here"
    return True, "--device auto: the IPUs that PopTorch finds here; --device cpu trains without them"
