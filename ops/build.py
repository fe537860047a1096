"""Compile the C sources in csrc/ with the machine's own compiler, once, and load them.

What PyTorch's operators do in several passes over memory these do in one; nothing needs them. Without a compiler, on
another system, or with `DALLE_KERNELS=off` in the environment, `library` returns None and PyTorch computes the same
(dropout alone draws other numbers).

A compiled file lies in `~/.cache/dalle/kernels` (or `$XDG_CACHE_HOME/dalle/kernels`) under a name that covers source,
compiler and processor: another machine with the same home builds its own. Its last 32 bytes are a checksum. What others
could have written is not loaded, and what is damaged is compiled again. Where that folder will not do, compiled files
are kept in `$XDG_RUNTIME_DIR/dalle/kernels` or in a folder of this user in the temporary folder.
"""
from __future__ import annotations

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
from typing import IO, Iterator

import torch

from utils.caches import UntrustedError, cache_folder, open_trusted, trusted_folder
from utils.files import atomic_write

logger = logging.getLogger(__name__)

SWITCH = "DALLE_KERNELS"
"""Environment variable: "off" leaves everything to PyTorch."""

_FOLDER = Path(__file__).parent / "csrc"
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 120
"""A compiler takes about two; one that hangs must not hang us."""
_MAX_BYTES = 1 << 26
"""More than any compiled file has."""


reasons: dict[str, str] = {}
"""Why `library` returned None, by its names."""


@functools.lru_cache(maxsize=None)
def library(name: str) -> ctypes.CDLL | None:
    """Return the functions of `name`.c, compiled for this machine, or None where that cannot be done."""
    reasons.pop(name, None)
    if os.environ.get(SWITCH, "").lower() in ("off", "0", "no", "false"):
        reasons[name] = f"{SWITCH}={os.environ[SWITCH]}"
        return None
    if not sys.platform.startswith("linux"):
        reasons[name] = f"nothing is compiled on {sys.platform}"
        return None
    try:
        return _built(name)
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        lines: list[str] = reason.strip().splitlines() or [str(error)]
        first = next((line for line in lines if "error" in line), lines[0])
        reasons[name] = first
        logger.info("Native kernels are disabled (%s); PyTorch computes the same, slower", first)
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


def _built(name: str) -> ctypes.CDLL:
    """Load the compiled file, made where there is none that is whole and trusted."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, check=True, timeout=_SECONDS).stdout
    digest = hashlib.sha256(version + " ".join(_FLAGS).encode() + _processor().encode())
    for source in (*sorted(_FOLDER.glob("*.h")), _FOLDER / (name + ".c")):
        digest.update(source.read_bytes())
    file_name = f"{name}-{digest.hexdigest()[:20]}.so"
    return _stored(file_name) or _compiled(compiler, name, file_name)


def _compiled(compiler: str, name: str, file_name: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=_workshop()) as folder:
        half, whole = os.path.join(folder, "half.o"), os.path.join(folder, "whole.so")
        _call([compiler, *_FLAGS, "-c", str(_FOLDER / (name + ".c")), "-o", half], folder)
        # Linked without OpenMP's library: its functions are found in the one that PyTorch has loaded, whose threads
        # are then shared. Two such libraries would fight for the cores.
        _call([compiler, "-shared", half, "-lm", "-o", whole], folder)
        with open(whole, "rb") as file:
            content = file.read()
            loaded = _load(file_name, content, file)  # first: what cannot be loaded is not worth keeping
    _keep(file_name, content)
    return loaded


def _workshop() -> str:
    """Return a folder to compile in, where nobody can swap files between compiler and linker."""
    try:
        return str(trusted_folder(tempfile.gettempdir(), shared=True))
    except UntrustedError:
        return str(trusted_folder(*next(_places())))


def _call(command: list[str], folder: str) -> None:
    subprocess.run(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=True,
        timeout=_SECONDS,
        text=True,
        env=dict(os.environ, TMPDIR=folder),
    )


# What is kept from run to run -----------------------------------------------------------------------------------------


def _places() -> Iterator[tuple[Path, int]]:
    """Yield the folders where compiled files may be kept, the best first, and the mode that each is made with."""
    yield cache_folder("dalle", "kernels"), 0o755
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        yield Path(runtime, "dalle", "kernels"), 0o700
    yield Path(tempfile.gettempdir(), f"dalle-{os.geteuid()}", "kernels"), 0o700


def _stored(file_name: str) -> ctypes.CDLL | None:
    """Load a file that is kept, or return None. A folder that is missing or out of reach keeps nothing."""
    for folder, _ in _places():
        path = folder / file_name
        try:
            with open_trusted(trusted_folder(folder) / file_name) as file:
                signed = file.read(_MAX_BYTES)
                content = signed[: -hashlib.sha256().digest_size]
                if signed == content + _checksum(file_name, content):
                    return _load(file_name, content, file)
                problem = "wrong checksum"
        except UntrustedError as error:
            why = f"{error.filename} {error.strerror}"
            _warn(f"native kernels refused: {why}; private ones are used until only you may write there")
            continue
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except OSError as error:
            problem = str(error)
        _warn(f"{path} is damaged ({problem}): rebuilding")
    return None


def _keep(file_name: str, content: bytes) -> None:
    """Keep a compiled file for later runs, in the first place that takes it."""
    problems = []
    for folder, mode in _places():
        try:
            with atomic_write(trusted_folder(folder, mode) / file_name, "wb", permissions=0o644) as file:
                file.write(content + _checksum(file_name, content))
            return
        except OSError as error:
            problems.append(f"{error.filename or folder}: {error.strerror or error}")
    _warn(
        "native kernels are compiled again in each run, for they cannot be kept ({}); set XDG_CACHE_HOME to a folder "
        "that only you may write".format("; ".join(problems))
    )


def _checksum(file_name: str, content: bytes) -> bytes:
    return hashlib.sha256(file_name.encode("utf-8") + content).digest()


def _load(file_name: str, content: bytes, file: IO[bytes]) -> ctypes.CDLL:
    """Load a library from a copy in memory, which nobody can change or cut off any more.

    Where there can be none, for want of memfd_create or under a limit on the size of files, load the open file itself.
    """
    try:
        descriptor = os.memfd_create(file_name)
        with open(descriptor, "wb", closefd=False) as copy:
            copy.write(content)
        return _load_descriptor(descriptor)
    except (AttributeError, OSError):
        return _load_descriptor(os.dup(file.fileno()))


def _load_descriptor(descriptor: int) -> ctypes.CDLL:
    # Never closed: the dynamic loader knows libraries by path, and would take the next one of this number for this one.
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}")


@functools.lru_cache(maxsize=None)
def _warn(message: str) -> None:
    """Log a warning, once in a process: several libraries meet the same folder."""
    logger.warning("%s", message)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element, for a function of `library`."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
