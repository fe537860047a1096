"""Convert COCO's captions to one text file per image: a short name for data/process_trainset.py.

python process_captions.py
"""
from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    # Run as a file: importing it as data.process_trainset would import PyTorch first.
    runpy.run_path(str(Path(__file__).resolve().parent / "data" / "process_trainset.py"), run_name="__main__")
