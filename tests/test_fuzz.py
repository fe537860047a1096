"""Fuzzing: whatever a file, configuration, prompt, caption or mask holds, it is read, or refused by our own error.

By hypothesis: mutated files for each reader, a few hundred here and 100,000 with --slow, under a limit on memory and
time; and values that have a form.
"""
from __future__ import annotations

import contextlib
import gzip
import io
import json
import re
import resource
import subprocess
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers import as_bytes, refused, tiny_vqgan
from hypothesis import HealthCheck, given, settings, strategies
from PIL import Image
from safetensors.torch import save as save_tensors

import args
from bpe import load_tokenizer
from checkpoints import dalle_checkpoint, export_safetensors, read_dalle, save_checkpoint
from checkpoints.files import FIRST_EXPORT_FORMAT, read_safetensors
from checkpoints.trust import model_config
from checkpoints.vqgan import check_size, load_vqgan_state
from dalle.completion import mask_cells, parse_box
from dalle.prompt_folders import folder_name, lock_folder, prompt_folders
from data.images import BROKEN_IMAGE_ERRORS, load_image
from data.process_trainset import clean_caption, process_captions
from examples_utils.spec import load_entries, select
from models.config import DalleConfig
from models.dalle import DalleModel
from models.vqgan import VQGAN
from models.vqgan_config import VqganConfig
from utils.errors import UserError
from utils.memory import return_freed_memory
from utils.yaml_files import parse_yaml

READERS = {
    "dalle.pt": 2, "pickle in dalle.pt": 6, "dalle.safetensors": 4, "vqgan.ckpt": 2, "pickle in vqgan.ckpt": 4,
    "vqgan legacy.ckpt": 4, "vqgan.yaml": 2, "coco.json": 4, "caption list": 4, "yttm vocabulary": 4,
    "char vocabulary": 3, "tokenizer.json": 4, "configs.yaml": 1, "benchmarks.yml": 1, "image": 4,
}
"""Each reader's share of the inputs."""

TINY = DalleConfig(num_text_tokens=7, num_image_tokens=4, text_seq_len=2, grid=2, dim=4, depth=1, heads=1, dim_head=4)
STATE = DalleModel(TINY).state_dict()
TINY_VQGAN = tiny_vqgan(num_codes=4, embed_dim=2, resolution=4, z_channels=2, ch=2, ch_mult=(1, 2), num_groups=2)
VQGAN_YAML = yaml.safe_dump(TINY_VQGAN.to_dict()).encode()
MEMORY = 2 << 30
"""What reading may take beyond what the process had: far less than the gigantic sizes that mutated files ask for."""


def vqgan_seeds(folder, **options):
    torch.manual_seed(0)
    state = VQGAN(TINY_VQGAN).state_dict()
    half = {name: value.half() for name, value in state.items()}
    inner = {"first_stage_model." + name: value for name, value in state.items()}
    inner.update({"first_stage_model.model_ema." + name.replace(".", ""): value + 1 for name, value in state.items()})
    for name, document in (("a", {"state_dict": state}), ("b", half), ("c", {"state_dict": inner})):
        torch.save(document, str(folder / name), **options)
    return [(folder / name).read_bytes() for name in "abc"]


def dalle_seeds(folder, export):
    torch.manual_seed(0)
    model = DalleModel(TINY)
    document = dalle_checkpoint(model.config.to_dict(), model.state_dict(), 1, training={"position": {"epoch": 1}})
    save_checkpoint(folder / "a.pt", document)
    if not export:
        published = {name: value for name, value in document.items() if name not in ("config", "training")}
        torch.save(published, str(folder / "b.pt"))
        return [(folder / "a.pt").read_bytes(), (folder / "b.pt").read_bytes()]
    export_safetensors(read_dalle(folder / "a.pt"), folder / "a.safetensors")
    # The first format, without a digest: mutated options are read, not refused as damaged.
    metadata, tensors = read_safetensors(folder / "a.safetensors")
    del metadata["sha256"]
    unsigned = save_tensors(tensors, dict(metadata, format=FIRST_EXPORT_FORMAT))
    return [(folder / "a.safetensors").read_bytes(), unsigned, save_tensors({"x": torch.ones(2)})]


def coco_seeds():
    images = [{"id": number, "file_name": f"{number:012}.jpg"} for number in range(3)]
    annotations = [{"image_id": number % 3, "id": number, "caption": "a cat ."} for number in range(6)]
    whole = json.dumps({"info": {}, "images": images, "annotations": annotations})
    return [whole.encode(), json.dumps({"annotations": annotations}).encode()]


LISTS = [
    b'{"images": [{"filename": "1.jpg", "sentences": [{"raw": "a"}, {"raw": "b"}]}], "dataset": "x"}',
    b'[{"image": "1.jpg", "caption": "a"}, {"image": "2.jpg", "caption": ["b", "c"]}]',
    b'{"file_name": "1.jpg", "text": "a"}\n{"file_name": "2.jpg", "text": "b"}\n',
    b'image,caption\n1.jpg,"a, ""b"""\n2.jpg,c\n', b"image_name| n| comment\n1.jpg| 0| a\n2.jpg| 1| b\n",
    b"1.jpg#0\ta\n1.jpg#1\tb\n",
]

CHAR = b'{"[PAD]": 0, "[UNK]": 1, "a": 2, "b</w>": 3, "ab</w>": 4, "c": 5, "ca": 6}\n---\n#version: 0.2\na b</w>\nc a\n'
YTTM = b"4 3\n9601 4\n97 5\n98 6\n99 7\n4 5 8\n8 6 9\n6 7 10\n1 0 2 3\n"
CONFIGS = b"""defaults: &defaults
  batch_size: 2
  learning_rate: 3.0e-4
  layers_per_ipu: [1, 2]
demo: &demo
  <<: *defaults
  attn_types: [full, axial_row]
  fp16: true
"""
BENCHMARKS = b"""options: &options
  env: {A: b}
  data:
    throughput: {regexp: 'speed: (.*?) x', skip: 1}
train_gen:
  <<: *options
  cmd: python3 train.py --x {x}
  parameters: {x: [1, 2]}
  derived: {y: {expr: "{throughput} * 2"}}
"""


def make_pickle_reader(name, folder):
    """Like `make_reader`, but the inputs are the pickle within the archive, whose checksums are right again."""
    read, seeds, refusals = make_reader(name, folder)
    with zipfile.ZipFile(io.BytesIO(seeds[0])) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    (pickled,) = (entry for entry in entries if entry.endswith("data.pkl"))

    def read_pickle(content):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for entry, own in entries.items():
                archive.writestr(entry, content if entry == pickled else own)
        read(file.getvalue())

    return read_pickle, [entries[pickled]], refusals


def hf_seeds():
    models = [
        {"type": "BPE", "unk_token": "u", "vocab": {"u": 0, "a": 1, "b": 2, "ab": 3}, "merges": ["a b"]},
        {"type": "WordPiece", "unk_token": "u", "vocab": {"u": 0, "##b": 1}, "max_input_chars_per_word": 9},
        {"type": "Unigram", "unk_id": 0, "vocab": [["u", 0], ["a", -1.5], ["b", -2]]},
    ]
    models[1]["continuing_subword_prefix"] = "##"
    splitter = {"type": "BertPreTokenizer"}
    return [json.dumps({"version": "1.0", "pre_tokenizer": splitter, "model": model}).encode() for model in models]


def image_seeds():
    kinds = {kind: {} for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")}
    kinds["JPEG"] = {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}
    return [as_bytes(Image.new("P" if kind == "GIF" else "RGB", (9, 7), 5), kind, **options)
            for kind, options in [*kinds.items(), ("TIFF", {"compression": "tiff_lzw"})]]


def use_image(path):
    assert load_image(str(path), 8).shape == (3, 8, 8)


def use_tokenizer(path):
    tokenizer = load_tokenizer(str(path))
    tokenizer.decode(tokenizer.encode("abc cba"))
    tokenizer.unknown("abc cba")


def use_char_tokenizer(path):
    """The bytes are a vocabulary and its merges, parted by a line of dashes."""
    folder = path.with_name("char")
    folder.mkdir(exist_ok=True)
    for suffix, part in zip(("vocab.json", "merges.txt"), [*path.read_bytes().split(b"\n---\n"), b""]):
        (folder / suffix).write_bytes(part)
    use_tokenizer(folder)


def make_reader(name, folder):
    """Return (function of bytes, seeds, what it may raise)."""
    if name.startswith("pickle in "):
        return make_pickle_reader(name[len("pickle in ") :], folder)
    path = folder / "input"
    flags = ["--config-file", str(path), "--config", "demo", "--generated-data"]
    seeds, read = {
        "dalle.pt": (lambda: dalle_seeds(folder, False), read_dalle),
        "dalle.safetensors": (lambda: dalle_seeds(folder, True), read_dalle),
        "vqgan.ckpt": (lambda: vqgan_seeds(folder), load_vqgan_state),
        "vqgan legacy.ckpt": (lambda: vqgan_seeds(folder, _use_new_zipfile_serialization=False), load_vqgan_state),
        "vqgan.yaml": (lambda: [VQGAN_YAML], lambda path: check_size(VqganConfig.from_yaml(path))),
        "coco.json": (coco_seeds, lambda path: process_captions(path, folder / "out", max_bad_fraction=0.5)),
        "caption list": (lambda: LISTS, lambda path: process_captions(path, folder / "out", max_bad_fraction=0.5)),
        "yttm vocabulary": (lambda: [YTTM], use_tokenizer), "char vocabulary": (lambda: [CHAR], use_char_tokenizer),
        "tokenizer.json": (hf_seeds, use_tokenizer),
        "configs.yaml": (lambda: [CONFIGS], lambda path: args.parse(flags)),
        "benchmarks.yml": (lambda: [BENCHMARKS], lambda path: select(load_entries([str(path)]), None)),
        "image": (image_seeds, use_image),
    }[name]

    def read_bytes(content):
        path.write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(path)

    return read_bytes, seeds(), BROKEN_IMAGE_ERRORS if name == "image" else UserError


@pytest.fixture
def limited_memory():
    """Let the process take no more than MEMORY beyond what it has."""
    return_freed_memory()  # programs that ran within this process may have set it to keep all
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


MAGIC = [b"\0", b"\xff", b"\x7f", b"\x80", b"\r\n", b"[", b"{", b"}", b"]", b'"', b":", b"- ", b"&a ", b"*a", b"<<: "]
MAGIC += [b"!!python/object/apply:os.system [id]\n", b"PK\x03\x04", b"\x1f\x8b", b"..", b"\n", b"null", b"true", b"NaN"]
MAGIC += [b"-1", b"0", b"1e999", b"9" * 20, b"4294967295", b"2147483648", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800"]
NUMBERS = [str(number).encode() for number in (0, 1, 2, 7, 255, 65536, 10**9, 10**18, 10**30)]
EVERY = list(HealthCheck)  # of hypothesis: reading may be slow
LENGTH = strategies.integers(0, 7).map(lambda power: 1 << power)


@strategies.composite
def mutated(draw, seeds):
    """One of the seeds with some of its bytes changed, moved, repeated, cut off or taken from another one."""
    content = draw(strategies.sampled_from(seeds))
    for _ in range(draw(LENGTH.map(lambda length: min(length, 16)))):
        place, removed, added = draw(strategies.integers(0, len(content))), 0, b""
        kind = draw(strategies.sampled_from("bytes magic repeat remove digit other other cut".split()))
        if kind == "bytes":
            added, removed = draw(strategies.binary(max_size=2)), draw(strategies.integers(0, 2))
        elif kind == "magic":
            added, removed = draw(strategies.sampled_from(MAGIC)), draw(strategies.sampled_from([0, 4]))
        elif kind == "repeat":
            added = content[place : place + draw(LENGTH)]
        elif kind == "digit":  # a number becomes another one: what sizes and ids are made of
            found = re.search(rb"[0-9]", content[place : place + 200])
            if found:
                place, removed, added = place + found.start(), 1, draw(strategies.sampled_from(NUMBERS))
        elif kind == "other":
            other, removed = draw(strategies.sampled_from(seeds)), draw(LENGTH)
            start = draw(strategies.integers(0, len(other)))
            added = other[start : start + removed]
        else:
            removed = len(content) if kind == "cut" else draw(LENGTH)
        content = content[:place] + added + content[place + removed :]
    return content


@pytest.mark.parametrize("count", [25 * sum(READERS.values()), pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", READERS)
def test_mutated_files_are_read_or_refused(name, count, tmp_path, limited_memory):
    read, seeds, refusals = make_reader(name, tmp_path)
    for content in seeds:
        try:
            read(content)
        except refusals:
            assert name == "dalle.safetensors"  # the one seed that holds no DALL-E
    refused, share = [], -(-count * READERS[name] // sum(READERS.values()))

    @given(mutated(seeds))
    @settings(max_examples=share, deadline=20_000, database=None, derandomize=True, suppress_health_check=EVERY)
    def try_all(content):
        try:
            read(content)
        except refusals as error:
            refused.append(error)

    try_all()
    assert refused


def test_a_chunk_that_claims_gigabytes_takes_none(tmp_path, limited_memory):
    path = tmp_path / "claims.png"
    Image.new("RGB", (9, 7), (200, 30, 60)).save(path)
    content = bytearray(path.read_bytes())
    start = content.index(b"IDAT")
    content[start - 4 : start] = (0xA4000012).to_bytes(4, "big")
    path.write_bytes(content)
    with contextlib.suppress(*BROKEN_IMAGE_ERRORS):
        use_image(path)


ALIASES = [", ".join([f"*{{0}}{n}"] * 10) for n in range(11)]  # each takes ten of the one before it
LAUGHS = "\n".join(["a0: &a0 [x, x]"] + [f"a{n + 1}: &a{n + 1} [{ten.format('a')}]" for n, ten in enumerate(ALIASES)])
MERGES = [f"m{n + 1}: &m{n + 1} {{<<: [{ten.format('m')}]}}" for n, ten in enumerate(ALIASES)]
MERGES = "\n".join(["m0: &m0 {k: v}", *MERGES])
VALUES = {
    "laughs": LAUGHS, "merges": MERGES, "merges a list": "a: &a [1]\nb: {<<: *a}", "itself": "a: &a [*a]",
    "many merges": "a: &a {{{}}}\n".format(", ".join(f"k{n}: 1" for n in range(5000)))
    + "".join(f"b{n}: {{<<: *a}}\n" for n in range(2000)),
    "merges itself": "a: &a {<<: *a}", "deep": "[" * 100000, "digits": "a: " + "9" * 200000,
    "sixties": "a: 1" + ":59" * 60000, "date": "a: 2001-99-99", "no date": "a: !!timestamp x",
    "no truth": "a: !!bool x", "no number": 'a: !!float ""', "python": "a: !!python/object/apply:os.system [id]",
    "unhashable": "? [a]\n: b", "twice": "a: 1\na: 2", "large": "a: b\n" * 100000,
    "no text": "a: \ud83d".encode("utf-8", "surrogatepass").decode("latin-1"),
}


@pytest.mark.parametrize("name", VALUES)
def test_yaml_takes_no_more_than_its_size(name, limited_memory):
    try:
        value = parse_yaml(VALUES[name].encode("latin-1"), "f.yaml", unique_keys=True)
    except UserError as error:
        assert str(error).startswith("f.yaml") and len(str(error)) < 400 and "\n" not in str(error)
    else:
        assert name in ("laughs", "merges", "itself", "no text") and isinstance(value, dict)
        assert name != "merges" or all(merged == {"k": "v"} for merged in value.values())


@pytest.mark.parametrize("key", ["target", "n_embed", "ch_mult", "resolution", "dropout", "extra"])
def test_values_that_never_end_are_not_printed(key, tmp_path, limited_memory):
    document = TINY_VQGAN.to_dict()
    model = document["model"]
    {"target": model, "n_embed": model["params"]}.get(key, model["params"]["ddconfig"])[key] = "ALIAS"
    laughs = "laughs:\n" + "\n".join("  " + line for line in LAUGHS.split("\n"))
    (tmp_path / "v.yaml").write_text(laughs + "\n" + yaml.safe_dump(document).replace("ALIAS", "*a11"))
    if key == "extra":
        VqganConfig.from_yaml(tmp_path / "v.yaml")
    else:
        assert len(refused("", VqganConfig.from_yaml, tmp_path / "v.yaml")) < 600
    (tmp_path / "c.yaml").write_text(LAUGHS + "\nc:\n  batch_size: *a11\n  attn_types: *a11\n")
    assert len(refused("", args.parse, ["--config-file", str(tmp_path / "c.yaml"), "--config", "c"])) < 600


HUGE = [
    ("n_embed", 10**9), ("embed_dim", 10**9), ("ch", 10**9), ("num_res_blocks", 10**9), ("resolution", 2**40),
    ("z_channels", 10**9), ("ch_mult", [2] * 1000), ("ch_mult", [10**9]), ("attn_resolutions", [4] * 10**5),
    ("num_groups", 10**9), ("patch_size", 2**40), ("out_ch", 10**9), ("n_embed", 10**200),
]


@pytest.mark.parametrize("key, value", HUGE)
def test_a_vqgan_of_absurd_size_is_refused_before_it_is_built(key, value, tmp_path, limited_memory):
    document = TINY_VQGAN.to_dict()
    params = document["model"]["params"]
    (params if key in ("n_embed", "embed_dim") else params["ddconfig"])[key] = value
    (tmp_path / "v.yaml").write_text(yaml.safe_dump(document))
    refused("v.yaml", lambda: check_size(VqganConfig.from_yaml(tmp_path / "v.yaml")))


def test_a_vqgan_within_each_limit_but_too_large_in_all_is_refused(limited_memory):
    config = VqganConfig(ch=1 << 10, ch_mult=(16,) * 5, num_res_blocks=8, z_channels=256)
    refused("the model has .* parameters", check_size, config)


def test_tokens_that_double_are_refused(tmp_path, limited_memory):
    path, merges = tmp_path / "v.txt", ["4 4 5"] + [f"{number} {number} {number + 1}" for number in range(5, 64)]
    path.write_text("1 {}\n9601 4\n{}\n1 0 2 3\n".format(len(merges), "\n".join(merges)))
    refused("tokens are too long", load_tokenizer, str(path))
    path.write_text("1 " + "9" * 5000)
    refused("too many digits", load_tokenizer, str(path))


def test_a_bomb_of_a_vocabulary_is_not_unpacked(tmp_path, limited_memory):
    with gzip.open(str(tmp_path / "v.gz"), "wb", compresslevel=1) as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
    refused("too large to be a vocabulary when unpacked", load_tokenizer, str(tmp_path / "v.gz"))


TEXT = strategies.text(max_size=60)
NUMBER = strategies.one_of(strategies.integers(), strategies.floats(), strategies.booleans(), strategies.none())
VALUE = strategies.recursive(
    strategies.one_of(NUMBER, TEXT), lambda inner: strategies.lists(inner, max_size=4), max_leaves=6
)
FEW = settings(deadline=None, max_examples=150)


@given(strategies.dictionaries(strategies.sampled_from(args.option_names()), VALUE, max_size=5))
@FEW
def test_any_values_of_a_configuration(values):
    try:
        config = args.Config.from_dict(values)
    except UserError as error:
        assert "\n" not in str(error).strip() or any("\n" in str(value) for value in values.values())
    else:
        assert args.Config.from_dict(config.to_dict()) == config and config.describe()


WORD = strategies.one_of(TEXT, strategies.sampled_from(
    "--batch-size --attn-types --fp16 --resume --config demo --generated-data 4 -1 nan".split()
))


@given(strategies.lists(WORD, max_size=6))
@FEW
def test_any_words_of_a_command_line(words):
    if not {"-h", "--help"} & set(words):
        with contextlib.suppress(UserError):
            args.parse(words)


@given(strategies.dictionaries(strategies.sampled_from(sorted(TINY.to_dict())), VALUE, max_size=4))
@FEW
def test_any_options_of_a_stored_model(values):
    with contextlib.suppress(UserError):
        model_config(dict(TINY.to_dict(), **values), STATE)


@pytest.mark.parametrize("first, second", [("A Cat", "a cat"), ("STRASSE", "straße"), ("caf\u00e9", "cafe\u0301")])
def test_prompts_that_differ_in_case_or_coding_have_two_folders(tmp_path, first, second):
    names = [path.name for path in prompt_folders(tmp_path, (first, second))]
    assert names[0] == folder_name(first) and names[1] != folder_name(second)


SHELL = [
    "$(touch trap)", "`touch trap`", "; touch trap", "& touch trap", "-rf", "a\ntouch trap", "'\"; touch trap #",
    "\0", "../../trap", "*", "~root", "a" * 10**7,
]


@pytest.mark.parametrize("prompt", SHELL, ids=range(len(SHELL)))
def test_no_name_of_a_folder_is_a_command_even_in_double_quotes_of_a_shell(prompt, tmp_path):
    (folder,) = prompt_folders(tmp_path, [prompt])
    lock_folder(folder)
    name = folder.name
    command = ["sh", "-c", 'ls -d -- "$1"/ && cd -- "$1"', "sh", name]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == [name]


@given(strategies.text(max_size=300))
@FEW
def test_any_caption_is_tokenized_and_cleaned(text):
    for tokenizer in (DEMO_TOKENIZER, CLIP_TOKENIZER):
        rows = tokenizer.tokenize(text, 8, truncate=True)
        assert rows.shape == (1, 8) and int(rows.min()) >= 0 and int(rows.max()) < tokenizer.vocab_size
        assert isinstance(tokenizer.decode(rows[0].tolist()), str)
    assert "\n" not in clean_caption(text)


DEMO_TOKENIZER = load_tokenizer(str(Path(args.__file__).parent / "bpe" / "demo_vocab.txt"))
CLIP_TOKENIZER = load_tokenizer(None)

SIDES = strategies.lists(strategies.floats(width=16), min_size=4, max_size=4)


@given(strategies.text("0123456789., -einfa", max_size=30) | SIDES.map(lambda sides: ",".join(map(str, sides))))
@FEW
def test_any_box_of_a_mask(text):
    with contextlib.suppress(UserError):
        box = parse_box(text)
        assert box is None or mask_cells(box, 4, 16).any()


KINDS = strategies.sampled_from([np.bool_, np.uint8, np.float32, np.int64])


@given(strategies.lists(strategies.integers(0, 9), max_size=3).map(tuple), KINDS)
@FEW
def test_any_shape_of_a_mask(shape, kind):
    for value in (0, 1):
        with contextlib.suppress(UserError):
            cells = mask_cells(np.full(shape, value, dtype=kind), 2, 8)
            assert value and cells.shape == (4,) and cells.all()
