"""What flags, headers, counts and permissions tell is told in one line, before an image is read or a byte fetched."""
from __future__ import annotations

import functools
import json
import os
import sys
import types
import urllib.request
from pathlib import Path

import pytest
import torch
from helpers import ROOT, in_threads, refused, run_script
from helpers import run as train_pairs
from PIL import Image
from safetensors.torch import load_file, save_file

import training.vqgan
from training import resume
from training.vqgan_options import COMMAND
from utils import errors
from utils.errors import UsageError, run_main
from utils.options import VERSION


@pytest.fixture
def untouched(monkeypatch, tmp_path):
    """Whoever opens an image or an address fails; caches are empty. Returns what was opened."""
    opened = []

    def refuse(*what, **_):
        opened.append(what)
        raise AssertionError(f"opened {what}")

    monkeypatch.setattr(Image, "open", refuse)
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", refuse)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    return opened


PUBLISHED = "--vqgan-model-path none --vqgan-config-path none"  # which would be downloaded
FITTING = f"{PUBLISHED} --image-size 16"
MINDALLE = "--architecture mindalle --num-attention-heads 2 --attn-types full"
# (flags, beside those of test_train.flags; what the error says)
TRAIN = [
    ("--image-size 18", "--image-size 18: .* multiple of 4, such as 16 or 20"),
    (f"{PUBLISHED} --image-size 10", "--image-size 10: .* multiple of 16, such as 16$"),
    (f"{PUBLISHED} --input-folder missing", "--input-folder missing: no such folder"),
    (f"{PUBLISHED} --validation-folder missing", "--validation-folder missing: no such folder"),
    (f"{PUBLISHED} --validation-folder {{1..3}}.tar", "--validation-folder .*: no such .tar file"),
    ("--pretrained-checkpoint minDALL-E/1.3B --input-folder missing", "--input-folder missing: no such folder"),
    ("--pretrained-checkpoint minDALL-E/1.3B --batch-size 1000", "; lower --batch-size or"),
    ("--pretrained-checkpoint minDALL-E/1.3B --wandb", "--wandb needs a package"),
    (f"{FITTING} --text-seq-len 1 --truncate-captions false", "--text-seq-len"),
    ("--bpe-path missing.txt", "missing.txt"),
    (f"{FITTING} --input-folder full", "--input-folder full: no pair of image and captions"),
    ("--device cuda", "--device cuda: PyTorch .* sees no CUDA GPU here"), ("--vqgan-config-path file", "file"),
    ("--pretrained-checkpoint file", "file is no checkpoint"),
    ("--pretrained-checkpoint demo.safetensors", "demo.safetensors has num_text_tokens = .*, but --bpe-path makes"),
    (f"{FITTING} --gradient-accumulation 1000", "fill one .*; lower --gradient-accumulation or"),
    (f"{FITTING} --batch-size 1000 --gradient-accumulation 1", "; lower --batch-size or give more"),
    (f"{FITTING} --batch-size 1000", "; lower --batch-size or"),
    (f"{FITTING} --replication-factor 1000", "; lower --replication-factor or"),
    ("--batch-size 99 --gradient-accumulation 99", "; lower --gradient-accumulation and --batch-size or"),
    ("--hidden-size 999999999", "with --hidden-size 999999999 and .* has .* channels; at most 1048576 are supported"),
    ("--image-size 80000", r"a code grid \(--image-size\) of 20000 the model has .* positions; at most 32768"),
    ("--num-hidden-layers 2000", "with --num-hidden-layers 2000 the model has 2000 layers; at most 1024"),
    ("--pretrained-checkpoint missing", "--pretrained-checkpoint missing: no such file or folder"),
    ("--log-dir file", "--log-dir file: is a file, not a folder"),
    (f"{FITTING} --wandb", "--wandb needs a package .*pip install wandb"),
    (f"{FITTING} --tensorboard", "--tensorboard needs a package"),
    (f"{FITTING} --evaluate-every 2 --inception-weights file", "--inception-weights: file is no checkpoint"),
    (f"{FITTING} --evaluate-every 2 --clip-path full", "--clip-path"),
    ("--checkpoint-output-dir file", "--checkpoint-output-dir file: file is a file, not a folder"),
    ("--checkpoint-output-dir file/ckpt", "--checkpoint-output-dir file/ckpt: "),
    ("--checkpoint-output-dir closed", "--checkpoint-output-dir closed: no permission"),
    (f"--export-mindalle full {MINDALLE}", "--export-mindalle full: .*not empty"),
    (f"{FITTING} --export-mindalle new {MINDALLE}", "a character BPE vocabulary"),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a file, a folder that nobody may write to, and one that is not empty."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for name in ("closed", "full"):
        Path(name).mkdir()
    Path("full", "a").touch()
    Path("demo.safetensors").symlink_to(ROOT / "models" / "demo" / "dalle.safetensors")
    may = os.access
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "closed" and may(path, mode))
    for package in ("wandb", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)
    return tmp_path


@pytest.mark.parametrize("words, message", TRAIN, ids=[words for words, _ in TRAIN])
def test_training(words, message, folder, place, untouched):
    refused(message, train_pairs, folder, place, *words.split(), "--cache-codes", "codes")
    assert not untouched and not Path("codes").exists() and not Path("metrics.jsonl").exists()


def test_wandb_without_a_key(folder, place, untouched, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Settings=lambda **_: None))
    Path("metrics.jsonl").write_text("an earlier run's\n")
    complaint = "--wandb: api_key not .*WANDB_MODE=offline"
    refused(complaint, train_pairs, folder, place, "--wandb", "--cache-codes", "codes")
    assert not untouched and not Path("codes").exists() and Path("metrics.jsonl").read_text() == "an earlier run's\n"


def test_a_resumed_run(folder, place, monkeypatch, request):
    """Other options and another VQGAN; and what was read is let go of once it is in the engine."""
    train_pairs(folder, place, "--max-steps", "1", "--cache-codes", "codes")
    changed = folder / "vqgan2.safetensors"
    save_file({name: value + 1 for name, value in load_file(str(folder / "vqgan.safetensors")).items()}, str(changed))
    untouched = request.getfixturevalue("untouched")  # from here on
    for words, message in (
        ("--random-seed 7", "written with --random-seed 42, not 7"),
        (f"--vqgan-model-path {changed}", "trained with another file"),
    ):
        refused(message, train_pairs, folder, place, "--resume", "--cache-codes", "other", *words.split())
    assert not untouched and not Path("other").exists()
    monkeypatch.undo()
    resumed, restore = [], resume.restore
    monkeypatch.setattr(resume, "restore", lambda run, start: (resumed.append(run), restore(run, start)))
    train_pairs(folder, place, "--resume", "--max-steps", "2", "--cache-codes", str(place / "codes"))
    assert resumed[0].resumed is None and resumed[0].position.step == 2


VQGAN = [
    ("--output file", "--output file: file is a file, not a folder"),
    ("--output closed", "--output closed: no permission to write there"),
    ("--input-folder missing", "--input-folder missing: no such folder"), ("--config file.yaml", "file.yaml"),
    ("--vqgan_model_path file --vqgan_config_path file", "file"), ("--perceptual-weights file", "file"),
    ("--resume --output full", "full/training.pt is no"),
]


@pytest.mark.parametrize("words, message", VQGAN, ids=[words for words, _ in VQGAN])
def test_training_of_a_vqgan(words, message, place, untouched):
    torch.save({"other": 1}, "full/training.pt")
    base = "--input-folder demo --output out --steps 1 --device cpu".split()
    refused(message, lambda: training.vqgan.train(COMMAND.parse([*base, *words.split()])))
    assert not untouched


@pytest.mark.parametrize("rank", [0, 1])
def test_of_processes_under_torchrun_one_speaks_and_leaves_its_line(rank, tmp_path, monkeypatch, capsys):
    def fail():
        raise UsageError("--batch-size:\nbad")

    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    assert refused("", run_main, fail, kind=SystemExit) == "2"
    assert capsys.readouterr().err == "error: --batch-size: bad\n"
    assert bool(slept) == (rank == 1)  # in which torchrun ends it, unless it alone has failed
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == message["extraInfo"]["py_callstack"] == "error: --batch-size: bad"


ENDS = {
    "raise UserError('no')": (1, ["error: no"]), "raise UsageError('no')": (2, ["error: no"]),
    "os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); sleep(60)": (1, ["error: process 1 was killed by SIGKILL"]),
    "return 0": (0, []),
}


def test_our_torchrun_adds_nothing(tmp_path):
    script = tmp_path / "script.py"
    bodies = "".join(f"    if sys.argv[1] == {body!r}: {body}\n" for body in ENDS)
    imports = "import os, sys\nfrom time import sleep\nfrom utils.errors import UsageError, UserError, run_main\n"
    script.write_text(f"{imports}def main():\n{bodies}run_main(main)\n")
    launch = ("-m", "utils.launch", "--nproc-per-node", "2", script)
    runs = [functools.partial(run_script, *launch, body, PYTHONPATH=str(ROOT)) for body in ENDS]
    for done, (status, lines) in zip(in_threads(*runs), ENDS.values()):
        assert (done.returncode, done.stderr.splitlines(), done.stdout) == (status, lines, "")


def test_a_process_that_imports_the_library_or_runs_a_program():
    """The hook for errors is left alone, PyTorch's compiler (a second, 70 MB) is not loaded, and more loader processes
    than cores are nothing to warn of."""
    code = "import runpy, sys; before = sys.excepthook; import dalle.models; assert sys.excepthook is before\n"
    code += "import training.command, evaluate; assert 'torch._dynamo' not in sys.modules\n"
    code += f"from utils.loading import make_loader; make_loader(range(3), workers={2 + (os.cpu_count() or 1)})\n"
    code += "sys.argv = ['train.py', '--version']; runpy.run_path('train.py', run_name='__main__')"
    done = run_script("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"mini-dalle {VERSION}\n", "")


@pytest.mark.parametrize("flag, status", [("--help", 0), ("--no-such-flag", 2)])
def test_the_flags_of_training_are_read_before_pytorch_is_imported(flag, status):
    code = f"import sys, train; sys.argv = ['train.py', {flag!r}]\n"
    code += "from utils.errors import run_main\ntry: run_main(train.main)\n"
    code += "finally: assert not {'torch', 'numpy', 'PIL'} & set(sys.modules)"
    assert run_script("-c", code).returncode == status


def test_a_python_without_the_packages_says_how_to_get_them():
    for program in ("train", "generate", "evaluate", "train_vqgan"):
        done = run_script("-S", f"{program}.py")
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"error: {sys.executable} has no package '") and "run_train.sh" in done.stderr
    late = run_script("-S", "-c", "import utils.start\nutils.start.done()\nwith utils.start.imports(): import no_such")
    assert (late.returncode, len(late.stderr.splitlines())) == (1, 1) and "has no package 'no_such'" in late.stderr


@pytest.mark.parametrize("body, last, status", [
    ("raise KeyboardInterrupt", "interrupted", -2),
    ("import utils.no_such", "ModuleNotFoundError: No module named 'utils.no_such'", 1),  # ours: a defect
    ("utils.start.done(); import no_such", "ModuleNotFoundError: No module named 'no_such'", 1),
    ("utils.start.done()\nwith utils.start.imports(): pass\nimport no_such",
     "ModuleNotFoundError: No module named 'no_such'", 1),
])
def test_what_stops_imports(body, last, status):
    done = run_script("-S", "-c", f"import utils.start\n{body}")
    lines = done.stderr.splitlines()
    assert done.returncode == status and lines[-1] == last and (len(lines) == 1) == (last == "interrupted")
