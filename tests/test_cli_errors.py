"""Every error of every command: one line on stderr that names flag or file; exit status 2 for usage, 1 for the rest.

The commands run in this process, with their real `main` under the real `run_main`; a few run as real processes, too.
"""
from __future__ import annotations

import gzip
import os
import pickle
import sys
import zipfile

import pytest
import torch
from helpers import ROOT, refused, run_script
from PIL import Image

import args
import bpe.train
import checkpoints.__main__
import dalle.export
import data.process_trainset
import evaluate
import examples_utils.runner
import generate
import serve
import server.options
import train
import train_vqgan
import utils.archives
from dalle import evaluation, generation
from ops.explain import main as ops_main
from training import vqgan_options
from utils.errors import run_main
from utils.options import VERSION, Parser

DEMO = ROOT / "models" / "demo"

MAINS = {
    "train": train.main, "generate": generate.main, "evaluate": evaluate.main, "train_vqgan": train_vqgan.main,
    "process_trainset": data.process_trainset.main, "bpe.train": bpe.train.main,
    "examples_utils": examples_utils.runner.main, "checkpoints": checkpoints.__main__.main,
    "archives": utils.archives.main, "serve": serve.main, "dalle.export": dalle.export.main, "ops": ops_main,
}
# What each command needs beside the flag that is wrong.
BASE = {
    "train": "--config demo --device cpu --max-steps 1 --checkpoint-output-dir out/ckpt",
    "generate": "--dalle_path demo --text a --num_images 1 --device cpu --outputs_dir out",
    "evaluate": "--dalle_path demo --skip_retrieval --device cpu --max_pairs 1",
    "train_vqgan": "--input-folder demo --steps 1 --device cpu --output out/vqgan", "serve": "--dalle_path demo",
    "process_trainset": "--captions captions.json --out-dir out",
    "bpe.train": "--captions captions.json --vocab-size 30 --output out/vocab.txt",
    "examples_utils": "benchmark --spec benchmarks.yml --log-dir out/logs", "ops": "",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of files of every kind: what a user gives by mistake."""
    place = tmp_path_factory.mktemp("cli")
    (place / "folder").mkdir()
    for name, content in {
        "captions.json": b'{"annotations": [{"image_id": 1, "caption": "a cat sits"}]}', "empty": b"",
        "benchmarks.yml": b"a_gen:\n  cmd: python3 train.py\n", "text.txt": b"hello\n", "list.json": b"[1, 2",
        "html": b"<!DOCTYPE html><html><body>404</body></html>", "yaml.yaml": b"a: [1\n",
        "binary": bytes(range(256)) * 20, "pickle": pickle.dumps({"a": 1}), "packed.gz": gzip.compress(b"hello"),
    }.items():
        (place / name).write_bytes(content)
    with zipfile.ZipFile(str(place / "packed.zip"), "w") as archive:
        archive.writestr("a.txt", "hello")
    Image.new("RGB", (8, 8)).save(place / "picture.png")
    torch.save({"weights": {"x": torch.ones(2)}}, str(place / "other.pt"))
    torch.save([1, 2], str(place / "list.pt"))
    return place


@pytest.fixture
def command(place, tmp_path, monkeypatch, capfd):
    """Run a command in a folder of its own that has the files of `place`; returns (status, lines of stderr)."""
    for path in place.iterdir():
        (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    monkeypatch.chdir(tmp_path)

    def run(program, words):
        monkeypatch.setattr(sys, "argv", [program, *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(MAINS[program])
        return ended.value.code, capfd.readouterr().err.splitlines()

    return run


def without(program, flag):
    """What a command needs, without one of its flags."""
    words = BASE[program].split()
    if flag in words:
        del words[words.index(flag) : words.index(flag) + 2]
    return words


def check(result, status, *names):
    """One line that starts with "error: ", names what is wrong, and is the last one; no traceback anywhere."""
    code, lines = result
    assert code == status, lines
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1 and errors[0] == lines[-1], lines
    assert not any("Traceback" in line for line in lines) and len(errors[0]) < 1000
    if status == 2:
        assert len(lines) == 1, lines
    assert all(name in errors[0] for name in names), errors[0]


COMMANDS = {
    "train": args.COMMAND, "generate": generation.COMMAND, "evaluate": evaluation.COMMAND,
    "train_vqgan": vqgan_options.COMMAND, "process_trainset": data.process_trainset.COMMAND,
    "bpe.train": bpe.train.COMMAND, "examples_utils": examples_utils.runner.COMMAND, "serve": server.options.COMMAND,
}


@pytest.mark.parametrize("program", COMMANDS)
def test_a_value_of_the_wrong_type_names_its_flag(program, command):
    specs = COMMANDS[program].specs.values()  # those that take something else than any text or path
    flags = [spec for spec in specs if spec.kind is not str or "choices" in spec.settings]
    assert flags
    for spec in flags:
        for value in ("wrong!", *(["1e400"] if spec.name in ("batch_size", "learning_rate", "temperature") else [])):
            check(command(program, [*BASE[program].split(), spec.flag + "=" + value]), 2, spec.flag)


@pytest.mark.parametrize("program", MAINS)
def test_the_version_is_that_of_the_project(program, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [program, "--version"])
    assert refused("", run_main, MAINS[program], kind=SystemExit) in ("0", "None", "")
    assert capsys.readouterr().out == f"mini-dalle {VERSION}\n"


NEAR = {
    "train": ("--batchsize", "--batch-size"), "generate": ("--num_image", "--num-images"),
    "evaluate": ("--inputfolder", "--input-folder"), "train_vqgan": ("--minute", "--minutes"),
    "process_trainset": ("--outdir", "--out-dir"), "bpe.train": ("--vocabsize", "--vocab-size"),
    "examples_utils": ("--includeconvergence", "--include-convergence"), "ops": ("--versio", "--version"),
    "serve": ("--hosts", "--host"),
}


@pytest.mark.parametrize("program", NEAR)
def test_unknown_flags_and_the_nearest_one_are_named(program, command):
    base, (flag, near) = BASE[program].split(), NEAR[program]
    check(command(program, [*base, flag + "=3"]), 2, flag, f"Did you mean '{near}'")
    for words, named in (("--no-such-flag-at-all", "--no-such-flag-at-all"), ("-- stray", "--")):
        check(command(program, [*base, *words.split()]), 2, named)


KINDS = ["missing", "folder", "empty", "text.txt", "html", "list.json", "yaml.yaml", "binary", "pickle", "packed.gz"]
KINDS += ["packed.zip", "picture.png", "other.pt", "list.pt"]
# (command, flag, other words, kinds of files that are right for it)
FILES = [
    ("train", "--bpe-path", "", ()), ("train", "--vqgan-model-path", "--vqgan-config-path {config}", ()),
    ("train", "--vqgan-config-path", "--vqgan-model-path {model}", ()), ("train", "--pretrained-checkpoint", "", ()),
    ("generate", "--dalle_path", "", ()), ("generate", "--vqgan_model_path", "--vqgan_config_path {config}", ()),
    ("generate", "--bpe_path", "", ()), ("generate", "--vqgan_config_path", "--vqgan_model_path {model}", ()),
    ("generate", "--prompts_file", "", ("text.txt", "html", "yaml.yaml", "empty")),
    ("generate", "--prime_image", "", ("picture.png",)), ("generate", "--image", "--mask 0,0,1,1", ("picture.png",)),
    ("generate", "--mask", "--image picture.png", ("picture.png",)), ("evaluate", "--dalle_path", "", ()),
    ("evaluate", "--bpe_path", "", ()), ("train_vqgan", "--vqgan_model_path", "--vqgan_config_path {config}", ()),
    ("train_vqgan", "--vqgan_config_path", "--vqgan_model_path {model}", ()),
    ("train_vqgan", "--perceptual-weights", "--config f8_demo", ()), ("examples_utils", "--spec", "", ()),
    ("process_trainset", "--captions", "", ()), ("bpe.train", "--captions", "", ("text.txt", "html", "yaml.yaml")),
    ("examples_utils", "--requirements-file", "", tuple(KINDS[2:])),
    ("examples_utils", "--custom-metrics-files", "", tuple(KINDS[2:])),
]


def text_of(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("program, flag, others, right", FILES, ids=text_of)
def test_missing_files_and_files_of_the_wrong_kind(program, flag, others, right, command):
    others = others.format(config=DEMO / "vqgan.yaml", model=DEMO / "vqgan.safetensors").split()
    for kind in (kind for kind in KINDS if kind not in right):
        check(command(program, [*without(program, flag), *others, flag, kind]), 1, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_and_configurations_of_the_wrong_kind(kind, command):
    check(command("train", ["--config-file", kind, "--config", "demo", "--generated-data"]), 2, kind)
    check(command("checkpoints", ["export", kind, "out.safetensors"]), 1, kind)
    if kind not in ("other.pt", "list.pt", "packed.zip"):  # whole files, of whatever
        check(command("checkpoints", ["verify", kind]), 1, kind)


FOLDERS = [
    ("train", "--input-folder"), ("train", "--validation-folder"), ("evaluate", "--input_folder"),
    ("train_vqgan", "--input-folder"),
]


@pytest.mark.parametrize("program, flag", FOLDERS)
def test_folders_of_data(program, flag, command):
    for kind in ("missing", "folder", "text.txt", "picture.png"):
        check(command(program, [*without(program, flag), flag, kind]), 1, flag.replace("_", "-"), kind)


OUTPUTS = [
    ("train", "--checkpoint-output-dir", "text.txt/ckpt"), ("generate", "--outputs_dir", "text.txt"),
    ("evaluate", "--json", "text.txt/a.json"), ("train_vqgan", "--output", "text.txt"),
    ("process_trainset", "--out-dir", "text.txt"), ("bpe.train", "--output", "text.txt/vocab.txt"),
    ("examples_utils", "--log-dir", "text.txt"),
]


@pytest.mark.parametrize("program, flag, target", OUTPUTS)
def test_places_that_cannot_be_written(program, flag, target, command):
    words = [*without(program, flag), flag, target]
    check(command(program, words), 1, flag.replace("_", "-"), "text.txt is a file, not a folder")


WORDS = [  # more of them are in the tests of each command
    ("train", "--config demmo", 2, ["--config", "demmo", "Did you mean 'demo'"]),
    ("train", "--config demo --max-bad-fraction 2", 2, ["--max-bad-fraction", "at most 1"]),
    ("train", "demo", 2, ["demo"]), ("generate", "--text a", 2, ["--dalle-path"]),
    ("generate", "--dalle_path demo", 2, ["--text"]),
    ("generate", "--dalle_path demo --text a --vqgan_config_path x.yaml", 2, ["--vqgan-model-path"]),
    ("generate", "--dalle_path demo --text a --image picture.png --mask 0,0,2,1 --num_images 1", 2, ["--mask 0,0,2,1"]),
    ("generate", "--dalle_path demo --text a --image picture.png --mask picture.png", 1, ["--mask: nothing is marked"]),
    ("generate", "--dalle_path demo --text a --clip_path folder --num_images 1", 1, ["--clip-path", "folder"]),
    ("evaluate", "--skip_retrieval", 2, ["--dalle-path"]), ("serve", "", 2, ["--dalle-path"]),
    ("serve", "--dalle_path demo --slots 1 --cond_scale 2", 2, ["--slots 1", "--cond-scale"]),
    ("serve", "--dalle_path missing --port 0", 1, ["--dalle-path missing"]),
    ("serve", "--dalle_path demo --port 0 --clip_path missing", 1, ["--clip-path"]),
    ("evaluate", "--dalle_path demo --json a.png --sheet ./a.png", 2, ["--json and --sheet", "a.png"]),
    ("train_vqgan", "--input-folder demo --output out --steps 1 --config f9", 2, ["--config", "f9"]),
    ("train_vqgan", "--input-folder demo --output out --steps 1 --config missing.yaml", 1, ["missing.yaml"]),
    ("process_trainset", "--captions", 2, ["--captions"]),
    ("process_trainset", "--max-bad-fraction 2", 2, ["--max-bad-fraction"]),
    ("bpe.train", "--captions text.txt", 2, ["--vocab-size", "--output"]),
    ("bpe.train", "--captions text.txt --vocab-size 30 --output ./text.txt", 2, ["--output", "is one of --captions"]),
    ("bpe.train", "--captions text.txt --vocab-size 30 --output o --coverage 2", 2, ["--coverage"]),
    ("examples_utils", "benchmark --benchmark no_such --spec benchmarks.yml", 1, ["--benchmark", "no_such"]),
    ("checkpoints", "", 2, ["command", "export or verify"]),
    ("checkpoints", "exprot a b", 2, ["exprot", "export or verify", "Did you mean 'export'"]),
    ("checkpoints", "export a", 2, ["OUT"]), ("checkpoints", "verify a --half", 2, ["--half"]),
    ("dalle.export", "a", 2, ["FOLDER"]),
    ("dalle.export", "a text.txt", 1, ["FOLDER text.txt", "is a file, not a folder"]), ("ops", "stray", 2, ["stray"]),
    ("bpe.train", "--captions text.txt --vocab-size 30 --output o --kind char --coverage 0.9", 2, ["--coverage"]),
    ("train_vqgan", "--input-folder demo --output out --steps 1 --discriminator-weight 1", 2, ["-start"]),
    ("archives", "", 2, ["URL"]), ("archives", "http://example.org/a.zip a.zip", 1, ["https"]),
    ("archives", "ftp://example.org/a.zip a.zip", 1, ["ftp"]),
    ("archives", "https://example.org/a.zip a.zip --size-limit x", 2, ["--size-limit"]),
    ("checkpoints", "export text.txt ./text.txt", 2, ["OUT ./text.txt", "would replace the checkpoint"]),
    ("checkpoints", "export a text.txt/b", 1, ["OUT text.txt/b", "is a file, not a folder"]),
]


@pytest.mark.parametrize("program, words, status, names", WORDS, ids=text_of)
def test_contradictions_and_unknown_names(program, words, status, names, command):
    if "--clip_path folder" in words:
        pytest.importorskip("transformers")
    check(command(program, words.split()), status, *names)


@pytest.mark.parametrize("value", ["x\ny", "x\udcff", "-rf", "$(touch trap)", "x" * 5000, "../../../x", "\u202ex"])
def test_odd_names_of_files_stay_one_line(value, command):
    for program, flag in (("train", "--bpe-path"), ("generate", "--dalle_path"), ("process_trainset", "--captions")):
        code, lines = command(program, [*without(program, flag), flag + "=" + value])
        assert code == 1 and lines[-1].startswith("error: "), lines
        assert not any("Traceback" in line for line in lines) and not os.path.exists("trap")


def test_the_parser_says_nothing_itself(capfd):
    assert refused("", run_main, lambda: Parser(prog="x").parse_args(["--y"]) and None, kind=SystemExit) == "2"
    assert capfd.readouterr() == ("", "error: unrecognized arguments: --y\n")


SCRIPTS = [
    (["train.py", "--config", "demo", "--batch-size", "x"], 2, "--batch-size"),
    (["-m", "bpe.train", "--vocab-size", "x", "--captions", "a", "--output", "b"], 2, "--vocab-size"),
    (["-m", "checkpoints", "verify", "missing.pt"], 1, "missing.pt"),
    (["data/process_trainset.py", "--captions", "missing.json"], 1, "missing.json"),
]


@pytest.mark.slow
@pytest.mark.parametrize("words, status, name", SCRIPTS)
def test_as_processes(words, status, name):
    done = run_script(*words)
    lines = done.stderr.splitlines()
    assert done.returncode == status and len(lines) == 1 and lines[0].startswith("error: ") and name in lines[0]
    assert not done.stdout
