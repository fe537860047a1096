"""The house keeps its order: imports point one way, configurations instantiate, documents name what exists."""
from __future__ import annotations

import ast
import functools
import os
import shutil
import subprocess

import pytest
import torch
import yaml
from helpers import ROOT

import args
import engines.native
from bpe import load_tokenizer
from docs import make_flags
from models.dalle import DalleModel
from models.vqgan import VQGAN
from training.schedule import Position, Schedule
from training.setup import dalle_config, vqgan_config
from utils.options import VERSION

COMMANDS = {"train", "generate", "evaluate", "serve", "train_vqgan"}
OURS = COMMANDS | {"args", "benchmarks", "bpe", "checkpoints", "dalle", "data", "engines", "examples_utils", "log"}
OURS |= {"metrics", "models", "ops", "sampling", "server", "training", "utils"}

#: What each part may import of ours. Commands (scripts, examples, benchmarks) may import everything but each other.
ARROWS = {
    "utils": set(), "log": {"utils"}, "bpe": {"utils"}, "ops": {"utils"}, "models": {"ops", "utils"},
    "checkpoints": {"models", "utils"}, "data": {"bpe", "utils"}, "args": {"models", "data", "utils"},
    "sampling": {"models", "ops", "utils"}, "metrics": {"checkpoints", "data", "log", "models", "utils"},
    "dalle": {"checkpoints", "data", "metrics", "models", "sampling", "bpe", "log", "utils"},
    "server": {"dalle", "data", "sampling", "utils"},
    "engines": {"args", "checkpoints", "data", "models", "ops", "utils", "log"},
    "training": {"args", "bpe", "checkpoints", "dalle", "data", "engines", "log", "metrics", "models", "sampling"}
    | {"utils"},
    "benchmarks": {"args", "bpe", "dalle", "data", "engines", "log", "models", "ops", "sampling", "training", "utils"},
    "examples_utils": {"args", "bpe", "dalle", "data", "engines", "log", "models", "utils"},
}
CONFIGURATIONS = [
    name for name in yaml.safe_load((ROOT / "configs.yaml").read_text()) if name[0] != "." and name != "defaults"
]
PUBLISHED = "L16 L16_POD16 L16_POD64 L16_CLIP_vocab M16 unit_test demo minDALLE_1.3B minDALLE_tiny".split()
DEVICE_PACKAGES = {"poptorch", "popdist", "popart", "horovod"}

#: The most lines of a module and of a function. (Ruff counts arguments.)
MODULE_LINES, FUNCTION_LINES = 450, 60


def sources():
    """(part, path) of every Python file of the project outside tests/."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    for path in [ROOT / name for name in tracked] or ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).parts[0]
        if part not in ("tests", ".venv", "output", "outputs") and path.is_file():
            yield part.replace(".py", ""), path


@functools.lru_cache(maxsize=None)
def nodes(path):
    """The imports and functions of a file, as the Python of the Poplar SDK reads it."""
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef)
    tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def imported(path):
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    for part, path in sources():
        allowed, found = ARROWS.get(part, OURS - COMMANDS) | {part}, set(imported(path))
        assert found & OURS <= allowed, path
        assert part == "engines" or not found & DEVICE_PACKAGES, path


def test_no_module_and_no_function_is_too_long():
    for _, path in sources():
        assert len(path.read_bytes().splitlines()) <= MODULE_LINES, path
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert node.end_lineno - node.lineno < FUNCTION_LINES, (path, node.name)


tokenizer_of = functools.lru_cache(maxsize=None)(load_tokenizer)


@pytest.mark.parametrize("name", CONFIGURATIONS + [name for name in PUBLISHED if name not in CONFIGURATIONS])
def test_every_shipped_configuration_instantiates(name):
    """At full size, without memory: on the meta device, with its own vocabulary and the codebook it is meant for."""
    config = args.parse(["--config", name, "--generated-data"])
    tokenizer = tokenizer_of(config.data.bpe_path)
    with torch.device("meta"):
        dalle = DalleModel(dalle_config(config, tokenizer, VQGAN(vqgan_config(config))))
    parameters = sum(p.numel() for p in dalle.parameters())
    if name.startswith(("L16", "M16")):
        assert parameters == pytest.approx(93.6e6 if name != "L16_CLIP_vocab" else 136e6, rel=0.02)
    if name == "minDALLE_1.3B":  # the published vocabulary is smaller than the one at hand
        assert parameters - 2 * 1536 * (tokenizer.vocab_size - 16384) == 1291081728
    assert sum(config.ipu.layers_per_ipu) == config.model.num_hidden_layers
    assert Schedule(config, 10 * config.global_batch).learning_rate(Position()) > 0
    for world_size in (1, 2):
        if config.global_batch % world_size == 0:
            batching = engines.native.split_batch(config.global_batch, config.execution.batch_size, world_size)
            assert batching.global_batch == config.global_batch


def test_the_list_of_flags_is_that_of_the_declarations_and_the_version_is_said_once():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert text == make_flags.page(), "docs/flags.md is stale: python -m docs.make_flags writes it anew"
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


# ---- Python 3.8, which the Poplar SDK brings, runs what `train.py --device ipu` imports; nothing else has to run there

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
