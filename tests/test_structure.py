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

COMMANDS = {"train", "generate", "evaluate", "train_vqgan"}
OURS = COMMANDS | {"args", "benchmarks", "bpe", "checkpoints", "dalle", "data", "engines", "examples_utils", "log"}
OURS |= {"metrics", "models", "ops", "sampling", "training", "utils"}

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
    "engines": {"args", "checkpoints", "data", "models", "ops", "utils", "log"},
    "training": {"args", "bpe", "checkpoints", "dalle", "data", "engines", "log", "models", "utils"},
    "benchmarks": {"args", "bpe", "engines", "log", "models", "ops", "sampling", "training", "utils"},
    "examples_utils": {"args", "bpe", "dalle", "data", "engines", "log", "models", "utils"},
}
DEVICE_PACKAGES = {"poptorch", "popdist", "popart", "horovod"}

#: The most lines of a module and of a function, and arguments of a function besides self; and who takes more.
MODULE_LINES, FUNCTION_LINES, ARGUMENTS = 450, 60, 8
MANY_ARGUMENTS = {
    "dalle/models.py generate": 14,  # minDALL-E's
    "data/code_cache.py __init__": 9,
    "examples_utils/process.py run": 9,
    "ops/linear_ops.py add_feed_forward": 9,  # what one branch is made of
    "ops/linear_ops.py forward": 10,  # autograd takes no keywords
}


def sources():
    """(part, path) of every Python file of the project outside tests/."""
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    files = [ROOT / name for name in tracked] or [
        path
        for path in ROOT.rglob("*.py")
        if not set(path.relative_to(ROOT).parts[:-1]) & {".venv", "output", "outputs"}
    ]
    for path in files:
        parts = path.relative_to(ROOT).parts
        if parts[0] != "tests" and path.is_file():
            yield (parts[0][:-3] if len(parts) == 1 else parts[0]), path


@functools.lru_cache(maxsize=None)
def nodes(path):
    """All of a file's syntax, as the Python of the Poplar SDK reads it."""
    return list(ast.walk(ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 8))))


def imported(path):
    """Top-level names of the modules that a file imports, anywhere in it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_imports_point_one_way():
    wrong = []
    for part, path in sources():
        allowed = ARROWS.get(part, OURS - COMMANDS) | {part}
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}"
            for name in imported(path)
            if name in OURS and name not in allowed
        ]
    assert not wrong


def test_device_packages_are_imported_by_engines_alone():
    wrong = [
        str(path.relative_to(ROOT))
        for part, path in sources()
        if part != "engines" and DEVICE_PACKAGES & set(imported(path))
    ]
    assert not wrong


def functions():
    """("path name", its syntax) of every function."""
    for _, path in sources():
        for node in nodes(path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield f"{path.relative_to(ROOT)} {node.name}", node


def num_arguments(function):
    arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
    return len([argument for argument in arguments if argument.arg not in ("self", "cls")])


def above(sizes, limit, exceptions):
    return {name: size for name, size in sizes if size > exceptions.get(name, limit)}


def test_no_module_and_no_function_is_too_long():
    modules = ((str(path.relative_to(ROOT)), len(path.read_bytes().splitlines())) for _, path in sources())
    assert not above(modules, MODULE_LINES, {})
    lengths = ((name, node.end_lineno - node.lineno + 1) for name, node in functions())
    assert not above(lengths, FUNCTION_LINES, {})


def test_no_function_takes_too_many_arguments():
    """What ruff's PLR0913 asks for, with the exceptions in one place."""
    assert not above(((name, num_arguments(node)) for name, node in functions()), ARGUMENTS, MANY_ARGUMENTS)


def configurations():
    names = yaml.safe_load((ROOT / "configs.yaml").read_text())
    return [name for name in names if not name.startswith(".") and name != "defaults"]


def test_the_published_configurations_are_there():
    published = {"L16", "L16_POD16", "L16_POD64", "L16_CLIP_vocab", "unit_test", "demo"}
    assert published | {"minDALLE_1.3B", "minDALLE_tiny"} <= set(configurations())


@pytest.mark.parametrize("name", configurations())
def test_every_shipped_configuration_instantiates(name):
    """At full size, without memory: on the meta device, with its own vocabulary and the codebook it is meant for."""
    config = args.parse(["--config", name, "--generated-data"])
    tokenizer = load_tokenizer(config.data.bpe_path)
    with torch.device("meta"):
        dalle = DalleModel(dalle_config(config, tokenizer, VQGAN(vqgan_config(config))))
    parameters = sum(p.numel() for p in dalle.parameters())
    if name.startswith("L16"):
        assert parameters == pytest.approx(93.6e6 if name != "L16_CLIP_vocab" else 136e6, rel=0.02)
    if name == "minDALLE_1.3B":  # the published vocabulary is smaller than the one at hand
        assert parameters - 2 * 1536 * (tokenizer.vocab_size - 16384) == 1291081728
    assert sum(config.ipu.layers_per_ipu) == config.model.num_hidden_layers
    schedule = Schedule(config, 10 * config.global_batch)
    assert schedule.learning_rate(Position()) > 0
    for world_size in (1, 2):
        if config.global_batch % world_size == 0:
            batching = engines.native.split_batch(config.global_batch, config.execution.batch_size, world_size)
            assert batching.global_batch == config.global_batch


def test_the_list_of_flags_is_that_of_the_declarations():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    assert text == make_flags.page(), "docs/flags.md is stale: python -m docs.make_flags writes it anew"


def test_the_version_is_said_once():
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
