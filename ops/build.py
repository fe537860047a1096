"""Compile the C sources in csrc/ once with the machine's own compiler, and load them.

They do in one pass over memory what PyTorch's operators do in several, and are optional. Without a compiler, on another
system, or with `DALLE_KERNELS=off` in the environment, `library` returns None and PyTorch computes the same (only
dropout masks differ).

Compiled files are cached in `~/.cache/dalle/kernels` (or `$XDG_CACHE_HOME/dalle/kernels`), named by a hash of source,
compiler and processor: machines that share a home folder build their own. The last 32 bytes are a checksum. A file that
other users could have written is not loaded; a damaged one is rebuilt. If that folder is unusable, compiled files are
cached in `$XDG_RUNTIME_DIR/dalle/kernels` or in a per-user folder in the temporary folder.
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
"""Environment variable: "off" disables native kernels."""

_FOLDER = Path(__file__).parent / "csrc"
_FLAGS = ["-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
_SECONDS = 300
"""Time limit of a compiler, which takes about two."""
_MAX_BYTES = 1 << 26
"""Above the size of any compiled file."""


reasons: dict[str, str] = {}
"""Library name -> why `library` returned None."""


@functools.lru_cache(maxsize=None)
def library(name: str) -> ctypes.CDLL | None:
    """Return the functions of `name`.c, compiled for this machine, or None if that is impossible."""
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
    """Load the cached file if it is intact and trusted; otherwise compile it."""
    compiler = _compiler()
    version = subprocess.run([compiler, "--version"], stdout=subprocess.PIPE, check=True, timeout=_SECONDS).stdout
    digest = hashlib.sha256(version + " ".join(_FLAGS).encode() + _processor().encode())
    for source in (*sorted(_FOLDER.glob("*.h")), _FOLDER / (name + ".c")):
        digest.update(source.read_bytes())
    file_name = f"{name}-{digest.hexdigest()[:20]}.so"
    return _load_cached(file_name) or _compile(compiler, name, file_name)


def _compile(compiler: str, name: str, file_name: str) -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(dir=_build_folder()) as folder:
        object_file, library_file = os.path.join(folder, "object.o"), os.path.join(folder, "library.so")
        _call([compiler, *_FLAGS, "-c", str(_FOLDER / (name + ".c")), "-o", object_file], folder)
        # Not linked with OpenMP: its symbols resolve to the library that PyTorch has loaded, so that both share its
        # threads. Two thread pools would compete for the cores.
        _call([compiler, "-shared", object_file, "-lm", "-o", library_file], folder)
        with open(library_file, "rb") as file:
            content = file.read()
            loaded = _load(file_name, content, file)  # first: only what can be loaded is stored
    _store(file_name, content)
    return loaded


def _build_folder() -> str:
    """Return a folder to compile in, where other users cannot swap files between compiler and linker."""
    try:
        return str(trusted_folder(tempfile.gettempdir(), shared=True))
    except UntrustedError:
        return str(trusted_folder(*next(_cache_folders())))


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


# Cache of compiled files ----------------------------------------------------------------------------------------------


def _cache_folders() -> Iterator[tuple[Path, int]]:
    """Yield the cache folders, best first, each with the mode it is created with."""
    yield cache_folder("dalle", "kernels"), 0o755
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if os.path.isabs(runtime):
        yield Path(runtime, "dalle", "kernels"), 0o700
    yield Path(tempfile.gettempdir(), f"dalle-{os.geteuid()}", "kernels"), 0o700


def _load_cached(file_name: str) -> ctypes.CDLL | None:
    """Load a cached file, or return None. A missing or inaccessible folder counts as empty."""
    for folder, _ in _cache_folders():
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
            _warn(f"native kernels refused: {why}; private ones are used until only you can write there")
            continue
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            continue
        except OSError as error:
            problem = str(error)
        _warn(f"{path} is damaged ({problem}): rebuilding")
    return None


def _store(file_name: str, content: bytes) -> None:
    """Store a compiled file for later runs, in the first folder that takes it."""
    problems = []
    for folder, mode in _cache_folders():
        try:
            with atomic_write(trusted_folder(folder, mode) / file_name, "wb", permissions=0o644) as file:
                file.write(content + _checksum(file_name, content))
            return
        except OSError as error:
            problems.append(f"{error.filename or folder}: {error.strerror or error}")
    _warn(
        "native kernels are recompiled in each run because they cannot be cached ({}); set XDG_CACHE_HOME to a folder "
        "that only you can write to".format("; ".join(problems))
    )


def _checksum(file_name: str, content: bytes) -> bytes:
    return hashlib.sha256(file_name.encode("utf-8") + content).digest()


def _load(file_name: str, content: bytes, file: IO[bytes]) -> ctypes.CDLL:
    """Load a library from a copy in memory, which no other process can change or truncate.

    Without memfd_create, or under a limit on the size of files, load the open file itself.
    """
    try:
        descriptor = os.memfd_create(file_name)
        with open(descriptor, "wb", closefd=False) as copy:
            copy.write(content)
        return _load_descriptor(descriptor)
    except (AttributeError, OSError):
        return _load_descriptor(os.dup(file.fileno()))


def _load_descriptor(descriptor: int) -> ctypes.CDLL:
    # Never closed: the dynamic loader identifies libraries by path, and would take the next file of this number for it.
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}")


@functools.lru_cache(maxsize=None)
def _warn(message: str) -> None:
    """Log a warning once in a process: several libraries use the same folder."""
    logger.warning("%s", message)


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element, for a function of `library`."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
