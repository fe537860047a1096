"""The benchmark runner behind `python3 -m examples_utils benchmark --spec benchmarks.yml`.

Command line, spec format, log folder and result files are those of Graphcore's examples-utils package (the
reference), so one benchmarks.yml serves both. What differs on purpose: no Poplar SDK is needed for entries that do not
use it, entries whose hardware, data or packages are missing are skipped with the reason, and the exit status is 1 when
one failed.
"""
from __future__ import annotations

from examples_utils.metrics import register_custom_metric

__all__ = ["register_custom_metric"]
