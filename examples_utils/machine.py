"""What this machine has, and the reason why a benchmark cannot run on it: no such hardware, package, program or data.

An entry says what it needs through the key `requires`, through its command (`--device cuda`, `poprun`, `$DATASETS_DIR`)
and through its name (`..._pod16` runs on 16 IPUs, by the convention of the reference).
"""
from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Iterator, Mapping

from examples_utils.spec import Variant, option_value

POD = re.compile(r"_pod(\d+)(?:_|$)")
DATASET = re.compile(r"\$(?:DATASETS_DIR\b|\{DATASETS_DIR\})([^\s'\":,]*)")
POPLAR = "POPLAR_SDK_ENABLED"  # set by the SDK's enable.sh
_CANNOT_IMPORT = (ImportError, OSError, RuntimeError)  # a package whose libraries are missing or of another version


class Machine:
    """Answers questions about this machine. PyTorch is imported only where an entry needs a GPU or an IPU."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env

    def has_package(self, name: str) -> bool:
        """Whether the Python that runs the benchmarks (this one) can import the package."""
        try:
            return importlib.util.find_spec(name) is not None
        except (ImportError, ValueError):  # a missing parent package
            return False

    def has_program(self, name: str) -> bool:
        """Whether a program is on the PATH."""
        return shutil.which(name, path=self.env.get("PATH")) is not None

    def num_gpus(self) -> int:
        """CUDA devices that PyTorch sees."""
        with contextlib.suppress(*_CANNOT_IMPORT):
            return int(importlib.import_module("torch").cuda.device_count())
        return 0

    def has_ipus(self, number: int) -> bool:
        """Whether so many IPUs are attached."""
        with contextlib.suppress(*_CANNOT_IMPORT):
            return bool(importlib.import_module("poptorch").ipuHardwareIsAvailable(number))
        return False


def hardware(variant: Variant) -> tuple[int, int]:
    """How many IPUs and how many GPUs the command needs; 0: none."""
    needed = dict.fromkeys(("ipu", "cuda"), 0)
    for kind, _, number in (need.partition(":") for need in variant.benchmark.settings.requires):
        if kind in needed:
            needed[kind] = int(number or 1)
    device, pod = option_value(variant.words, "--device"), POD.search(variant.benchmark.name)
    if pod or device.startswith("ipu") or "poprun" in variant.words:
        needed["ipu"] = max(needed["ipu"], int(pod[1]) if pod else 1)
    if device.startswith("cuda"):
        local = option_value(variant.words, "--nproc_per_node", "--nproc-per-node")
        needed["cuda"] = max(needed["cuda"], int(local) if local.isdigit() else 1)
    return needed["ipu"], needed["cuda"]


def missing(variant: Variant, env: Mapping[str, str], machine: Machine, compile_only: bool = False) -> Iterator[str]:
    """The reasons why the command cannot run here, if any."""
    benchmark, (ipus, gpus) = variant.benchmark, hardware(variant)
    if compile_only and not benchmark.settings.compile_only:
        yield "has no --compile-only mode"
    if ipus and not env.get(POPLAR):
        yield f"no Poplar SDK ({POPLAR} is not set)"
    launched = "poprun" in variant.words
    implied = ["package:poptorch"] * bool(ipus) + ["program:poprun"] * launched + ["package:torch"] * bool(gpus)
    for kind, _, name in (need.partition(":") for need in (*implied, *benchmark.settings.requires)):
        if kind == "package" and not machine.has_package(name):
            what = "the wheel of the Poplar SDK" if name == "poptorch" else "-r requirements.txt"
            yield f"the Python package {name} is not installed: pip install {what}"
        if kind == "program" and not machine.has_program(name):
            yield f"the program {name} is not on the PATH"
        if kind == "file" and not (benchmark.folder / name).exists():
            yield f"{benchmark.folder / name} does not exist"
    # poprun makes the partition of IPUs itself, so before it runs they need not be visible.
    if ipus and not launched and not compile_only and not machine.has_ipus(ipus):
        yield f"fewer IPUs than the {ipus} needed are available"
    if gpus and machine.num_gpus() < gpus:
        yield f"CUDA GPUs needed: {gpus}; PyTorch sees {machine.num_gpus()} here"
    if benchmark.needs_dataset:
        folder = env.get("DATASETS_DIR", "")
        if not folder or not Path(folder).is_dir():
            yield f"needs real data, but DATASETS_DIR ('{folder}') is not a folder: set it to that of the data sets"
        for name in DATASET.findall(variant.text):
            path = Path(folder + name)
            path = path.parent if re.search(r"[*?\[{]", path.name) else path  # shards such as {00000..00099}.tar
            if not path.exists():
                yield f"{path} does not exist (DATASETS_DIR is {folder})"
    if variant.unset:
        yield f"the environment variable {' and '.join(variant.unset)} is not set"
