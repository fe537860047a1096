"""README.md, CONTRIBUTING.md, docs/: links and promises lead somewhere; a command works, or needs what is not here."""
from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, write_pairs
from PIL import Image

import args
import examples_utils.runner
import server.options
import training.vqgan_options
from benchmarks import busy, compare_peers, serve_load
from dalle import evaluation, generation
from docs import make_gallery
from examples import transfer_learning_ex

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    """(document, text) of each fenced block in a language."""
    for path in DOCUMENTS:
        for block in re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.S):
            yield path.name, block


def commands():
    found = {}
    for _, block in blocks("bash"):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if command:
                found[command] = None
    return list(found)


# ---- what stands in the documents


def anchors(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_exist(path):
    missing = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", path.read_text(encoding="utf-8")):
        file = path.parent / target if target else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(f"{target}#{anchor}")
    assert not missing


def test_the_readme_is_short_and_every_document_two_hops_from_it():
    assert len(DOCUMENTS[0].read_text(encoding="utf-8").splitlines()) <= 200
    reached = {DOCUMENTS[0]}
    for _ in range(2):
        for path in list(reached):
            targets = re.findall(r"\]\(([^)#:]+\.md)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
            reached |= {(path.parent / target).resolve() for target in targets if (path.parent / target).exists()}
    assert set(DOCUMENTS) <= reached


def test_the_gallery_is_what_its_command_writes(tmp_path, monkeypatch):
    """With fewer pictures."""
    sheets = sorted((ROOT / "docs/images").glob("gallery_*.png"))
    assert len(sheets) == 4 and all(file.stat().st_size < 400_000 for file in sheets)
    small = {"FILE": tmp_path / "gallery.md", "KNOWN": ["pizza"], "UNKNOWN": ["42"], "SIZE": 2, "CANDIDATES": 2}
    small["BOXES"] = {"wolf": (0, 0.5, 1, 1)}
    for name, value in small.items():
        monkeypatch.setattr(make_gallery, name, value)
    (tmp_path / "images").mkdir()
    make_gallery.main()
    assert (tmp_path / "gallery.md").read_text() == (ROOT / "docs/gallery.md").read_text(), "run its command"
    assert sorted(file.name for file in (tmp_path / "images").iterdir()) == [file.name for file in sheets]


def test_every_promise_names_a_test_that_exists():
    """Each row of docs/reliability.md, which says so where only the slow suite runs its proof."""
    lines = (ROOT / "docs/reliability.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert table[0] == ["promise", "how", "proof"]
    for promise, how, proof in (row for row in table[2:] if not row[0].startswith("**")):
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`( \(slow\))?", proof)
        assert promise and how and named, promise
        for file, name, slow in named:
            text = (ROOT / "tests" / file).read_text(encoding="utf-8")
            found = re.search(rf"^((?:[@ #)\]].*\n)*)def {name}\(", text, flags=re.M)  # and what decorates it
            assert found, f"{promise}: no {name} in {file}"
            assert ("@pytest.mark.slow\n" in found[1]) == bool(slow), f"{promise}: is {name} slow?"


# ---- commands that need what is not here, each with the reason

NOT_HERE = {
    r"bash run_tests\.sh( .*)?": "runs this suite", r"bash run_train\.sh": "trains for a quarter of an hour",
    r"\. .*": "enters an environment", r"(python3\.8 -m venv|pip install) .*": "installs packages",
    r"bash utils/make_constraints\.sh": "asks a registry for all versions",
    r"bash utils/download_coco_dataset\.sh": "downloads 26 GB; test_downloads.py runs it on small archives",
    r"python -m pytest tests/cpu_ipu_test\.py -rs": "needs an IPU",
    r"curl .*": "asks a server; test_server.py runs them",
}

# ---- commands that are parsed: they train for long, or need an accelerator, a download or several processes

PARSED = {
    r"(?:torchrun --nproc-per-node \d+ |poprun (?:--[\w-]+ \w+ )+python )train\.py (.*)": args.parse,
    r"(?:NPROC=\d+ |poprun (?:--[\w-]+ \w+ )+)?bash run_train\.sh (.+)": lambda words: args.parse(["--config", *words]),
    r"python train\.py(?: (?!.*minDALLE_tiny)(.*))?": args.parse,
    r"python train_vqgan\.py (.*)": training.vqgan_options.COMMAND.parse,
    r"python examples/transfer_learning_ex\.py (.*)": transfer_learning_ex.COMMAND.parse,
    r"python3 -m examples_utils (.*)": lambda words: examples_utils.runner.COMMAND.parse(words[1:]),
    r"python benchmarks/compare_peers\.py (.*)": compare_peers.COMMAND.parse,
    r"(?:torchrun --nproc-per-node \d+|python) evaluate\.py (.*(?:--metrics|--images).*)": evaluation.COMMAND.parse,
    r"torchrun --nproc-per-node \d+ generate\.py (.*)": generation.COMMAND.parse,
    r"python benchmarks/busy\.py (.*)": busy.COMMAND.parse,
    r"python benchmarks/serve_load\.py(?: (.*))?": serve_load.COMMAND.parse,
    r"python serve\.py (.*)": server.options.COMMAND.parse,
}

# ---- commands that run, in a folder that has what they name; the flags make them small

ONE_STEP = ["--max-steps", "1", "--cache-codes", "off", "--validation-fraction", "0"]
RUN = {
    r"python train\.py (.*minDALLE_tiny.*)": [*ONE_STEP, "--checkpoint-output-dir", "again/ckpt"],
    r"python generate\.py (.*)": ["--num_images", "2"],
    r"python evaluate\.py ((?!.*(?:--metrics|--images|--scorer)).*)": ["--max_pairs", "4", "--skip_retrieval"],
    r"python evaluate\.py (.*--scorer.*)": ["--num-images", "2"],
    r"python data/process_trainset\.py()": ["--captions", "captions.json", "--out-dir", "captions"],
    r"python data/process_trainset\.py (.+)": [], r"python -m bpe\.train (.*)": ["--vocab-size", "60"],
    r"python -m (?:checkpoints|dalle\.export) (.*)": [], r"python -m ops()": [],
    r"python examples/sampling_ex\.py (.*)": ["-n", "2"], r"python benchmarks/chart\.py (.*)": [],
}


def ways(table):
    """[(command, its flags, value in the table)] of each command that the table knows."""
    found = [(re.fullmatch(pattern, command), value) for command in commands() for pattern, value in table.items()]
    return [(match[0], shlex.split("".join(match.groups(""))), value) for match, value in found if match]


def test_every_command_is_run_or_parsed_or_needs_what_is_not_here():
    everything = {**NOT_HERE, **PARSED, **RUN}
    known = [command for command, _, _ in ways(everything)]
    assert sorted(known) == sorted(commands()) and len(known) > 30
    assert not [pattern for pattern in everything if not any(re.fullmatch(pattern, command) for command in known)]


def by_command(value):
    return value if isinstance(value, str) else ""


@pytest.mark.parametrize("command, words, parse", ways(PARSED), ids=by_command)
def test_a_command_is_taken_by_its_own_parser(command, words, parse, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = re.search(r"[\w/]+\.(py|sh)", command)
    assert script is None or Path(script[0]).is_file()
    parse(words)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with the files that commands name: a model trained for one step, pairs, lists of captions."""
    folder = tmp_path_factory.mktemp("documents")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run("python train.py", ["--config", "minDALLE_tiny", "--export-mindalle", "tuned", *ONE_STEP], patch)
    trained = next((folder / "output/minDALLE_tiny/ckpt").glob("*.pt"))
    coco = {"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"id": 1, "image_id": 1, "caption": "A cat."}]}
    texts = {
        "prompts.txt": "grinning cat\nred apple\n", "captions.json": json.dumps(coco),
        "flickr8k/captions.txt": "image,caption\n" + "0.jpg,a dog runs over the grass\n" * 5,
    }
    copies = {
        "output/ckpt/dalle_799.pt": trained, "output/minDALLE_tiny/ckpt/dalle_0_60.pt": trained,
        "output/transfer/transfer-imagenet-clscond-gen/ckpt/dalle_7.pt": trained,
        "docs/images/compare_peers.json": ROOT / "docs/images/compare_peers.json",
    }
    for name in (*texts, *copies):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(texts[name].encode() if name in texts else copies[name].read_bytes())
    Image.new("RGB", (64, 64), "red").save(folder / "face.png")
    write_pairs(folder / "data/COCO/val2017", ["red apple\n"] * 3, size=64)
    return folder


def run(command, words, patch):
    """Call the main function of a script, or of the module after -m, as its command would."""
    target = re.sub(r"^python (-m )?", "", command).split()[0]
    name = re.sub(r"\.py$", "", target).replace("/", ".")
    module = importlib.import_module({"checkpoints": "checkpoints.__main__", "ops": "ops.explain"}.get(name, name))
    patch.setattr(sys, "argv", [target, *words])
    assert not module.main()


@pytest.mark.parametrize("command, words, small", ways(RUN), ids=by_command)
def test_a_command_runs(command, words, small, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    run(command, [*words, *small], monkeypatch)


ELSEWHERE = ("architecture.md", "server.md")  # no program, and one that test_server.py runs


@pytest.mark.parametrize("code", [code for name, code in blocks("python") if name not in ELSEWHERE])
def test_code_runs(code):
    names = {}
    exec(code, names)
    images = names["images"]
    assert images.shape == (8, 3, 64, 64) and images.dtype == torch.float32
