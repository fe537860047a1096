"""What this machine has, and the reason why a benchmark cannot run on it: no such hardware, package, program or data.

An entry says what it needs through the key `requires`, through its command (`--device cuda`, `poprun`, `$DATASETS_DIR`)
and through its name (`..._pod16` runs on 16 IPUs, by the convention of the reference).
"""
from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Iterator, Mapping

from examples_utils.spec import Benchmark, Command, option_value

POD = re.compile(r"_pod(\d+)(?:_|$)")
DATASET = re.compile(r"\$(?:DATASETS_DIR\b|\{DATASETS_DIR\})([^\s'\":,]*)")
POPLAR = "POPLAR_SDK_ENABLED"  # set by the SDK's enable.sh


class Machine:
    """Answers questions about this machine."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self._probe = functools.lru_cache(maxsize=None)(self._ask)

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
        said = self._probe("import torch; print(torch.cuda.device_count())")
        return int(said) if said.isdigit() else 0

    def has_ipus(self, number: int) -> bool:
        """Whether so many IPUs are attached."""
        return self._probe(f"import poptorch; print(poptorch.ipuHardwareIsAvailable({number}))") == "True"

    def _ask(self, code: str) -> str:
        """Last line that a Python process prints: importing torch here would keep its memory for all benchmarks."""
        try:
            said = subprocess.check_output([sys.executable, "-c", code], env=dict(self.env), timeout=120, text=True,
                                           stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError):
            return ""
        return said.strip().rpartition("\n")[2]


def hardware(benchmark: Benchmark, command: Command) -> tuple[int, int]:
    """How many IPUs and how many GPUs the entry needs; 0: none."""
    needed = {"ipu": 0, "cuda": 0}
    for kind, _, number in (need.partition(":") for need in benchmark.requires):
        if kind in needed:
            needed[kind] = int(number or 1)
    device, pod = option_value(command.words, "--device") or "", POD.search(benchmark.name)
    if pod or device.startswith("ipu") or "poprun" in command.words:
        needed["ipu"] = max(needed["ipu"], int(pod[1]) if pod else 1)
    if device.startswith("cuda"):
        local = option_value(command.words, "--nproc_per_node", "--nproc-per-node") or "1"
        needed["cuda"] = max(needed["cuda"], int(local) if local.isdigit() else 1)
    return needed["ipu"], needed["cuda"]


def missing(benchmark: Benchmark, command: Command, env: Mapping[str, str], machine: Machine,
            compile_only: bool = False) -> Iterator[str]:
    """The reasons why the command cannot run here, if any."""
    if compile_only and not benchmark.compile_only:
        yield "has no --compile-only mode"
    ipus, gpus = hardware(benchmark, command)
    launched = "poprun" in command.words
    if ipus and not env.get(POPLAR):
        yield f"no Poplar SDK ({POPLAR} is not set)"
    implied = ["package:poptorch"] * bool(ipus) + ["program:poprun"] * launched + ["package:torch"] * bool(gpus)
    for kind, _, name in (need.partition(":") for need in implied + [*benchmark.requires]):
        if kind == "package" and not machine.has_package(name):
            what = "the wheel of the Poplar SDK" if name == "poptorch" else "-r requirements.txt"
            yield f"the Python package {name} is not installed: pip install {what}"
        if kind == "program" and not machine.has_program(name):
            yield f"the program {name}{' of the Poplar SDK' * (name == 'poprun')} is not on the PATH"
        if kind == "file" and not (benchmark.folder / name).exists():
            yield f"{benchmark.folder / name} does not exist"
    # poprun makes the partition of IPUs itself, so before it runs they need not be visible.
    if ipus and not launched and not compile_only and not machine.has_ipus(ipus):
        yield "no IPU is available" if ipus == 1 else f"fewer than {ipus} IPUs are available"
    found = machine.num_gpus() if gpus else 0
    if found < gpus:
        seen = f"only {found} CUDA GPU{'s' * (found > 1)}" if found else "no CUDA GPU"
        yield f"PyTorch sees {seen} here; {'one is' if gpus == 1 else f'{gpus} are'} needed"
    if benchmark.needs_dataset:
        folder = env.get("DATASETS_DIR")
        if not folder:
            yield "needs real data: set DATASETS_DIR to the folder of the data sets"
        elif not Path(folder).is_dir():
            yield f"DATASETS_DIR: {folder} is not a folder"
        for name in DATASET.findall(command.text):
            path = Path(f"{folder}{name}")
            path = path.parent if re.search(r"[*?\[{]", path.name) else path  # shards such as {00000..00099}.tar
            if not path.exists():
                yield f"{path} does not exist (DATASETS_DIR is {folder})"
    if command.unset:
        yield f"the environment variable {' and '.join(dict.fromkeys(command.unset))} is not set"
