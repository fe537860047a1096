"""Python 3.8, which the Poplar SDK brings, runs what `train.py --device ipu` imports; nothing else has to run there."""
from __future__ import annotations

import ast
import os
import shutil
import subprocess

import pytest
from helpers import ROOT
from test_structure import nodes

#: What only other devices import.
NOT_ON_IPUS = {"engines.native"}
PROGRAM = """
import sys
import args, engines.ipu, train
config = args.parse(["--config", "L16", "--device", "ipu", "--generated-data"])
assert config.execution.device == "ipu", config
assert not {"engines.native"} & set(sys.modules)
"""


def source(module):
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def names(module):
    """The names that a module of ours imports anywhere, and its packages."""
    package = module.rpartition(".")[0]
    yield package
    here = module if source(module).name == "__init__.py" else package
    for node in nodes(source(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = here.split(".")[: len(here.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*base, *filter(None, [node.module])])
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def test_the_closure_over_imports_parses_and_is_what_an_ipu_host_needs():
    found, left = set(), ["train", "engines.ipu"]
    while left:
        module = left.pop()
        if module and module not in found | NOT_ON_IPUS and source(module):
            found.add(module)
            left += names(module)
    assert {"args", "engines.ipu.plan", "training.run", "models.transformer", "utils.metrics"} <= found
    assert not {"engines.native", "benchmarks", "examples_utils", "generate"} & found


def test_the_ipu_path_is_imported_and_parses_flags_on_python_38():
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONWARNINGS"}

    def run(python, program):
        return subprocess.run([python, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)

    check = "import sys; assert sys.version_info[:2] == (3, 8); import torch"
    here = filter(shutil.which, ("python3.8", "python3", "python"))
    python = next((name for name in here if run(name, check).returncode == 0), None)
    if python is None:
        pytest.skip("no Python 3.8 with PyTorch on the PATH")
    done = run(python, PROGRAM)
    assert done.returncode == 0, done.stderr
