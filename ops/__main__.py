"""`python -m ops`: which implementation of each op runs on this machine, and why."""
from __future__ import annotations

from ops.explain import main
from utils.errors import run_main

run_main(main)
