"""What constraints/ and requirements.txt pin, and what is installed instead."""
from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "{}.{}".format(*sys.version_info)


def read_pins(python=PYTHON):
    """{package: version} of one Python's constraints file; empty where there is none."""
    path = ROOT / "constraints" / f"py{python}.txt"
    lines = path.read_text().splitlines() if path.is_file() else []
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def other_versions():
    """What is installed in another version than the pinned one, PyTorch included."""
    if not read_pins():
        return [f"Python {PYTHON} (constraints: 3.10 to 3.13)"]
    torch = re.search(r"^torch==([\d.]+)", (ROOT / "requirements.txt").read_text(), re.M)
    pins, found = dict(read_pins(), torch=torch.group(1)), []
    for name, version in pins.items():
        try:
            installed = metadata.version(name).partition("+")[0]  # 2.13.0+cpu is PyTorch 2.13.0
        except metadata.PackageNotFoundError:
            continue
        if installed != version:
            found.append(f"{name} {installed} (pinned: {version})")
    return found
