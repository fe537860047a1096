"""The matrix unit that matrix.c asks for: this processor's own, or one in portable C (see amx_emulation.h)."""
from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path
from unittest import mock

import pytest
import torch

from ops import build
from ops import matmul as matrix

HEADER = Path(__file__).with_name("amx_emulation.h")


@functools.lru_cache(maxsize=None)
def _emulated():
    digest = hashlib.sha256(HEADER.read_bytes()).hexdigest()[:16]  # part of the compiled file's name
    # -O2: a third of the compiler's time, and no slower to run.
    flags = [*build._FLAGS, "-O2", "-w", "-include", str(HEADER), "-D__AMX_BF16__", "-DEMULATION=0x" + digest]
    with mock.patch.object(build, "_FLAGS", flags), mock.patch.object(matrix, "library", build.library.__wrapped__):
        return matrix._functions.__wrapped__()


@contextlib.contextmanager
def matrix_units(kind):
    """Multiply by the "native" unit, or by an "emulated" one; skip where there is none."""
    functions = matrix._functions() if kind == "native" else _emulated()
    if functions is None:
        pytest.skip("no AMX, no C compiler, or kernels are switched off")
    with mock.patch.object(matrix, "_functions", lambda: functions):
        assert matrix.suits(torch.ones(64, 64), torch.ones(64, 64))
        yield
