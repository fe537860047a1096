"""generate.py and evaluate.py in several processes: who does what, layouts, what is kept when a run is resumed."""
from __future__ import annotations

import functools
import json
import shutil
import signal

import pytest
import torch
from helpers import TinyModel, create_dataset, random_picture, refused, write_pairs
from torch.distributed import TCPStore

import evaluate
import generate
from dalle import generation
from dalle.journal import Journal
from metrics.images import folder_images
from utils.parts import Parts

VOLATILE = ("images_per_second", "codes_per_pass", "window")  # of the process that completed a folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TinyModel(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def flags(model):
    """The flags of generate.py for 40 images, and more."""

    def flags(out, more=""):
        words = f"--num-images 20 --batch-size 3 --top-k 0 --device cpu --format png {more}".split()
        return ["--dalle-path", str(model.dalle), "--text", "a cat|dog", "--outputs-dir", str(out), *words]

    return flags


@pytest.fixture
def processes(server):
    """Run a program in several processes as torchrun does, whose agent outlives them; returns statuses and logs."""

    def run(argv, folder, count, script="generate", kill=()):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        logs = [folder / f"{script}-{count}-{rank}.log" for rank in range(count)]
        statuses = [server.wait(pid, 60) for pid in server.start_all(argv, logs, kill, store, script=script)]
        return statuses, [log.read_text() for log in logs]

    return run


def tree(folder):
    """{name: bytes} of all files; reports without what depends on the process that completed them."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith("generation.json")]:
        found[name] = {key: value for key, value in json.loads(found[name]).items() if key not in VOLATILE}
    return found


LAYOUTS = ["folders", "folders --keep 4", "flat --gentxt --prime-image {}", "tar --images-per-shard 7",
           "tar --keep 4 --images-per-shard 9"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_on_two_processes_and_resumed_on_three(layout, flags, processes, tmp_path):
    """At image 17 of 40: what is there is kept, the rest is sampled once, and all bytes are those of one process."""
    random_picture(1).save(tmp_path / "prime.png")
    more = f"--layout {layout.format(tmp_path / 'prime.png')}"
    generate.main(flags(tmp_path / "whole", more))
    out = tmp_path / "out"
    kill = [("dalle.journal:Journal.append", count, "after") for count in (8, 9)]
    statuses, logs = processes(flags(out, more), tmp_path, 2, kill=kill)
    assert statuses == [-signal.SIGKILL] * 2, logs
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    statuses, logs = processes(flags(out, f"{more} --resume"), tmp_path, 3)
    assert statuses == [0] * 3, logs
    assert "--resume: 17 of 40 images are there" in logs[0] and "40 images" not in logs[1]
    assert tree(out) == tree(tmp_path / "whole")
    unchanged = [path for path in before if path.exists() and path.stat().st_mtime_ns == before[path]]
    assert len(unchanged) >= 17 or "keep" in layout or "tar" in layout  # there they have moved
    # Complete: nothing is sampled, and nothing changes.
    generate.main(flags(out, f"{more} --resume"))
    assert tree(out) == tree(tmp_path / "whole")


def test_layouts_hold_the_same_images_and_shards_are_read_back(flags, model, tmp_path):
    for layout in ("flat", "tar --images-per-shard 16", "folders"):
        generate.main(flags(tmp_path / layout[:3], f"--layout {layout}"))
    flat, tar = (folder_images("--images", str(tmp_path / name)) for name in ("fla", "tar"))
    folders = folder_images("--images", str(tmp_path / "fol"), ignored="grid.png")
    assert flat.num_images == tar.num_images == folders.num_images == 40
    assert all(torch.equal(flat.image(number), tar.image(number)) for number in range(40))
    assert torch.equal(torch.cat(list(flat.batches(7)))[3], folders.image(13))  # by name: 0, 1, 10 to 19, 2, 3
    lines = [json.loads(line) for line in (tmp_path / "fla" / "generation.jsonl").read_text().splitlines()]
    assert [line["file"] for line in lines] == sorted(path.name for path in (tmp_path / "fla").glob("*.png"))
    assert [line["prompt"] for line in lines] == ["a cat"] * 20 + ["dog"] * 20
    report = json.loads((tmp_path / "fol" / "dog" / "generation.json").read_text())
    assert [line["codes"] for line in lines[20:]] == [image["codes"] for image in report["images"]]
    assert report["checkpoint"] == json.loads((tmp_path / "fla" / "generation.json").read_text())["checkpoint"]
    pairs = create_dataset(str(tmp_path / "tar"), model.tokenizer, 10, 16)
    assert len(pairs) == 40 and [pairs.captions(number) for number in (0, 39)] == [["a cat"], ["dog"]]
    assert torch.equal(pairs.image(39), flat.image(39))
    (tmp_path / "tar" / "00001.tar").write_bytes((tmp_path / "tar" / "00001.tar").read_bytes()[:9000])
    refused("--images .*1 truncated shards", folder_images, "--images", str(tmp_path / "tar"))


@pytest.mark.parametrize("layout, file", [("flat", "000000-0000.png"), ("tar", "00000.tar")])
def test_images_that_a_complete_run_has_lost_are_told(layout, file, flags, earlier, tmp_path):
    run = f"--num-images 2 --layout {layout}"
    shutil.copytree(earlier(run), tmp_path, dirs_exist_ok=True)
    (tmp_path / file).unlink()
    refused(f"was complete, but lacks {file}", generate.main, flags(tmp_path, f"{run} --resume"))


def test_a_folder_that_has_lost_an_image_is_sampled_again(flags, earlier, tmp_path):
    shutil.copytree(earlier("--num-images 2 "), tmp_path, dirs_exist_ok=True)
    before = tree(tmp_path)
    (tmp_path / "dog" / "1.png").unlink()
    (tmp_path / "a_cat" / ".part-x.jsonl").touch()  # the run was killed before it deleted this
    generate.main(flags(tmp_path, "--num-images 2 --resume"))
    assert tree(tmp_path) == before


@pytest.mark.parametrize("layout", ["folders", "flat"])
def test_a_run_that_another_one_has_overtaken_gives_up(layout, flags, tmp_path, monkeypatch):
    """Both resume: the other one ends between this one's look at the folder and its first image."""
    run = flags(tmp_path, f"--num-images 3 --layout {layout} --resume")
    append, read_caption = Journal.append, generation.read_caption

    def first_only(self, record):
        append(self, record)
        raise KeyboardInterrupt

    def overtaken(*given):
        monkeypatch.undo()
        generate.main(run)
        return read_caption(*given)

    monkeypatch.setattr(Journal, "append", first_only)
    refused("", generate.main, run, kind=KeyboardInterrupt)
    monkeypatch.setattr(Journal, "append", append)
    monkeypatch.setattr(generation, "read_caption", overtaken)
    refused("another run has changed it meanwhile", generate.main, run)
    generate.main(run)
    generate.main(flags(tmp_path / "whole", f"--num-images 3 --layout {layout}"))
    whole = tree(tmp_path / "whole")
    assert {name: content for name, content in tree(tmp_path).items() if "whole" not in name} == whole


WRONG = [
    ("--layout flat", "--layout flat", "holds the images of an earlier run: --resume continues it"),
    ("--layout flat", "--layout flat --resume --seed 7", "was written with --seed 42, not 7; resume with that, or"),
    ("--layout flat", "--layout tar --resume", "was written with --layout flat, not tar"),
    ("--layout flat", "--resume", "was written with --layout flat, not folders"),
    ("--layout flat", "--layout flat --resume --text x", "with --text or --prompts-file of sha256 .*, not of sha256"),
    ("--layout flat", "--layout flat --resume --dalle-path {other}", "with --dalle-path of sha256 .*, not of sha256"),
    ("", "--resume --num-images 3", "a_cat was written with --num-images 2, not 3"),
    ("", "--layout flat --images-per-shard 5", "--images-per-shard has no use with --layout flat"),
    ("", "--layout tar --images-per-shard 1 --keep 2", "--images-per-shard 1: .* give at least 2"),
]


@pytest.fixture(scope="module")
def earlier(flags, tmp_path_factory):
    """The outputs of a complete run with these flags."""

    @functools.lru_cache(maxsize=None)
    def run(more):
        out = tmp_path_factory.mktemp("earlier")
        generate.main(flags(out, more))
        return out

    return run


@pytest.mark.parametrize("first, then, message", WRONG, ids=[f"{first} {then}" for first, then, _ in WRONG])
def test_what_does_not_fit_an_earlier_run_is_refused_by_name(first, then, message, flags, earlier, model, tmp_path):
    weights = {name: tensor + 1 for name, tensor in model.model.state_dict().items()}
    other = model.save("other.pt", model.identity, weights)
    shutil.copytree(earlier(f"--num-images 2 {first}"), tmp_path, dirs_exist_ok=True)
    before = tree(tmp_path)
    refused(message, generate.main, flags(tmp_path, f"--num-images 2 {then.format(other=other)}"))
    assert tree(tmp_path) == before


def test_processes_that_cannot_meet_are_told_to_use_torchrun(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    refused("WORLD_SIZE=2, but the processes cannot meet .*: use torchrun", generate.main, flags(tmp_path))


def test_lines_that_were_cut_off_are_not_read(tmp_path):
    """A new process has a file of its own; numbers count from the first of the group."""
    record = {"number": 21, "file": "1.png", "seed": 1, "codes": [1], "log_likelihood": -1.0}
    first, second = Journal(tmp_path, range(20, 40)), Journal(tmp_path, range(20, 40))
    first.append(record)
    second.append(dict(record, number=20))
    (file,) = set(first.files()) - {second._own}
    file.write_bytes(file.read_bytes() + b'{"number": 2, "fi')
    for line in (b"null", b"\xff", b"[" * 100_000, json.dumps(dict(record, number="2")).encode()):
        file.write_bytes(file.read_bytes() + b"\n" + line)
    assert list(Journal(tmp_path, range(20, 40)).read()) == [20, 21]
    assert list(Journal(tmp_path, range(0, 20)).read().values())[1] == dict(record, number=1)


def test_an_evaluation_is_killed_on_two_processes_and_resumed_on_three(model, processes, inception_weights, tmp_path):
    pairs = write_pairs(tmp_path / "pairs", ["a cat", "dog", "x", "y z"])

    def flags(name, *more):
        words = f"--dalle-path {model.dalle} --input-folder {pairs} --metrics loss,fid,copies --num-images 8 --device"
        words += f" cpu --batch-size 2 --inception-weights {inception_weights} --json {tmp_path / name}"
        return [*words.split(), "--sheet", str(tmp_path / f"{name}.png"), *more]

    def result(name):
        found = json.loads((tmp_path / name).read_text())
        del found["protocol"]["date"]
        for row in found["metrics"]:
            row.pop("nearest_sheet")
        return found, (tmp_path / f"{name}.png").read_bytes()

    evaluate.main(flags("whole"))
    statuses, logs = processes(flags("out"), tmp_path, 2, "evaluate", [("utils.parts:Parts._keep", 3, "after")] * 2)
    assert statuses == [-signal.SIGKILL] * 2, logs
    parts = tmp_path / "out.parts"
    assert len(list(parts.glob("*.safetensors"))) == 6 and list(parts.glob("guidance-1-*"))
    message = "out.parts was written with --seed 42, not 7; resume with that, or start without --resume"
    refused(message, evaluate.main, flags("out", "--resume", "--seed", "7"))
    statuses, logs = processes(flags("out", "--resume"), tmp_path, 3, "evaluate")
    assert statuses == [0] * 3, logs
    assert result("out") == result("whole") and not parts.exists()


def test_parts_that_are_there_are_not_computed_again(tmp_path):
    computed = []

    def work(batches, stop=99):
        for numbers in batches:
            if len(computed) == stop:
                raise KeyboardInterrupt
            computed.append(numbers)
            yield {"squares": torch.tensor([number**2 for number in numbers])}

    parts = Parts(folder=tmp_path)
    parts.begin({"--seed": 1})
    refused("", parts.compute, "a", 1000, 100, lambda batches: work(batches, 3), kind=KeyboardInterrupt)
    refused("--json: another process keeps its results in", Parts(folder=tmp_path, resume=True).begin, {"--seed": 1})
    parts.close()
    told, again = [], Parts(folder=tmp_path, resume=True)
    again.begin({"--seed": 1})
    assert again.compute("a", 1000, 100, work, told.append)["squares"].tolist() == [n**2 for n in range(1000)]
    assert sorted(number for numbers in computed for number in numbers)[-1] == 999 and told[-1] == 1000
    assert sum(map(len, computed)) == 1100  # the batch of an unfinished part once more
    (tmp_path / "settings.json").unlink()
    refused("--json: results in progress go to .*, but that is another folder", Parts(folder=tmp_path).check, {})
