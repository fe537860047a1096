"""What a benchmark needs and this machine lacks: hardware, packages, programs, data.

An entry tells its needs by its key `requires`, by its command (`--device cuda`, `poprun`, `$DATASETS_DIR`) and by its
name (`..._pod16` runs on 16 IPUs, by the convention of the reference).
"""
from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
from pathlib import Path
from typing import Iterator

from examples_utils.spec import VARIABLE, Variant, option_value

POD = re.compile(r"_pod(\d+)(?:_|$)")
DATASET = re.compile(r"\$(?:DATASETS_DIR\b|\{DATASETS_DIR\})([^\s'\":,]*)")
POPLAR = "POPLAR_SDK_ENABLED"  # set by the SDK's enable.sh


def has_package(name: str) -> bool:
    """Whether the Python that runs the benchmarks (this one) has the package."""
    with contextlib.suppress(ImportError, ValueError):  # a missing parent package
        return importlib.util.find_spec(name) is not None
    return False


def available(kind: str, number: int) -> int:
    """How many GPUs (cuda) are attached; how many IPUs, at most the number. Asks PyTorch, which is slow to import."""
    # A package may be missing, or its libraries, or these are of another version.
    with contextlib.suppress(ImportError, OSError, RuntimeError):
        if kind == "ipu":
            return number * importlib.import_module("poptorch").ipuHardwareIsAvailable(number)
        return importlib.import_module("torch").cuda.device_count()
    return 0


def needs(variant: Variant) -> list[tuple[str, str]]:
    """Kind and name, or number, of what the command needs to run: what the entry requires, and what is implied."""
    device, pod = option_value(variant.words, "--device"), POD.search(variant.benchmark.name)
    found = []
    if pod or device.startswith("ipu") or "poprun" in variant.words:
        found.append(f"ipu:{pod[1] if pod else 1}")
    if device.startswith("cuda"):
        found.append(f"cuda:{option_value(variant.words, '--nproc_per_node', '--nproc-per-node')}")
    found += ["program:poprun"] * ("poprun" in variant.words)
    return [need.partition(":")[::2] for need in (*found, *variant.benchmark.settings.requires)]


def missing(variant: Variant, compile_only: bool = False) -> Iterator[str]:
    """The reasons why the command cannot run here, if any."""
    benchmark, env = variant.benchmark, variant.env
    if compile_only and not benchmark.settings.compile_only:
        yield "has no --compile-only mode"
    for kind, name in needs(variant):
        number = int(name) if name.isdigit() else 1
        package = {"ipu": "poptorch", "cuda": "torch", "package": name}.get(kind)
        if kind == "ipu" and not env.get(POPLAR):
            yield f"no Poplar SDK ({POPLAR} is not set)"
        if package and not has_package(package):
            what = "the wheel of the Poplar SDK" if package == "poptorch" else "-r requirements.txt"
            yield f"the Python package {package} is not installed: pip install {what}"
        # poprun makes the partition of IPUs itself, so before it runs they need not be visible.
        if kind == "ipu" and not compile_only and "poprun" not in variant.words and available(kind, number) < number:
            yield f"fewer IPUs than the {number} needed are available"
        if kind == "cuda" and available(kind, number) < number:
            yield f"CUDA GPUs needed: {number}; PyTorch sees {available(kind, number)} here"
        if kind == "program" and not shutil.which(name, path=env.get("PATH")):
            yield f"the program {name} is not on the PATH"
        if kind == "file" and not (benchmark.folder / name).exists():
            yield f"{benchmark.folder / name} does not exist"
    if benchmark.needs_dataset:
        folder = env.get("DATASETS_DIR", "")
        if not folder or not Path(folder).is_dir():
            yield f"needs real data, but DATASETS_DIR ('{folder}') is not a folder: set it to that of the data sets"
        for name in DATASET.findall(variant.text):
            path = Path(folder + name)
            path = path.parent if re.search(r"[*?\[{]", path.name) else path  # shards such as {00000..00099}.tar
            if not path.exists():
                yield f"{path} does not exist (DATASETS_DIR is {folder})"
    unset = dict.fromkeys(name for _, name in VARIABLE.findall(variant.text) if name not in env)
    if unset:
        yield f"the environment variable {' and '.join(unset)} is not set"
