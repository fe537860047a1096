"""Compile the C sources beside this file with the machine's own compiler, once, and load them.

What PyTorch's operators do in several passes over memory these do in one; nothing needs them. Without a compiler, on
another system, or with `DALLE_KERNELS=off` in the environment, `library` returns None and PyTorch computes the same
(dropout alone draws other numbers).

A compiled file lies in `~/.cache/dalle/kernels` (or `$XDG_CACHE_HOME/dalle/kernels`) under a name that covers source,
compiler and processor: another machine with the same home builds its own.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import List, Optional

import torch

from utils.files import atomic_write

logger = logging.getLogger(__name__)

SWITCH = "DALLE_KERNELS"
"""Environment variable: "off" leaves everything to PyTorch."""

_FOLDER = Path(__file__).parent
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 120
"""A compiler takes about two; one that hangs must not hang us."""


@functools.lru_cache(maxsize=None)
def library(name: str) -> Optional[ctypes.CDLL]:
    """Return the functions of `name`.c, compiled for this machine, or None where that cannot be done."""
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        return None
    if not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(str(_built(name)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        lines: List[str] = reason.strip().splitlines() or [str(error)]
        first = next((line for line in lines if "error" in line), lines[0])
        logger.info("Kernels of our own are left out (%s); PyTorch computes the same, slower", first)
        return None


def _compiler() -> str:
    for name in (os.environ.get("CC"), "gcc", "cc"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise OSError("there is no C compiler; install gcc")


def _processor() -> str:
    """What -march=native depends on."""
    wanted = ("model name", "flags", "Features", "CPU part")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    found = {line.split(":", 1)[0].strip(): line for line in reversed(lines) if line.startswith(wanted)}
    return platform.machine() + "".join(found.values())


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root, "dalle", "kernels")


def _built(name: str) -> Path:
    """The compiled file, made if it is not there."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, check=True, timeout=_SECONDS).stdout
    digest = hashlib.sha256(version + " ".join(_FLAGS).encode() + _processor().encode())
    for source in (*sorted(_FOLDER.glob("*.h")), _FOLDER / (name + ".c")):
        digest.update(source.read_bytes())
    path = _cache() / "{}-{}.so".format(name, digest.hexdigest()[:20])
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            half, whole = os.path.join(folder, "half.o"), os.path.join(folder, "whole.so")
            _call([compiler, *_FLAGS, "-c", str(_FOLDER / (name + ".c")), "-o", half])
            # Linked without OpenMP's library: its functions are found in the one that PyTorch has loaded, whose threads
            # are then shared. Two such libraries would fight for the cores.
            _call([compiler, "-shared", half, "-lm", "-o", whole])
            with atomic_write(path, "wb") as file:
                file.write(Path(whole).read_bytes())
    return path


def _call(command: List[str]) -> None:
    subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
        timeout=_SECONDS,
        universal_newlines=True,
    )


def pointer(tensor: Optional[torch.Tensor]) -> ctypes.c_void_p:
    """The address of a tensor's first element, for a function of `library`."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def usable(*tensors: Optional[torch.Tensor]) -> bool:
    """Whether kernels may compute with these: float32 on the CPU, and nobody records or compiles what happens."""
    if torch.jit.is_tracing() or _compiling():
        return False
    return all(
        tensor is None
        or (type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.dtype == torch.float32)
        for tensor in tensors
    )


def _compiling() -> bool:
    compiler = getattr(torch, "compiler", None)  # absent before PyTorch 2.1
    return bool(compiler is not None and hasattr(compiler, "is_compiling") and compiler.is_compiling())
