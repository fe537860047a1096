"""Training on Graphcore IPUs through PopTorch. Nothing outside this package imports poptorch, popdist or horovod."""
from __future__ import annotations

from engines.ipu.engine import IpuEngine

__all__ = ["IpuEngine"]
