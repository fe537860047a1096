"""Entry point: python3 -m examples_utils benchmark --spec benchmarks.yml [--benchmark NAME ...] [flags]"""
from __future__ import annotations

import utils.start  # noqa: F401 - first: it says what stops the imports below

# isort: split
from examples_utils.runner import main
from utils.errors import run_main

if __name__ == "__main__":
    run_main(main)
