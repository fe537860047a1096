"""Write into tests/assets/bpe_golden.json what the reference tokenizers say of its texts, for tests to compare with.

    python tests/assets/bpe_make_golden.py --captions captions_val2017.json --dalle-pytorch UNPACKED_WHEEL

Needs youtokentome 1.0.6 (which builds only with Cython < 3 and without build isolation), ftfy, regex, and the wheel of
dalle-pytorch 1.6.6 unpacked in a folder. Also trains tests/assets/bpe_youtokentome_vocab.txt when that file is absent,
on captions and the texts, so that the comparison covers a vocabulary that youtokentome made itself.
Run it from the root of the repository. Nothing here is imported from the project.

The texts are every hundredth caption and awkward ones: every blank and control character, words of 1001 letters, the
word start of youtokentome, special tokens, scripts, emoji, combining marks, compatibility forms, markup, mistaken
encodings, the edges of Unicode, and random mixtures.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
import types
from pathlib import Path

import youtokentome

ASSETS = Path(__file__).parent
SHIPPED = "bpe/bpe_yttm_vocab.txt"
REFERENCE = "tests/assets/bpe_youtokentome_vocab.txt"

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
    texts = json.loads((ASSETS / "bpe_golden.json").read_text())["texts"]
    if not Path(REFERENCE).exists():
        train_reference(captions, [text for text in texts if text not in captions])
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
