"""Entry point: python3 -m examples_utils benchmark --spec benchmarks.yml [--benchmark NAME ...] [flags]"""
from __future__ import annotations

from utils.errors import UserError, run_main


def _main() -> int:
    try:
        from examples_utils.cli import main
    except ModuleNotFoundError as error:
        raise UserError(f"the Python package {error.name} is not installed: pip install -r requirements.txt") from None
    return main()


if __name__ == "__main__":
    run_main(_main)
