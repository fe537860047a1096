"""The benchmark runner behind `python3 -m examples_utils benchmark --spec benchmarks.yml`.

Command line, spec format and files are those of Graphcore's examples-utils (the reference). On purpose, no Poplar SDK
is needed without IPUs, what cannot run is skipped with the reason, and the exit status is 1 when a benchmark failed.
"""
from __future__ import annotations

from examples_utils.metrics import register_custom_metric as register_custom_metric
