"""The house keeps its order: imports point one way, configurations instantiate, documents name what exists."""
from __future__ import annotations

import ast
import functools
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
    "utils": set(),
    "log": {"utils"},
    "bpe": {"utils"},
    "ops": {"utils"},
    "models": {"ops", "utils"},
    "checkpoints": {"models", "utils"},
    "data": {"bpe", "utils"},
    "args": {"models", "data", "utils"},
    "sampling": {"models", "ops", "utils"},
    "metrics": {"checkpoints", "data", "log", "models", "utils"},
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
