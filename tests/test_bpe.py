"""Tokenizers and the command that learns a vocabulary.

What youtokentome 1.0.6 and dalle-pytorch 1.6.6 say is in assets/bpe_golden.json, so that equality with them is tested
without installing them. Its texts are every hundredth caption and awkward ones. The script that made it is in the
history (`git log -- tests/assets/bpe_make_golden.py`).
"""
from __future__ import annotations

import collections
import gzip
import hashlib
import json
import pickle
import random
import sys
import types
from pathlib import Path

import pytest
import torch
from helpers import ROOT, refused, run_script

import args
import bpe
import bpe.train
from bpe import load_tokenizer, warn_of_unknown
from bpe.clip import CLIP_VOCABULARY
from bpe.yttm import parse_vocabulary
from dalle import loading
from utils.errors import run_main

SHIPPED = ROOT / "bpe" / "bpe_yttm_vocab.txt"
REFERENCE = ROOT / "tests" / "assets" / "bpe_youtokentome_vocab.txt"
PATHS = {"shipped": str(SHIPPED), "reference": str(REFERENCE), "clip": None}


@pytest.fixture(scope="module")
def golden():
    return json.loads((ROOT / "tests" / "assets" / "bpe_golden.json").read_text())


@pytest.fixture(scope="module")
def tokenizers():
    return {name: load_tokenizer(path) for name, path in PATHS.items()}


@pytest.fixture(scope="module")
def coco_captions(shared_data):
    annotations = json.loads((shared_data / "captions_val2017.json").read_text())["annotations"]
    return [annotation["caption"] for annotation in annotations]


def digest(values):
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


@pytest.mark.parametrize("name", PATHS)
def test_awkward_texts_and_some_captions_equal_the_reference(name, golden, tokenizers):
    tokenizer, texts, expected = tokenizers[name], golden["texts"], golden[name]
    assert len(texts) == len(expected["ids"]) > 400
    assert [row for row in zip(texts, tokenizer.encode_batch(texts), expected["ids"]) if row[1] != row[2]] == []
    assert digest([tokenizer.decode(ids) for ids in expected["ids"]]) == expected["decoded_sha256"]
    assert tokenizer.vocab_size == expected["vocab_size"]
    if name != "clip":  # the references read these very files
        sha256 = hashlib.sha256(Path(PATHS[name]).read_bytes()).hexdigest()
        assert expected["vocab_sha256"] == sha256 and tokenizer.identity == {"type": "yttm", "sha256": sha256}


@pytest.mark.parametrize("name", PATHS)
def test_every_caption_of_coco_val2017_equals_the_reference(name, golden, tokenizers, coco_captions):
    assert len(coco_captions) == golden["num_captions"] == 25014
    assert digest(tokenizers[name].encode_batch(coco_captions)) == golden[name]["captions_sha256"]


def merge_by_definition(ids, merges):
    """Byte pair encoding as it is defined: again and again the best rank, at its leftmost place."""
    ranks = {(left, right): (rank, result) for rank, (left, right, result) in enumerate(merges)}
    while True:
        candidates = [(ranks[pair][0], at) for at, pair in enumerate(zip(ids, ids[1:])) if pair in ranks]
        if not candidates:
            return ids
        _, at = min(candidates)
        ids = [*ids[:at], ranks[ids[at], ids[at + 1]][1], *ids[at + 2:]]


def test_encoding_follows_the_definition_on_words_of_few_letters():
    draw = random.Random(0)
    lines = ["".join(draw.choice("aaab  c") for _ in range(40)) for _ in range(60)]
    vocabulary = bpe.train.learn_vocabulary(lines, 60)
    tokenizer = bpe.YttmTokenizer(bpe.yttm.format_vocabulary(vocabulary).encode(), "test")
    ids = dict(vocabulary.chars)
    for _ in range(300):
        word = "".join(draw.choice("aabc") for _ in range(draw.randrange(1, 30)))
        expected = merge_by_definition([ids[char] for char in "\u2581" + word], vocabulary.merges)
        assert tokenizer.encode(word) == expected and tokenizer.decode(expected) == word


@pytest.mark.parametrize("name", PATHS)
def test_tokenize_pads_truncates_and_names_the_caption_that_is_too_long(name, tokenizers):
    tokenizer = tokenizers[name]
    texts = ["A cat", "", "two dogs sit on a bench and look at the sea"]
    tensor = tokenizer.tokenize(texts, 32)
    assert tensor.shape == (3, 32) and tensor.dtype == torch.int64
    for row, text in zip(tensor.tolist(), texts):
        ids = tokenizer.encode(text)
        assert row == ids + [0] * (32 - len(ids))
    assert torch.equal(tokenizer.tokenize(texts[0], 32), tensor[:1])
    assert torch.equal(tokenizer.tokenize(texts, 3, truncate=True), tensor[:, :3])
    assert tokenizer.tokenize([], 5).shape == (0, 5)
    exact = len(tokenizer.encode(texts[2]))
    assert tokenizer.tokenize(texts, exact).shape == (3, exact)
    refused("two dogs sit on a bench.*--truncate-captions", tokenizer.tokenize, texts, exact - 1)


@pytest.mark.parametrize("name", PATHS)
def test_ids_become_text_again_also_after_pickling_without_tables(name):
    tokenizer = load_tokenizer(PATHS[name])
    unused = pickle.dumps(tokenizer)
    ids = tokenizer.encode("a dog on a caf\u00e9")
    text = tokenizer.decode(ids)
    assert len(pickle.dumps(tokenizer)) == len(unused)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("a dog on a caf\u00e9") == ids and copy.decode(ids) == text
    assert copy.identity == tokenizer.identity and copy.vocab_size == tokenizer.vocab_size
    # Pads and ids beyond the vocabulary are skipped.
    noisy = [0, copy.vocab_size, *ids[:2], 0, copy.vocab_size + 7, *ids[2:], 0, 0]
    assert tokenizer.decode(noisy) == tokenizer.decode(torch.tensor(noisy)) == text
    assert tokenizer.decode(tokenizer.encode("a dog on a beach")) == "a dog on a beach" and tokenizer.decode([]) == ""
    # Undecodable bytes of a command line are unknown characters.
    assert tokenizer.encode("a\udcffb") == tokenizer.encode("a\ufffdb")


def test_remembered_words_are_bounded(monkeypatch, tokenizers):
    monkeypatch.setattr(bpe.tokenizer, "_MAX_KNOWN_WORDS", 10)
    tokenizer = load_tokenizer(str(SHIPPED))
    texts = ["word{} {}".format(number, "x" * number) for number in range(100)]
    assert tokenizer.encode_batch(texts) == tokenizers["shipped"].encode_batch(texts)
    assert len(tokenizer._known_words) == 10 and all(len(word) <= 64 for word in tokenizers["shipped"]._known_words)


def test_the_plain_clip_file_is_the_same_vocabulary(tmp_path, tokenizers):
    plain, clip = tmp_path / "bpe_simple_vocab_16e6.txt", tokenizers["clip"]
    plain.write_bytes(gzip.decompress(Path(CLIP_VOCABULARY).read_bytes()))
    tokenizer = load_tokenizer(str(plain))
    assert tokenizer.identity == clip.identity and clip.identity["type"] == "clip"
    assert tokenizer.encode("Two cats") == clip.encode("Two cats")
    listed = (ROOT / "bpe" / "SOURCE.md").read_text()
    for file in (SHIPPED, Path(CLIP_VOCABULARY)):
        assert file.name in listed and hashlib.sha256(file.read_bytes()).hexdigest() in listed
    assert run_script("-c", "import sys, bpe.train; sys.exit('torch' in sys.modules)").returncode == 0


GOOD = "3 1\n9601 4\n97 5\n98 6\n5 6 7\n1 0 2 3\n"

CHANGES = {
    ("3 1", "3 2"): "20 numbers|requires 18", ("3 1", "4 1"): "requires 17", ("3 1", "9" * 20 + " 1"): "requires",
    ("98 6", "98 8"): "id 8 is not in", ("98 6", "98 -2"): "id -2 is not in", ("98 6", "98 5"): "id 5 is used twice",
    ("98 6", "98 2"): "id 2 is used twice", ("5 6 7", "5 7 7"): "joins a token", ("5 6 7", "1 6 7"): "joins a token",
    ("98 6", "97 6"): "duplicate character", ("98 6", "55296 6"): "55296 is not the code point",
    ("98 6", "1114112 6"): "1114112 is not the code point", ("98 6", "32 6"): "32 is not the code point",
    ("9601", "99"): r"U\+2581", ("1 0 2 3", "0 1 2 3"): "pad id is 1", ("1 0 2 3", "-1 0 2 3"): "unknown characters",
}


@pytest.mark.parametrize("content, complaint", [
    (b"", "empty"), (b" \n\n", "empty"), (b"\x89PNG\r\n\x1a\n\x00\x00", "not a vocabulary"), (b"7", "first line"),
    (b'{"model": {"type": "BPE"}}', "cannot read it"), (b"a cat\n", "not a vocabulary"), (b"1-2 3", "not a vocabulary"),
    (b"-3 1 " + GOOD[4:].encode(), "first line"), (GOOD.encode() + b"9", "16 numbers"),
    *((GOOD.replace(*change).encode(), complaint) for change, complaint in CHANGES.items()),
    (b"3 3\n9601 4\n97 5\n98 6\n5 6 7\n7 5 8\n5 6 9\n1 0 2 3\n", "two tokens stand"),
    (b"\x1f\x8b\x08\x00broken", "damaged gzip"), (gzip.compress(b"holiday", mtime=0), "not a vocabulary"),
    (b'"bpe_simple_vocab_16e6.txt#version: 0.2\ni n\nt h\n', "damaged CLIP"),
])
def test_what_is_no_vocabulary_is_refused_in_one_line(content, complaint, tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(GOOD)
    tokenizer = load_tokenizer(str(path))  # the smallest file
    assert tokenizer.vocab_size == 8 and tokenizer.encode("ab ba ?b") == [4, 7, 4, 6, 5, 4, 1, 6]
    assert tokenizer.decode([4, 7, 4, 1]) == "ab <UNK>"
    path.write_bytes(content)
    message = refused(complaint, load_tokenizer, str(path))
    assert str(path) in message and "--bpe-path" in message and "\n" not in message


def test_damaged_and_missing_vocabularies_are_refused(tmp_path):
    path, content = tmp_path / "vocab.txt", SHIPPED.read_bytes()
    for kept in (1, 10, 1000, 30000, -2, -4, -6, -8):
        path.write_bytes(content[:kept])
        refused("--bpe-path", load_tokenizer, str(path))
    path.write_bytes(content[:-1])  # only the last line break is gone: nothing is lost
    assert load_tokenizer(str(path)).vocab_size == 8192
    path, content = tmp_path / "bpe_simple_vocab_16e6.txt.gz", Path(CLIP_VOCABULARY).read_bytes()
    path.write_bytes(content[:-50000])
    refused("damaged gzip", load_tokenizer, str(path))
    lines = gzip.decompress(content).decode().split("\n")
    for damage in (["onlyone"], ["qqq zzz</w>"], [lines[1]], []):
        path.write_bytes("\n".join(lines[:500] + damage + lines[501:48894]).encode())
        refused("damaged CLIP", load_tokenizer, str(path))
    refused("nowhere.txt: no such file.*bpe.train", load_tokenizer, str(tmp_path / "nowhere.txt"))
    refused("a folder without tokenizer.json", load_tokenizer, str(tmp_path))


@pytest.mark.parametrize("folder", ["models/bpe", "./models/bpe", str(ROOT / "models/bpe")])
def test_paths_of_the_published_application_find_the_shipped_vocabularies(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    path = folder + "/bpe_yttm_vocab.txt"
    (tmp_path / "configs.yaml").write_text(f"L16:\n  bpe_path: {path}\n")
    config = args.parse(["--config-file", "configs.yaml", "--config", "L16", "--generated-data"])
    assert load_tokenizer(config.data.bpe_path).identity == load_tokenizer(str(SHIPPED)).identity
    assert caplog.messages == [f"vocabulary {path}: using {SHIPPED}"]
    for missing in (folder + "/other.txt", str(tmp_path / "models/bpe/bpe_yttm_vocab.txt")):
        refused("no such file", load_tokenizer, missing)
    if not Path(folder).is_absolute():  # a file that is there is the one that is meant
        (tmp_path / folder).mkdir(parents=True)
        Path(path).write_bytes((ROOT / "bpe/demo_vocab.txt").read_bytes())
        assert load_tokenizer(path).vocab_size == 2048


def learn_by_definition(words, num_merges, ids):
    """Recount everything before each merge; of equal counts the pair of older tokens wins."""
    tokens, merges = {word: [ids[char] for char in "\u2581" + word] for word in words}, []
    for result in range(4 + len(ids), 4 + len(ids) + num_merges):
        totals = collections.Counter()
        for word, count in words.items():
            at = 0
            while at + 1 < len(tokens[word]):
                pair = tuple(tokens[word][at : at + 2])
                totals[pair] += count
                # Of "aaa" only one pair can merge.
                at += 2 if tokens[word][at : at + 3] == [pair[0]] * 3 else 1
        if not totals:
            break
        best = min(totals, key=lambda pair: (-totals[pair], max(pair), pair))
        merges.append((*best, result))
        tokens = {word: merge_by_definition(word_ids, [(*best, result)]) for word, word_ids in tokens.items()}
    return merges


@pytest.mark.parametrize("seed, letters", [(0, "abc"), (1, "aaaab"), (2, "abcdefgh"), (3, "a")])
def test_merges_are_those_of_the_definition(seed, letters):
    draw = random.Random(seed)
    lines = [
        " ".join(letters[: 1 + n % 3] * draw.randrange(1, 4) + draw.choice(letters) for n in range(9)) for _ in range(9)
    ]
    lines += ["".join(draw.choice(letters + " ") for _ in range(60)) for _ in range(5)]
    vocabulary = bpe.train.learn_vocabulary(lines, 60)
    words = collections.Counter(word for line in lines for word in line.split())
    ids = dict(vocabulary.chars)
    assert vocabulary.merges == learn_by_definition(words, 60 - 4 - len(ids), ids)


def test_ids_counts_and_coverage_of_a_learned_file():
    vocabulary = bpe.train.learn_vocabulary(["bb ba .", "ba"], 9)
    assert vocabulary.specials == {"unk": 1, "pad": 0, "bos": 2, "eos": 3}
    # U+2581, then by frequency: b 4, a 2, the full stop 1 (attached to its word, as when captions are prepared)
    assert vocabulary.chars == [("\u2581", 4), ("b", 5), ("a", 6), (".", 7)] and vocabulary.merges == [(4, 5, 8)]
    assert parse_vocabulary(bpe.yttm.format_vocabulary(vocabulary).encode(), "test") == vocabulary
    lines = ["aaaa bbb a\u2603b \U0001f389"]
    for coverage, chars in (({}, "\u2581ab\u2603\U0001f389"), ({"coverage": 0.8}, "\u2581ab")):  # the rarest go
        vocabulary = bpe.train.learn_vocabulary(lines, 20, **coverage)
        assert "".join(char for char, _ in vocabulary.chars) == chars
    tokenizer = bpe.YttmTokenizer(bpe.yttm.format_vocabulary(vocabulary).encode(), "test")
    assert tokenizer.decode(tokenizer.encode(lines[0])) == "aaaa bbb a<UNK>b <UNK>"


def test_the_shipped_vocabulary_is_what_the_command_makes(coco_captions):
    assert bpe.yttm.format_vocabulary(bpe.train.learn_vocabulary(coco_captions, 8192)).encode() == SHIPPED.read_bytes()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs `python -m bpe.train` in this process and folder; returns its exit status and what it wrote to stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["bpe.train", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_main(bpe.train.main)
        return caught.value.code, capsys.readouterr().err

    return run


TEXT = ["A cat sits on a mat .", "Two  cats\nsit", "a m\u00e4t"]


def write_sources(folder):
    """Write the same captions as COCO JSON, as a folder with depth, and as one text file."""
    (folder / "captions.json").write_text(json.dumps({"annotations": [{"caption": text} for text in TEXT]}))
    (folder / "captions" / "deep").mkdir(parents=True)
    (folder / "captions" / "1.txt").write_text(TEXT[0] + "\n")
    (folder / "captions" / "deep" / "2.TXT.caption").write_text("Two cats sit\na m\u00e4t\n", encoding="utf-8")
    (folder / "captions" / "3.jpg").write_bytes(b"\xff\xd8")
    (folder / "lines.txt").write_text("A cat sits on a mat.\r\nTwo cats\r\nsit\r\n\r\na m\u00e4t", encoding="utf-8-sig")


def test_every_kind_of_input_gives_the_same_file_and_several_add_up(tmp_path, command):
    write_sources(tmp_path)
    contents = []
    for source in ("captions.json", "captions", "lines.txt"):
        output = tmp_path / "made" / (source + ".vocab")
        assert command("--captions", source, "--vocab-size", "30", "--output", f"made/{source}.vocab")[0] == 0
        contents.append(output.read_text())
    assert contents[0] == contents[1] == contents[2]
    assert load_tokenizer(str(output)).decode(load_tokenizer(str(output)).encode(TEXT[2])) == TEXT[2]
    assert [file.name for file in output.parent.iterdir() if file.suffix != ".vocab"] == []
    words = f"-m bpe.train --captions {tmp_path}/captions.json {tmp_path}/lines.txt --vocab-size 500 --output"
    result = run_script(*words.split(), tmp_path / "vocab.txt")
    assert result.returncode == 0 and "22 words, 10 of them different" in result.stderr
    # Fewer tokens than asked for is worth a warning, and the file is whole.
    tokenizer = load_tokenizer(str(tmp_path / "vocab.txt"))
    assert f"the vocabulary has {tokenizer.vocab_size} instead of --vocab-size 500" in result.stderr
    assert tokenizer.encode("A cat") != []


@pytest.mark.parametrize("source, content, complaint", [
    ("missing.txt", None, "no such file"), ("missing.json", None, "no such file"),
    ("image.jpg", b"\xff\xd8\xff\xe0", "not a text file"), ("binary.json", b"\xff\xd8\xff\xe0", "not a text file"),
    ("broken.json", b'{"annotations": [', "truncated"), ("list.json", b"[1]", "no list 'annotations'"),
    ("instances.json", b'{"annotations": [{"bbox": []}]}', "annotation 0 has no 'image_id' and no 'caption'"),
    ("empty.txt", b"\n \n", "no captions"), ("empty.json", b'{"annotations": []}', "no captions"),
])
def test_bad_input_ends_with_one_line_and_leaves_the_old_file(source, content, complaint, tmp_path, command):
    if content is not None:
        (tmp_path / source).write_bytes(content)
    (tmp_path / "vocab.txt").write_text("old")
    status, errors = command("--captions", source, "--vocab-size", "30", "--output", "vocab.txt")
    assert status == 1 and errors.count("\n") == 1
    assert errors.startswith("error: --captions") and complaint in errors
    assert (tmp_path / "vocab.txt").read_text() == "old"


@pytest.mark.parametrize("changes, expected_status, complaint", [
    ({"--vocab-size": "0"}, 2, "--vocab-size: must be at least 1, got 0"), ({"--vocab-size": "x"}, 2, "--vocab-size"),
    ({"--coverage": "0"}, 2, "--coverage: must be above 0"),
    ({"--coverage": "nan"}, 2, "--coverage: expected a number"), ({"--output": "."}, 2, "--output"),
    ({"--vocab-size": "9"}, 1, "at least 18"), ({"--captions": "empty"}, 1, "no .txt file in this folder"),
    ({"--captions": "captions", "--caption-column": "x"}, 2, "--caption-column is for lists"),
    ({"--captions": "captions.json", "--caption-column": "x"}, 1, "keys found: caption"),
    ({"--caption-column": "x"}, 1, "in its first line, 'A cat sits on a mat.'"),
])
def test_wrong_flags_are_explained(changes, expected_status, complaint, tmp_path, command):
    write_sources(tmp_path)
    (tmp_path / "empty").mkdir()
    flags = {"--captions": "lines.txt", "--vocab-size": "30", "--output": "vocab.txt", **changes}
    status, errors = command(*(part for flag in flags.items() for part in flag))
    assert status == expected_status and complaint in errors and "Traceback" not in errors
    assert not (tmp_path / "vocab.txt").exists()


CORPUS = ["a red circle", "a blue square and 2 cats", "\u4e00\u53ea\u7ea2\u8272\u7684\u5706", "caf\u00e9 na\u00efve"]
TEXTS = [
    *CORPUS, "", " ", "A green\ncircle!", "\u5706\u9ed1 cat", "[PAD] a [UNK]", "\U0001f469\U0001f3fd", "e\u0301",
    "half \ud83d",
]


def hf_tokenizer(kind):
    """A tokenizer of the package itself, as downloaded ones are: [PAD] is 0, [CLS] and [SEP] around a text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    common = {"vocab_size": 60, "special_tokens": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]}
    if kind == "byte-level":
        tokenizer, trainer = Tokenizer(models.BPE()), trainers.BpeTrainer(**dict(common, vocab_size=300))
        trainer.initial_alphabet = pre_tokenizers.ByteLevel.alphabet()
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    elif kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        trainer = trainers.WordPieceTrainer(**dict(common, vocab_size=90))
        tokenizer.normalizer, tokenizer.decoder = normalizers.BertNormalizer(), decoders.WordPiece()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "unigram":
        tokenizer, trainer = Tokenizer(models.Unigram()), trainers.UnigramTrainer(unk_token="[UNK]", **common)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        tokenizer, trainer = Tokenizer(models.BPE(unk_token="[UNK]")), trainers.BpeTrainer(**common)
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainer)
    around = {"single": "[CLS] $A [SEP]", "special_tokens": [("[CLS]", 2), ("[SEP]", 3)]}
    tokenizer.post_processor = processors.TemplateProcessing(**around)
    return tokenizer


@pytest.mark.parametrize("kind", ["byte-level", "bert", "unigram", "whitespace"])
def test_ids_of_a_tokenizer_json_are_those_of_the_package(kind, tmp_path):
    reference, path = hf_tokenizer(kind), tmp_path / "tokenizer.json"
    reference.save(str(path))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.identity == {"type": "hf", "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert load_tokenizer(str(tmp_path)).identity == tokenizer.identity
    for text in TEXTS:
        whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        expected = reference.encode(whole, add_special_tokens=False).ids
        assert tokenizer.encode(text) == expected == pickle.loads(pickle.dumps(tokenizer)).encode(text)
        assert tokenizer.decode([*expected, 0, 10 ** 6]) == reference.decode([id_ for id_ in expected if id_])
    assert tokenizer.vocab_size == reference.get_vocab_size() and tokenizer.tokenize(CORPUS[:2], 40).shape == (2, 40)
    assert tokenizer.unknown("a \u9ed1 circle") == {"byte-level": [], "bert": ["\u9ed1"]}.get(kind, ["\u9ed1"])


def test_what_a_tokenizer_json_asks_for_beside_its_ids_is_ignored(tmp_path):
    reference, path = hf_tokenizer("whitespace"), tmp_path / "t"
    expected = reference.encode(CORPUS[1], add_special_tokens=False).ids
    reference.enable_truncation(3)
    reference.enable_padding(length=50)
    reference.model.dropout = 0.9
    reference.save(str(path))
    assert json.loads(path.read_text())["model"]["dropout"] is not None
    tokenizer = load_tokenizer(str(path))
    assert all(tokenizer.encode(CORPUS[1] + " " * count) == expected for count in range(20))


@pytest.mark.parametrize("beside", ["tokenizer.json", "words/tokenizer.json"])
def test_a_tokenizer_json_is_found_again_by_what_a_checkpoint_notes(beside, tmp_path, monkeypatch):
    path = tmp_path / beside
    path.parent.mkdir(exist_ok=True)
    hf_tokenizer("whitespace").save(str(path))
    noted = dict(load_tokenizer(str(path)).identity, path=str(path.parent) if "/" in beside else "was/" + beside)
    checkpoint = types.SimpleNamespace(path=tmp_path / "dalle.pt", identity={"tokenizer": noted}, format="ours")
    assert loading._open_tokenizer(None, checkpoint).identity["sha256"] == noted["sha256"]
    path.write_bytes(path.read_bytes() + b"\n")
    refused("is not found: give it with --bpe-path", loading._open_tokenizer, None, checkpoint)


@pytest.mark.parametrize("special", [["[UNK]", "[PAD]"], []])
def test_a_tokenizer_json_without_a_pad_at_zero_is_worth_a_warning(special, tmp_path, caplog):
    from tokenizers import Tokenizer, models, trainers
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]" if special else None))
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=50, special_tokens=special))
    tokenizer.save(str(tmp_path / "t.json"))
    load_tokenizer(str(tmp_path / "t.json"))
    (message,) = caplog.messages
    assert f"{tokenizer.id_to_token(0)!r} has the id 0, which is the pad" in message


@pytest.mark.parametrize("content, complaint", [
    ("{", "damaged JSON"), ('{"[PAD]": 0, "a": 1}', "not a tokenizer.json of Hugging Face"),
    ('{"model": {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"a": 0}}}', "cannot read it"),
    ('{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "no tokens"),
    ('{"model": {"type": "BPE", "vocab": {"a": 4000000000}, "merges": []}}', "an id above"),
])
def test_other_json_is_no_vocabulary(content, complaint, tmp_path):
    (tmp_path / "v.json").write_text(content)
    refused("--bpe-path .*" + complaint, load_tokenizer, str(tmp_path / "v.json"))


@pytest.mark.parametrize("text, yttm, char, clip", [
    ("a red circle", "", "", ""), ("a \u4e00\u53ea", "\u4e00\u53ea", "\u4e00\u53ea", ""),
    ("[PAD] x\u2581y [UNK]", "[[", "\u2581", ""),
])
def test_unknown_characters_of_each_kind(text, yttm, char, clip, tokenizers):
    found = [tokenizers["shipped"], load_tokenizer(str(ROOT / "bpe" / "demo_char")), tokenizers["clip"]]
    assert ["".join(tokenizer.unknown(text)) for tokenizer in found] == [yttm, char, clip]


def test_unknown_characters_are_worth_a_warning(tokenizers, tmp_path, caplog):
    letters = b"".join(b"%d %d\n" % (number, number - 92) for number in range(97, 118))
    (tmp_path / "yttm").write_bytes(b"22 0\n9601 4\n" + letters + b"1 0 2 3")
    small = load_tokenizer(str(tmp_path / "yttm"))
    assert small.unknown("azu") == ["z"] and small.unknown(" \t") == []
    for texts, share in ((["a cat"], 0), ([], 0), (["a" * 150 + "\u4e00"], 1 / 151), (["\u4e00\u53ea", "a b"], 0.5)):
        assert warn_of_unknown(tokenizers["shipped"], texts, "--text") == pytest.approx(share)
    (message,) = caplog.messages  # of more than a hundredth
    assert message.startswith("--text: the vocabulary lacks 50 % of the characters (such as \u4e00 \u53ea)")
    assert "python -m bpe.train" in message and "--bpe-path" in message
