"""Make tests/assets/bpe_golden.json: what the reference tokenizers say, for the tests to compare with.

    python tests/assets/bpe_make_golden.py --captions captions_val2017.json --dalle-pytorch UNPACKED_WHEEL

Needs youtokentome 1.0.6 (which builds only with Cython < 3 and without build isolation), ftfy, regex, and the wheel of
dalle-pytorch 1.6.6 unpacked in a folder. Also trains tests/assets/bpe_youtokentome_vocab.txt when that file is absent,
on captions and awkward texts, so that the comparison covers a vocabulary that youtokentome made itself.
Run it from the root of the repository. Nothing here is imported from the project.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import sys
import tempfile
import types
from pathlib import Path

import youtokentome

ASSETS = Path(__file__).parent
SHIPPED = "bpe/bpe_yttm_vocab.txt"
REFERENCE = "tests/assets/bpe_youtokentome_vocab.txt"

TEXTS = [
    # words and blanks
    *(
        "",
        " ",
        " \t\n ",
        "a",
        " a",
        "a ",
        "  a   b  ",
        "a\tb\nc\rd\x0be\x0cf",
        "A photo , of two cats .",
        "CATS cats Cats",
    ),
    *(
        "don't",
        "It's O'Neil's; we'll, they'd, I'm, you've, they're",
        "'S 'LL '\u017f",
        '"quoted" (50%) #1 @ $5 a/b\\c *~^`|',
    ),
    *(
        "http://example.org/a?b=1&c=2",
        "12345 6.78 1,000",
        "!",
        "!!",
        "!a",
        "a!",
        "...",
        "--",
        "<UNK>",
        "<PAD> <BOS>a<EOS>",
    ),
    *("<|startoftext|> a cat<|endoftext|>", "<|STARTOFTEXT|>", "</w>", "a</w> b", "unknown characters", "unk"),
    # the word start of YouTokenToMe as a character of the text
    *("\u2581", "\u2581\u2581a", "a\u2581b", "cat\u2581dog \u2581 x\u2581", "\u2581the \u2581cat"),
    # long words
    *("x" * 200, "a" * 200, "e" * 1001, "aaab" * 50, "the" * 100, "\u2603" * 200, "a\u2603" * 100, "\U0001f389" * 70),
    # scripts, emoji, combining marks, compatibility forms
    *(
        "\u732b\u304c\u597d\u304d",
        "a\u732bb \u732b\u732b c",
        "\uace0\uc591\uc774",
        "\u041a\u043e\u0442 \u0438 \u043f\u0451\u0441",
    ),
    *(
        "\u0642\u0637\u0629",
        "\u05d7\u05ea\u05d5\u05dc",
        "\u0e41\u0e21\u0e27",
        "\u092c\u093f\u0932\u094d\u0932\u0940",
        "\u0393\u03ac\u03c4\u03b1",
    ),
    *(
        "\U0001f389",
        "party \U0001f389\U0001f389!",
        "\U0001f468\U0001f3fd\u200d\U0001f680",
        "\U0001f1e9\U0001f1ea flag",
        "1\ufe0f\u20e3 \u2764\ufe0f",
    ),
    *(
        "caf\u00e9",
        "cafe\u0301",
        "e\u0301\u0301\u0301",
        "Z\u0351\u036ba\u0321lgo",
        "\u0345",
        "a\u0345b",
        "\u0301",
        "na\u00efve \u00df\u1e9e",
    ),
    *(
        "\u0130stanbul",
        "\u212a \u017f",
        "\uff21\uff22\uff13",
        "\ufb01sh \ufb06",
        "\u00bd \u2167 \u0663 \uff11 \u4e94",
        "5\u00b0 \u00b5m \u20ac3",
    ),
    # markup and mistaken encodings
    *(
        "&amp;",
        "&amp;amp;",
        "cats &amp; dogs &lt;b&gt;",
        "&#39;tis &#x2019;",
        "&nbsp;a&nbsp;b",
        "&notanentity; &",
        "&#0; &#28; &#127;",
    ),
    *(
        "it\u00e2\u20ac\u2122s",
        "caf\u00c3\u00a9",
        "\u201cquoted\u201d \u2018it\u2019s\u2019 \u2013 \u2014 \u2026",
        "\x1b[31mred\x1b[0m",
    ),
    # the edges of Unicode
    *("\ufffd", "\uffff", "\U0010ffff", "\ue000", "\ufeffa", "a\u200bb", "a\u2060b", "\u202eabc\u202c", "\ufdd0"),
]


def awkward_texts():
    """Return all the texts of the comparison but the captions."""
    spaces = [chr(code) for code in range(0x110000) if chr(code).isspace()]
    controls = [chr(code) for code in [*range(32), *range(127, 160)]]
    texts = list(TEXTS)
    texts += [f"a{char}cat {char}{char} dog{char}" for char in dict.fromkeys(spaces + controls)]
    # Mixtures: pieces of words, characters that a vocabulary has and lacks, every kind of blank.
    draw = random.Random(0)
    pieces = [
        "the",
        "cat",
        "ing",
        "sit",
        "A",
        "1",
        ".",
        "'s",
        "!",
        "\u00e9",
        "\u2603",
        "\u732b",
        "\U0001f389",
        "e\u0301",
    ]
    pieces += [" ", " ", " ", "\u00a0", "\u2581", "\t", "\u3000", "&amp;"]
    texts += ["".join(draw.choice(pieces) for _ in range(draw.randrange(1, 25))) for _ in range(100)]
    return texts


def digest(values):
    """Return the sha256 of a list as compact JSON."""
    return hashlib.sha256(json.dumps(values, separators=(",", ":")).encode()).hexdigest()


def results(encode, decode, captions, texts, vocab_size):
    """Return one vocabulary's part of the file; `captions` only enter by digest."""
    ids = [encode(text) for text in texts]
    return {
        "vocab_size": vocab_size,
        "ids": ids,
        "decoded_sha256": digest([decode(text_ids) if text_ids else "" for text_ids in ids]),
        "captions_sha256": digest([encode(caption) for caption in captions]),
    }


def train_reference(captions, texts):
    """Let youtokentome train a small vocabulary that does not cover every character."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as corpus:
        corpus.write("\n".join(captions[:3000] + texts))
        corpus.flush()
        youtokentome.BPE.train(corpus.name, REFERENCE, vocab_size=1000, coverage=0.998, n_threads=1)


def load_clip(folder):
    """Return SimpleTokenizer of dalle-pytorch, whose module asks for packages that this class does not use."""
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].is_tensor = lambda _: False
            sys.modules[name].BertTokenizer = None
    spec = importlib.util.spec_from_file_location("reference", Path(folder, "dalle_pytorch", "tokenizer.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def main():
    """Write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--captions", required=True)
    parser.add_argument("--dalle-pytorch", required=True)
    options = parser.parse_args()
    annotations = json.loads(Path(options.captions).read_text())["annotations"]
    captions = [annotation["caption"] for annotation in annotations]
    texts = awkward_texts()
    if not Path(REFERENCE).exists():
        train_reference(captions, texts)
    texts += captions[::100]
    golden = {"texts": texts, "num_captions": len(captions)}
    for name, path in (("shipped", SHIPPED), ("reference", REFERENCE)):
        bpe = youtokentome.BPE(path)
        golden[name] = results(
            lambda text, bpe=bpe: bpe.encode([text])[0],
            lambda ids, bpe=bpe: bpe.decode([ids], ignore_ids=[0])[0],
            captions,
            texts,
            bpe.vocab_size(),
        )
        golden[name]["vocab_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    clip = load_clip(options.dalle_pytorch)
    golden["clip"] = results(
        clip.encode,
        lambda ids: clip.decode([id_ for id_ in ids if id_ not in (0, 49406, 49407)]).rstrip(" "),
        captions,
        texts,
        clip.vocab_size,
    )
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in golden.items())
    (ASSETS / "bpe_golden.json").write_text("{" + rows + "}\n")


if __name__ == "__main__":
    main()
