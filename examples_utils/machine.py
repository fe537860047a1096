"""What this machine has, and the reason why a benchmark cannot run on it: no such hardware, package, program or data.

An entry says what it needs through the key `requires`, through its command (`--device cuda`, `poprun`, `$DATASETS_DIR`)
and through its name (`..._pod16` runs on 16 IPUs, by the convention of the published benchmarks).
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from examples_utils.command import Command, option_value
from examples_utils.spec import Benchmark

POD = re.compile(r"_pod(\d+)(?:_|$)")
GLOB = re.compile(r"[*?\[{]")
PROBE_SECONDS = 120
POPLAR = "POPLAR_SDK_ENABLED"  # set by the SDK's enable.sh


class Machine:
    """Answers questions about this machine; each is looked up once, when an entry first needs it."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self._probes: Dict[str, str] = {}

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
        text = self._probe("import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)")
        return int(text) if text.isdigit() else 0

    def has_ipus(self, number: int) -> bool:
        """Whether so many IPUs are attached."""
        return self._probe("import poptorch; print(poptorch.ipuHardwareIsAvailable({}))".format(number)) == "True"

    def _probe(self, code: str) -> str:
        """Last line that a Python process prints: importing torch here would keep its memory for all benchmarks."""
        if code not in self._probes:
            try:
                done = subprocess.run([sys.executable, "-c", code], env=dict(self.env), stdout=subprocess.PIPE,
                                      stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, timeout=PROBE_SECONDS,
                                      universal_newlines=True, check=False)
                printed = done.stdout.strip().splitlines()
            except (OSError, subprocess.TimeoutExpired):
                printed = []
            self._probes[code] = printed[-1] if printed else ""
        return self._probes[code]


def why_skipped(benchmark: Benchmark, command: Command, env: Mapping[str, str], machine: Machine,
                compile_only: bool = False) -> Optional[str]:
    """The reason not to run the command here, or None when nothing it is known to need is missing."""
    if compile_only and not benchmark.compile_only:
        return "has no --compile-only mode"
    ipus, gpus = hardware(benchmark, command)
    reason = _without_ipus(ipus, command, env, machine, compile_only) if ipus else None
    if not reason and gpus:
        reason = _without_gpus(gpus, machine)
    if not reason:
        reason = _without_requirement(benchmark, machine)
    if not reason and benchmark.needs_dataset:
        reason = _without_dataset(command, env)
    if not reason and command.unset:
        reason = "the environment variable {} is not set".format(" and ".join(dict.fromkeys(command.unset)))
    return reason


def hardware(benchmark: Benchmark, command: Command) -> Tuple[int, int]:
    """How many IPUs and how many GPUs the entry needs; 0: none."""
    ipus = gpus = 0
    for need in benchmark.requires:
        kind, _, number = need.partition(":")
        if kind == "ipu":
            ipus = int(number or 1)
        elif kind == "cuda":
            gpus = int(number or 1)
    device = option_value(command.words, "--device") or ""
    pod = POD.search(benchmark.name)
    if pod or device.startswith("ipu") or "poprun" in command.words:
        ipus = max(ipus, int(pod.group(1)) if pod else 1)
    if device.startswith("cuda"):
        local = option_value(command.words, "--nproc_per_node", "--nproc-per-node") or "1"
        gpus = max(gpus, int(local) if local.isdigit() else 1)
    return ipus, gpus


def _without_ipus(number: int, command: Command, env: Mapping[str, str], machine: Machine,
                  compile_only: bool) -> Optional[str]:
    if not env.get(POPLAR):
        return "no Poplar SDK ({} is not set)".format(POPLAR)
    if not machine.has_package("poptorch"):
        return "the Python package poptorch is not installed: install the wheel of the Poplar SDK"
    launched = "poprun" in command.words
    if launched and not machine.has_program("poprun"):
        return "poprun of the Poplar SDK is not on the PATH"
    # poprun makes the partition of IPUs itself, so before it runs they need not be visible.
    if not launched and not compile_only and not machine.has_ipus(number):
        return "no {} here".format("IPU is" if number == 1 else "{} IPUs are".format(number))
    return None


def _without_gpus(number: int, machine: Machine) -> Optional[str]:
    if not machine.has_package("torch"):
        return "the Python package torch is not installed: pip install -r requirements.txt"
    found = machine.num_gpus()
    if found >= number:
        return None
    return "PyTorch sees {} here; {} needed".format(
        "no CUDA GPU" if not found else "only {} CUDA GPU{}".format(found, "" if found == 1 else "s"),
        "one is" if number == 1 else "{} are".format(number))


def _without_requirement(benchmark: Benchmark, machine: Machine) -> Optional[str]:
    for need in benchmark.requires:
        kind, _, name = need.partition(":")
        if kind == "package" and not machine.has_package(name):
            return "the Python package {} is not installed: pip install -r requirements.txt".format(name)
        if kind == "program" and not machine.has_program(name):
            return "the program {} is not on the PATH".format(name)
        if kind == "file" and not (benchmark.folder / name).exists():
            return "{} does not exist".format(benchmark.folder / name)
    return None


def _without_dataset(command: Command, env: Mapping[str, str]) -> Optional[str]:
    folder = env.get("DATASETS_DIR")
    if not folder:
        return "needs real data: set DATASETS_DIR to the folder of the data sets"
    if not Path(folder).is_dir():
        return "DATASETS_DIR: {} is no folder".format(folder)
    for name in _dataset_paths(command.text):
        path = Path(folder + name)
        if GLOB.search(path.name):  # shards such as {00000..00099}.tar
            path = path.parent
        if not path.exists():
            return "{} does not exist (DATASETS_DIR is {})".format(path, folder)
    return None


def _dataset_paths(text: str) -> List[str]:
    """What follows $DATASETS_DIR in the words of a command."""
    return re.findall(r"\$(?:DATASETS_DIR\b|\{DATASETS_DIR\})([^\s'\":,]*)", text)
