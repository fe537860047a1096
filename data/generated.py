"""Random pairs, for measuring speed without data."""
from __future__ import annotations

import torch

from data.datasets import PairDataset, TextSettings
from data.order import random_below, random_bits


class GeneratedDataset(PairDataset):
    """Random ids and pixels made on the host, determined by the seed: for measuring speed without data."""

    def __init__(self, num_pairs: int, settings: TextSettings, image_size: int) -> None:
        super().__init__(num_pairs, settings)
        self.image_size = image_size

    def image(self, pair: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(random_bits("image", self.settings.seed, pair) >> 1)
        shape = (3, self.image_size, self.image_size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    def origin(self) -> str:
        return "generated"

    def image_identity(self, pair: int) -> str:
        return f"{self.settings.seed} {pair}"

    def report(self) -> str:
        return f"generated data: {len(self)} random pairs"

    def check_captions(self) -> None:
        """Nothing to check: the texts are ids already."""

    def _fits(self, pair: int, words: str) -> bool:
        return True

    def _text(self, pair: int) -> torch.Tensor:
        settings = self.settings
        generator = torch.Generator().manual_seed(random_bits("text", settings.seed, pair) >> 1)
        text = torch.randint(1, settings.tokenizer.vocab_size, (settings.text_seq_len,), generator=generator)
        length = 1 + random_below(settings.text_seq_len, "length", settings.seed, pair)
        text[length:] = 0
        return text
