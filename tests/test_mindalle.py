"""minDALL-E's layout and API on this project's models, against numbers of the published code (see assets/)."""
from __future__ import annotations

import hashlib
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mindalle_folder import CAPTIONS, GRID, TEXT_LEN, make_folder
from PIL import Image

from bpe import load_tokenizer
from dalle import published
from dalle.completion import completion_codes, mask_cells, parse_box, picture_pixels, transparent_mask
from dalle.models import Dalle
from dalle.utils.utils import set_seed
from models.vqgan_config import VqganConfig, stage1_config
from ops.sampling_ops import keep_top_k, keep_top_p
from sampling import driver
from utils.errors import UserError
from utils.tarballs import unpack_tar

GOLDEN = json.loads((Path(__file__).parent / "assets" / "mindalle_golden.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("mindalle") / "tiny")


@pytest.fixture(scope="module")
def model(folder):
    return Dalle.from_pretrained(folder)


def codes_of(model, prompt="a painting of the sea", **options):
    return model.generate(prompt, progress=False, **dict({"num_candidates": 3, "seed": 5}, **options)).codes


# The published code's numbers ----------------------------------------------------------------------------------------


def test_token_ids_are_the_published_ones(model):
    assert model.tokenizer.tokenize(CAPTIONS, TEXT_LEN, truncate=True).tolist() == GOLDEN["ids"]


def test_logits_are_the_published_ones(model):
    text = torch.tensor(GOLDEN["ids"])
    codes = (torch.arange(len(text) * GRID * GRID) * 7 % 24).view(len(text), -1)
    with torch.no_grad():
        logits_txt, logits_img = model.stage2(text, codes)
    assert torch.allclose(logits_txt[0].flatten(), torch.tensor(GOLDEN["logits_txt_0"]), atol=2e-4)
    assert torch.allclose(logits_img[1].flatten(), torch.tensor(GOLDEN["logits_img_1"]), atol=2e-4)


def test_greedy_codes_and_pixels_are_the_published_ones(model):
    for index, caption in enumerate(CAPTIONS):
        assert codes_of(model, caption, top_k=1, num_candidates=1).tolist() == [GOLDEN["greedy"][index]]
    images = model.sampling(CAPTIONS[0], top_k=1, num_candidates=2, device="cpu", progress=False)
    assert images.shape == (2, 3, 16, 16)
    assert torch.allclose(images[0].flatten(), torch.tensor(GOLDEN["pixels_0"]), atol=1e-4)


def test_codes_of_images_are_the_published_ones(model):
    images = torch.sin(torch.arange(2 * 3 * 16 * 16) * 0.11).view(2, 3, 16, 16)
    with torch.no_grad():
        assert model.stage1.encode(images * 0.5 + 0.5).tolist() == GOLDEN["codes_of_images"]


def test_top_k_and_top_p_leave_the_published_distributions():
    row = torch.tensor(GOLDEN["row"])
    for k, expected in GOLDEN["top_k"].items():
        kept = keep_top_k(row, torch.tensor([[int(k) - 1]]), int(k))
        assert torch.allclose(torch.softmax(kept, -1), torch.tensor([expected]), atol=1e-5)
    for p, expected in GOLDEN["top_p"].items():
        kept = keep_top_p(torch.softmax(row, -1), torch.tensor([float(p)]))
        # Which of several equal probabilities stays at the edge is up to the sort; how many do is not.
        assert torch.allclose(kept.sort().values, torch.tensor([expected]).sort().values, atol=1e-5)


# The tokenizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizers_pair(folder):
    """Ours, and HF's CharBPETokenizer set up as the published code does."""
    from tokenizers import CharBPETokenizer

    files = [str(folder / "tokenizer" / name) for name in ("bpe-16k-vocab.json", "bpe-16k-merges.txt")]
    theirs = CharBPETokenizer.from_file(*files, unk_token="[UNK]", lowercase=True)
    theirs.add_special_tokens(["[PAD]"])
    return load_tokenizer(str(folder / "tokenizer")), theirs


TEXTS = [
    *CAPTIONS,
    "",
    "   ",
    "[PAD] a [UNK]cat[pad]",
    "İstanbul ΣΑΣ straße ﬁne",
    "中文 and 猫cat",
    "tab\tnew\nline\xa0space\u200bzero\x00nul",
    "éclair 🙂 #hash 3.14 don't",
    "x" * 300,
]


@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_like_tokenizers(tokenizers_pair, text):
    ours, theirs = tokenizers_pair
    ids = theirs.encode(text).ids
    assert ours.encode(text) == ids
    assert ours.decode(ids) == theirs.decode(ids).rstrip(" ")


def test_encodes_real_captions_like_tokenizers(tokenizers_pair, shared_data):
    ours, theirs = tokenizers_pair
    annotations = json.loads((shared_data / "captions_val2017.json").read_text())["annotations"][:500]
    captions = [annotation["caption"] for annotation in annotations]
    assert ours.encode_batch(captions) == [encoding.ids for encoding in theirs.encode_batch(captions)]


def test_a_tokenizer_is_known_by_its_files(folder, tmp_path):
    ours = load_tokenizer(str(folder / "tokenizer"))
    assert ours.identity["type"] == "char_bpe" and len(ours.identity["sha256"]) == 64
    assert ours.encode("a\ud800b") == ours.encode("ab")
    for vocabulary, merges, message in (
        ("{", "", "not JSON"),
        ('{"a": 0}', "", r"needs the tokens \[PAD\] with id 0"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": 1}', "", "same id"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": "x"}', "", "must be whole numbers"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": 2}', "a b\n", "line 1 merges tokens that the vocabulary lacks"),
        ('{"[PAD]": 0, "[UNK]": 1, "a": 2}', "#version: 0.2\na\n", "line 2 is not a merge"),
    ):
        (tmp_path / "x-vocab.json").write_text(vocabulary)
        (tmp_path / "x-merges.txt").write_text(merges)
        with pytest.raises(UserError, match=message):
            load_tokenizer(str(tmp_path))
    (tmp_path / "x-merges.txt").unlink()
    with pytest.raises(UserError, match="one file"):
        load_tokenizer(str(tmp_path))


# The API -------------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_images_in_any_batches(model):
    whole = codes_of(model, num_candidates=5)
    assert torch.equal(codes_of(model, num_candidates=5, batch_size=2), whole)
    assert torch.equal(codes_of(model, num_candidates=2), whole[:2])
    assert not torch.equal(codes_of(model, num_candidates=5, seed=6), whole)
    set_seed(3)
    first = codes_of(model, seed=None)
    set_seed(3)
    assert torch.equal(codes_of(model, seed=None), first)
    assert not torch.equal(codes_of(model, seed=None), first)


def test_guidance_and_temperature_reach_the_sampler(model):
    plain = codes_of(model, softmax_temperature=0)
    assert torch.equal(plain[0], plain[1])
    assert torch.equal(plain, codes_of(model, top_k=1))
    assert torch.equal(plain, codes_of(model, top_k=None, top_p=1e-6))
    other = codes_of(model, "two cats", softmax_temperature=0, cond_scale=0)
    assert torch.equal(codes_of(model, softmax_temperature=0, cond_scale=0), other)


def test_progress_counts_every_code(model):
    seen = []
    model.generate("a cat", num_candidates=5, batch_size=2, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (80, 80) and seen == sorted(seen) and len(seen) == 48


def test_what_does_not_fit_is_tried_again_with_less(model, monkeypatch):
    sizes, sample_codes = [], driver.sample_codes

    def limited(stage2, text, seeds, *rest):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.cuda.OutOfMemoryError("full")
        return sample_codes(stage2, text, seeds, *rest)

    expected = codes_of(model, num_candidates=5)
    monkeypatch.setattr(driver, "sample_codes", limited)
    assert torch.equal(codes_of(model, num_candidates=5), expected) and sizes == [5, 3, 2, 1, 2]
    with pytest.raises(UserError, match="not enough memory for a batch of 3 images: lower --batch-size"):
        codes_of(model, batch_size=3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"top_k": 0}, "top_k must be a whole number of at least 1"),
        ({"top_k": 5.5}, "top_k must be a whole number of at least 1"),
        ({"top_p": 1.5}, "top_p must be above 0"),
        ({"softmax_temperature": 1e-38}, "softmax_temperature must be at least 1e-06 and .*, got 1e-38"),
        ({"num_candidates": 0}, "num_candidates"),
        ({"batch_size": 0}, "batch_size"),
        ({"cond_scale": 1e38}, "cond_scale must be at least 0 and at most 1e.06, got 1e.38"),
        ({"prompt": 5}, "prompt must be a text"),
        ({"image": np.zeros((16, 16, 3))}, "image and mask belong together"),
    ],
)
def test_impossible_values_are_named(model, options, message):
    with pytest.raises(UserError, match=message):
        codes_of(model, **options)


def test_best_are_the_likeliest(model):
    generated = model.generate("a cat", num_candidates=6, seed=1, progress=False)
    best = generated.best(2)
    assert best.log_likelihood.tolist() == sorted(generated.log_likelihood.tolist(), reverse=True)[:2]
    assert torch.equal(best.images[0], generated.images[int(generated.log_likelihood.argmax())])


def test_set_seed_seeds_everything():
    draws = []
    for _ in range(2):
        set_seed(7)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


# Completion ----------------------------------------------------------------------------------------------------------


def test_masked_codes_are_drawn_and_all_others_kept(model):
    picture = Image.effect_noise((40, 24), 90).convert("RGB")
    pixels = picture_pixels(picture, 16)
    with torch.no_grad():
        own = model.stage1.encode(pixels[None].float() / 255)[0]
    mask = torch.zeros(4, 4)
    mask[1, 2] = mask[3, 0] = 1
    kept = ~(mask.flatten() > 0)
    generated = [codes_of(model, image=picture, mask=mask, top_k=None, seed=seed) for seed in range(3)]
    assert all(torch.equal(codes[:, kept], own[kept].expand(3, -1)) for codes in generated)
    assert len({tuple(row[~kept].tolist()) for codes in generated for row in codes}) > 1
    assert completion_codes(model.loaded, picture, mask).tolist() == own.masked_fill(~kept, -1).tolist()


def test_masks_of_every_kind_mark_the_same_codes():
    cells = torch.zeros(4, 4, dtype=torch.bool)
    cells[2:, 1:3] = True
    pixels = cells.repeat_interleave(4, 0).repeat_interleave(4, 1)
    large = Image.fromarray(pixels.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy().astype(np.uint8) * 255)
    for mask in (cells, cells.flatten().int(), cells.numpy(), pixels, large, parse_box("0.25, 0.5,0.75,1.0")):
        assert torch.equal(mask_cells(mask, 4, 16), cells.flatten())
    touched = torch.zeros(16, 16)
    touched[3, 4] = 1
    assert mask_cells(touched, 4, 16).nonzero().tolist() == [[1]]
    for mask, message in ((torch.zeros(4, 4), "nothing is marked"), (torch.ones(5, 5), "expected 4 x 4 codes")):
        with pytest.raises(UserError, match=message):
            mask_cells(mask, 4, 16)
    assert parse_box("mask.png") is None and parse_box("1.png") is None
    for box in ("0.5,0,0.5,1", "0,0,2,1", "0,0,1", "0, -1, 1, 1", "0.1,0.2,0.3,0.4,0.5"):
        with pytest.raises(UserError, match="a box is left,top,right,bottom"):
            parse_box(box)


def test_transparent_parts_are_a_mask():
    picture = Image.new("RGBA", (16, 16), (200, 10, 10, 255))
    assert transparent_mask(picture) is None and transparent_mask(picture.convert("RGB")) is None
    picture.paste((0, 0, 0, 0), (0, 8, 16, 16))
    assert mask_cells(transparent_mask(picture), 4, 16).tolist() == [False] * 8 + [True] * 8
    assert picture_pixels(picture, 16)[:, 12, 3].tolist() == [255, 255, 255]


def test_what_a_folder_lacks_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="minDALL-E/1.4B: no such file.* Did you mean 'minDALL-E/1.3B'"):
        Dalle.from_pretrained("minDALL-E/1.4B")
    with pytest.raises(UserError, match="not a folder in minDALL-E's layout"):
        Dalle.from_pretrained(tmp_path)
    for name, argument in (("stage1_last.ckpt", "vqgan_model_path"), ("tokenizer", "bpe_path")):
        part = tmp_path / name
        part.mkdir()
        for path in folder.iterdir():
            if path.name != name:
                (part / path.name).symlink_to(path)
        with pytest.raises(UserError, match=f"{part} lacks {name}.* give {argument}"):
            Dalle.from_pretrained(part)


# Layout and download -------------------------------------------------------------------------------------------------


def test_other_checkpoints_are_read_too(model, folder, tmp_path):
    from checkpoints import dalle_checkpoint, save_checkpoint

    state, config = model.stage2.state_dict(), dict(model.stage2.config.to_dict())
    config["num_text_tokens"] = model.tokenizer.vocab_size
    for name in ("text_emb.weight", "text_head.weight"):
        state[name] = state[name][: model.tokenizer.vocab_size].clone()
    save_checkpoint(tmp_path / "dalle_1.pt", dalle_checkpoint(config, state, 1))
    VqganConfig.from_yaml(folder / "config.yaml").to_yaml(tmp_path / "vqgan.yaml")
    other = Dalle.from_pretrained(
        tmp_path / "dalle_1.pt", folder / "tokenizer", folder / "stage1_last.ckpt", tmp_path / "vqgan.yaml"
    )
    assert torch.equal(codes_of(other), codes_of(model))


def test_stage1_options_are_checked():
    assert stage1_config({}, "x").num_codes == 16384
    for document, message in (
        ({"stage1": {"type": "dvae"}}, "stage1.type 'dvae' is not supported"),
        ({"stage1": 5}, "must be tables"),
        ({"stage1": {"hparams": {"ch": "x"}}}, "ch must be a positive whole number"),
    ):
        with pytest.raises(UserError, match=message):
            stage1_config(document, "config.yaml")


def tar_of(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
            else:
                member.type, member.linkname = content
                archive.addfile(member)
    return path


def test_a_published_name_is_fetched_once(tmp_path, monkeypatch):
    source = tar_of(tmp_path / "source.tar.gz", [("1.3B/config.yaml", b"{}"), ("1.3B/tokenizer/a.json", b"1")])
    content = source.read_bytes()
    calls = []

    def download(url, path, md5, size_limit):
        calls.append(url)
        assert md5 == "57b008f02ceaa02b779c8b7463143315" and len(content) < size_limit
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)
        return Path(path)

    monkeypatch.setattr(published, "download", download)
    cache = tmp_path / "cache"
    assert published.resolve("minDALL-E/1.3B", cache) == published.resolve("minDALL-E/1.3B", cache) == cache / "1.3B"
    assert len(calls) == 1 and (cache / "1.3B" / "tokenizer" / "a.json").read_text() == "1"
    assert sorted(path.name for path in cache.iterdir()) == ["1.3B"]
    assert published.resolve("somewhere/else") == Path("somewhere/else")


@pytest.mark.parametrize(
    "files, message",
    [
        ([("../evil", b"x")], "unsafe entry"),
        ([("/evil", b"x")], "unsafe entry"),
        ([("a/link", (tarfile.SYMTYPE, "/etc/passwd"))], "unsafe entry"),
        ([("a/hard", (tarfile.LNKTYPE, "/etc/passwd"))], "unsafe entry"),
        ([("a/pipe", (tarfile.FIFOTYPE, ""))], "unsafe entry"),
        ([("a/large", b"x" * 2000)], "more than the 1000 bytes"),
        ([("a/x", b"x"), ("b/x", b"x")], "2 top-level entries"),
        ([("a/x", b"x"), ("a/x", b"y")], "unsafe entry 'a/x'"),
        ([("a", b"x"), ("a/x", b"y")], "cannot unpack"),
    ],
)
def test_hostile_archives_are_refused_whole(tmp_path, files, message):
    archive = tar_of(tmp_path / "x.tar.gz", files)
    before = hashlib.sha256(archive.read_bytes()).hexdigest()
    with pytest.raises(UserError, match=message):
        unpack_tar(archive, tmp_path / "out" / "model", 1000)
    assert not (tmp_path / "out" / "model").exists() and list((tmp_path / "out").iterdir()) == []
    assert hashlib.sha256(archive.read_bytes()).hexdigest() == before


def test_a_damaged_archive_is_named(tmp_path):
    archive = tar_of(tmp_path / "x.tar.gz", [("a/x", b"x" * 5000)])
    archive.write_bytes(archive.read_bytes()[:40])
    with pytest.raises(UserError, match="is damaged"):
        unpack_tar(archive, tmp_path / "model", 10**6)
