"""A tiny model on disk, for tests of commands: letters as tokens, 24 codes on a 4x4 grid of a 16x16 image."""
from __future__ import annotations

from pathlib import Path

import torch
from helpers import letters_vocabulary, tiny_vqgan

from bpe import load_tokenizer
from checkpoints import dalle_checkpoint, save_checkpoint
from models.config import DalleConfig
from models.dalle import DalleModel
from models.vqgan import VQGAN
from utils.files import sha256_file

VQGAN_CONFIG = tiny_vqgan(num_codes=24, embed_dim=4, z_channels=4, ch_mult=(1, 2, 2))


class TinyModel:
    """A tiny model on disk: checkpoint, vocabulary of letters, VQGAN of 24 codes on a 4x4 grid of a 16x16 image."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = folder
        self.vocabulary = letters_vocabulary(folder / "letters.txt")
        self.tokenizer = load_tokenizer(str(self.vocabulary))
        self.vqgan_model, self.vqgan_config = folder / "vqgan.ckpt", folder / "vqgan.yaml"
        vqgan = VQGAN(VQGAN_CONFIG)
        torch.nn.init.normal_(vqgan.quantize.embedding.weight)
        VQGAN_CONFIG.to_yaml(self.vqgan_config)
        torch.save({"state_dict": vqgan.state_dict()}, self.vqgan_model)
        self.model = DalleModel(
            DalleConfig(self.tokenizer.vocab_size, 24, 10, 4, 24, 2, 2, 12, attn_types=("full", "axial_row"))
        )
        for name, parameter in self.model.named_parameters():  # a new model is nearly indifferent: give it opinions
            if name.endswith(".scale"):
                parameter.data.fill_(2.0)
            elif name.startswith("image_head."):
                parameter.data *= 6
            elif name == "text_head.bias":
                pads = [0, *range(self.tokenizer.vocab_size, len(parameter))]
                parameter.data[pads] = -50.0  # captions never end
        self.identity = {
            "tokenizer": dict(self.tokenizer.identity, path=str(self.vocabulary)),
            "vqgan": {
                "sha256": sha256_file(self.vqgan_model), "weights": str(self.vqgan_model),
                "config": str(self.vqgan_config),
            },
        }
        self.dalle = self.save("dalle_3.pt", self.identity)

    def save(self, name, training, weights=None, config=None):
        path = self.folder / name
        options, weights = (config or self.model.config).to_dict(), weights or self.model.state_dict()
        save_checkpoint(path, dalle_checkpoint(options, weights, 3, training=training))
        return path

    def other_vocabulary(self, folder):
        """A vocabulary of the same size that reads "a" as another letter."""
        path = folder / "letters.txt"
        path.write_text(self.vocabulary.read_text(encoding="utf-8").replace("97 4", "65 4"), encoding="utf-8")
        return path
