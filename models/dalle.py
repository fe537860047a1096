"""DALL-E: one transformer that reads a caption and predicts the VQGAN codes of its image (arXiv 2102.12092).

Letters: B batch, T text tokens, P positions of the text part, N image tokens, L = P + N - 1 positions, D width, V text
vocabulary, C codebook size.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import transformer
from models.config import DalleConfig
from models.positions import Positions, text_positions
from models.soft_codes import SoftCodes
from models.transformer import Cache, Project, Transformer, projection
from ops import Projection, linear


class Operands(NamedTuple):
    """The weights that sampling uses for each chunk, in the form that ops take."""

    blocks: list[transformer.Operands]
    image_positions: Tensor | None
    """(N, D)"""
    image_head: Projection

    @property
    def projections(self) -> list[Projection]:
        """All linear layers."""
        return [self.image_head, *(layer for block in self.blocks for layer in block.projections)]


class Losses(NamedTuple):
    """Mean cross-entropies in nats: of the step (weighted), of the text tokens, of the image tokens."""

    total: Tensor
    text: Tensor
    image: Tensor


class AxialPositions(nn.Module):
    """Image positions as a row vector plus a column vector: 2 * G vectors instead of G * G."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(nn.init.normal_(torch.empty(grid, 1, dim)))
        self.columns = nn.Parameter(nn.init.normal_(torch.empty(1, grid, dim)))

    def table(self) -> Tensor:
        """Return the (N, D) table of all positions, row by row."""
        return (self.rows + self.columns).flatten(0, 1)


class LearnedPositions(nn.Module):
    """One learned vector for each image position."""

    def __init__(self, grid: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(grid * grid, dim)))

    def table(self) -> Tensor:
        """Return the (N, D) table of all positions."""
        return self.weight


class DalleModel(nn.Module):
    """Caption and codes in, next-token logits out.

    A text position can only predict text and an image position only codes, so each part has its own head. The original
    Mini DALL-E computes one head over V + T + C rows and masks two thirds of it; results are equal.
    """

    def __init__(self, config: DalleConfig, tables: bool = True) -> None:
        """tables: see `Transformer`."""
        super().__init__()
        self.config = config
        self.text_emb = nn.Embedding(config.text_table_size, config.dim)
        self.image_emb = nn.Embedding(config.num_image_tokens, config.dim)
        self.text_pos_emb = nn.Embedding(config.text_len, config.dim) if config.text_positions else None
        positions = {"axial": AxialPositions, "learned": LearnedPositions}.get(config.image_positions)
        self.image_pos_emb: Any = positions(config.grid, config.dim) if positions else None
        self.transformer = Transformer(config, tables)
        self.norm = transformer.make_norm(config)
        self.text_head = nn.Linear(config.dim, config.text_table_size, bias=config.head_bias)
        self.image_head = nn.Linear(config.dim, config.num_image_tokens, bias=config.head_bias)
        if config.init_std:
            self.apply(self._init_normal)
        if config.tie_embeddings:
            self.text_emb.weight = self.text_head.weight
            self.image_emb.weight = self.image_head.weight

    def _init_normal(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            # Sums over the inputs keep their size at any width: those of blocks if the weights shrink with its root;
            # those of the heads, whose inputs become alike in training, if they shrink with the width.
            power = 0.5 * isinstance(module, nn.Linear) + 0.5 * (module in (self.text_head, self.image_head))
            nn.init.normal_(module.weight, std=self.config.init_std * self.config.width_ratio**power)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # an embedding has none
        elif isinstance(module, (AxialPositions, LearnedPositions)):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=self.config.init_std)

    @torch.no_grad()
    def start_from(self, codebook: Tensor) -> None:
        """Give codes random projections of a VQGAN's codebook (C, E) as their vectors, as large as before."""
        features = (codebook - codebook.mean(dim=0)) / codebook.std(dim=0).clamp(min=1e-6)
        for table in (self.image_emb.weight, self.image_head.weight):
            vectors = features @ torch.randn(codebook.shape[1], table.shape[1])
            table.copy_(vectors * (table.std() / vectors.std()))

    def text_targets(self, text: Tensor) -> Tensor:
        """Give each pad its position's own id. (B, T) with 0 for pads -> (B, T)."""
        if not self.config.unique_pads:
            return text
        pads = torch.arange(text.shape[1], device=text.device) + self.config.num_text_tokens
        return torch.where(text == 0, pads, text)

    def embed_text(self, text: Tensor, positions: Positions | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Embed positions of the text part, all by default. text (B, n): their ids, from `text_part` -> (B, n, D).

        dtype: what is added, if not in the type of the weights.
        """
        x = self.text_emb(text).to(dtype)
        if self.text_pos_emb is not None:
            x = x + (positions or text_positions(0, text.shape[1])).rows(self.text_pos_emb.weight)
        return x

    def text_part(self, text: Tensor) -> Tensor:
        """Return the ids of the whole text part: <bos> in front, pads with their own ids. (B, T) -> (B, P)."""
        text = self.text_targets(text)
        return F.pad(text, (1, 0), value=0) if self.config.bos else text

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed the first n image tokens. (B, n) -> (B, n, D)."""
        x = self.image_emb(codes)
        return x if self.image_pos_emb is None else x + self.image_pos_emb.table()[: codes.shape[1]]

    def operands(self, project: Project = projection) -> Operands:
        """Look up the weights that `read` needs; it applies no dropout, not even in training mode."""
        layers: Any = self.transformer.layers
        blocks = [block.operands(project) for block in layers]
        table = None if self.image_pos_emb is None else self.image_pos_emb.table()
        return Operands(blocks, table, project(self.image_head))

    def read(self, ids: Tensor, positions: Positions, cache: Cache, operands: Operands | None = None) -> Tensor:
        """Read a chunk that follows the cached positions, and cache it; return the heads' input, (B, n, D).

        ids: from `text_part`, (prompts, n), or codes (B, n). The prompt, a given part of an image, the next code and
        several codes in parallel are the same call. operands: None looks them up.
        """
        own = operands or self.operands()
        if positions.text:
            x = self.embed_text(ids, positions)
        else:
            x = F.embedding(ids, self.image_emb.weight)
            x = x if own.image_positions is None else x + positions.rows(own.image_positions)
        return self.hidden(self.transformer(x, positions, cache, own.blocks))

    def _damp(self, x: Tensor) -> Tensor:
        """With `stable`: the same value, but only a tenth of the gradient reaches the embeddings (CogView)."""
        return x * 0.1 + x.detach() * 0.9 if self.config.stable else x

    def hidden(self, x: Tensor) -> Tensor:
        """The head's input: transformer output (B, n, D), normalised."""
        if self.config.stable:
            x = x / x.amax(dim=-1, keepdim=True).detach()
        return self.norm(x)

    def forward(self, text: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the text tokens and of the codes.

        text (B, T) token ids, 0 = pad; codes (B, N). Returns (B, P - 1, V or V + T) and (B, N, C): row i of the first
        predicts the text part's id at position i + 1, row i of the second predicts code i.
        """
        x = torch.cat([self.embed_text(self.text_part(text)), self.embed_codes(codes[:, :-1])], dim=1)  # (B, L, D)
        x = self.hidden(self.transformer(self._damp(x)))
        last = self.config.text_len - 1  # the last text position predicts the first code
        return linear(x[:, :last], projection(self.text_head)), linear(x[:, last:], projection(self.image_head))

    def loss(
        self, text_logits: Tensor, image_logits: Tensor, text: Tensor, codes: Tensor, soft: SoftCodes | None = None
    ) -> Losses:
        """Return (CE_text + w * CE_image) / (w + 1) and its parts, each a mean over its positions (scalars, nats).

        In training the total has the z-loss, too, and the image's part of it soft targets and label smoothing.

        A text part of one position predicts no text: its loss is 0, and the total is that of the image alone.
        """
        targets, weight = self.text_part(text)[:, 1:], self.config.loss_img_weight
        logits = image_logits.float()
        log_probabilities = logits.log_softmax(dim=-1)
        image_loss = learned = F.nll_loss(log_probabilities.flatten(0, 1), codes.flatten())
        if self.training and soft is not None:
            learned = soft.cross_entropy(log_probabilities, codes)
            learned = learned + soft.exact * (image_loss - learned)
        if self.training and self.config.label_smoothing:
            even = (logits.logsumexp(-1) - logits.mean(-1)).mean()  # the loss with evenly spread targets
            learned = learned + self.config.label_smoothing * (even - learned)  # PopTorch has no lerp
        if targets.shape[1]:
            text_loss = F.cross_entropy(text_logits.flatten(0, 1).float(), targets.flatten())
            total = (text_loss + weight * learned) / (weight + 1)
        else:
            # Not a constant: with several processes every parameter needs a gradient, the unused text head too.
            text_loss = text_logits.float().sum()
            total = learned + text_loss
        if self.training and self.config.z_loss:
            share = weight / (weight + 1) if targets.shape[1] else 1.0
            z_loss = share * logits.logsumexp(dim=-1).square().mean()
            if share < 1:
                z_loss = z_loss + (1 - share) * text_logits.float().logsumexp(dim=-1).square().mean()
            total = total + self.config.z_loss * z_loss
        return Losses(total, text_loss, image_loss)


class TextToImage(nn.Module):
    """A DALL-E over a frozen VQGAN: takes raw images or their codes. This is what an engine trains.

    The VQGAN has no trainable parameters, stays in eval mode, and may be absent if codes are given.
    code_noise: share of the input codes that are replaced by random ones in training. Targets stay unchanged, so the
    model learns to trust the caption more than codes that may be wrong, as its own are when it samples.
    noise_per_image: each image has its own share, from 0 to twice `code_noise`, so that the model also learns to trust
    codes that fit together.
    noise_similar: share of the images in which a random share of the input codes are those of a similar image, if such
    are given: codes that fit together, but not the caption.
    soft: makes targets soft, and replaces input codes by similar ones before they get this noise.
    """

    def __init__(
        self,
        dalle: DalleModel,
        vqgan: nn.Module | None = None,
        code_noise: float = 0.0,
        noise_per_image: bool = False,
        noise_similar: float = 0.0,
        soft: SoftCodes | None = None,
    ) -> None:
        super().__init__()
        self.dalle = dalle
        self.vqgan: Any = vqgan
        self.soft = soft
        self.code_noise, self.noise_per_image, self.noise_similar = code_noise, noise_per_image, noise_similar
        if vqgan is not None:
            vqgan.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> TextToImage:
        super().train(mode)
        if self.vqgan is not None:
            self.vqgan.eval()
        return self

    def codes(self, images: Tensor) -> Tensor:
        """Return the codes (B, N) of images: (B, 3, S, S) as uint8 or floats in [0, 1], or codes (B, N) already."""
        if images.dim() == 2:
            return images
        if self.vqgan is None:
            raise ValueError("images were given, but this model has no VQGAN: pass codes instead")
        if images.dtype == torch.uint8:
            images = images.float() / 255
        with torch.no_grad():
            return self.vqgan.encode(images)

    def _add_code_noise(self, codes: Tensor, similar: Tensor | None = None) -> Tensor:
        if not self.training:
            return codes
        codes = codes if self.soft is None else self.soft.sample(codes)
        if similar is not None:
            chosen, of_image = torch.rand(2, len(codes), 1, device=codes.device)
            wrong = torch.rand(codes.shape, device=codes.device) < of_image * (chosen < self.noise_similar)
            codes = torch.where(wrong, similar, codes)
        if not self.code_noise:
            return codes
        share: Any = self.code_noise
        if self.noise_per_image:
            share = 2 * share * torch.rand(len(codes), 1, device=codes.device)
        wrong = torch.rand(codes.shape, device=codes.device) < share
        return torch.where(wrong, torch.randint_like(codes, self.dalle.config.num_image_tokens), codes)

    def forward(self, text: Tensor, images: Tensor) -> Losses:
        """Return the losses of captions (B, T) and images or codes (see `codes`).

        images may also be (B, 2, N): codes, and those of a similar image, for `noise_similar`.
        """
        similar = None
        if images.dim() == 3:
            images, similar = images.unbind(dim=1)
        codes = self.codes(images)
        text_logits, image_logits = self.dalle(text, self._add_code_noise(codes, similar))
        return self.dalle.loss(text_logits, image_logits, text, codes, self.soft)
