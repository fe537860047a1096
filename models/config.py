"""The configuration of a DALL-E: all that is needed to build one, nothing about how or where it is trained."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any, Mapping

from utils.errors import UserError, nearest

#: Which image positions an image position may attend to; the text part is always visible (see patterns.py).
ATTENTION_PATTERNS = ("full", "axial_row", "axial_col", "conv_like", "conv_causal")

ACTIVATIONS, GATED, NORMS = ("geglu", "swiglu", "gelu", "quick_gelu", "relu2"), ("geglu", "swiglu"), ("layer", "rms")

_MINDALLE = {
    "bos": False,
    "unique_pads": False,
    "layer_scale": False,
    "image_positions": "learned",
    "activation": "gelu",
    "qkv_bias": True,
    "head_bias": False,
}

#: The options of DalleConfig that define an architecture (--architecture), without size and training.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mini-dalle": {},
    "mindalle": _MINDALLE,
    "image-gpt": dict(_MINDALLE, text_positions=False),
}


@dataclass(frozen=True)
class DalleConfig:
    """Shape and options of a DALL-E. The defaults are those of Mini DALL-E.

    Letters used throughout models/: B batch, T text tokens, P positions of the text part (T + 1 with <bos>), G side of
    the code grid, N = G * G image tokens, L = P + N - 1 positions the transformer sees, D width, H heads, K head width,
    V text vocabulary, C codebook size.
    """

    num_text_tokens: int
    """V: entries of the text vocabulary, without the pad ids that `unique_pads` adds."""
    num_image_tokens: int
    """C: entries of the VQGAN's codebook."""
    text_seq_len: int
    """T: text tokens a caption is padded or truncated to."""
    grid: int
    """G: codes on a side of the image."""
    dim: int
    """D: width of the residual stream."""
    depth: int
    """Number of transformer layers."""
    heads: int
    """H: attention heads of a layer."""
    dim_head: int
    """K: width of one head; the attention's inner width is H * K."""
    attn_types: tuple[str, ...] = ("full",)
    """Attention pattern of each layer, cycled if shorter than `depth`."""
    loss_img_weight: float = 7.0
    """w in loss = (text + w * image) / (w + 1)."""
    z_loss: float = 0.0
    """In training the loss of each position also has z_loss * log(sum(exp(logits)))^2 (PaLM, arXiv 2204.02311)."""
    label_smoothing: float = 0.0
    """In training the target of a code has this share of its probability spread evenly over all codes."""
    attn_dropout: float = 0.0
    """Dropout on an attention layer's output."""
    ff_dropout: float = 0.0
    """Dropout inside the feed-forward layer, after its activation."""
    sandwich_norm: bool = False
    """A second LayerNorm on each residual branch's output (CogView, arXiv 2105.13290, section 2.4)."""
    layer_scale: bool = True
    """A learned per-channel factor on each residual branch (CaiT, arXiv 2103.17239)."""
    activation: str = "geglu"
    """Feed-forward kind: geglu or swiglu (arXiv 2002.05202), gelu (exact), quick_gelu (x * sigmoid(1.702 x)), or relu2
    (the square of relu, arXiv 2109.08668)."""
    norm: str = "layer"
    """Norms of the blocks and before the heads: layer, or rms (no mean, no shift; arXiv 1910.07467)."""
    qk_norm: bool = False
    """Queries and keys of each head are RMS-normalised, with learned scales (arXiv 2302.05442)."""
    value_residual: bool = False
    """Values of each layer but the first are mixed with the first's, by a learned share (arXiv 2410.17897). Layers that
    share the first's attention have its values unmixed."""
    ff_mult: int = 4
    """Hidden width of the feed-forward layer, as a multiple of `dim`."""
    qkv_bias: bool = False
    """Biases on the query, key and value projections."""
    out_bias: bool = True
    """Bias on the attention's output projection."""
    ff_bias: bool = True
    """Biases in the feed-forward layer."""
    head_bias: bool = True
    """Biases on the two heads."""
    bos: bool = True
    """A <bos> token with id 0 in front of the text."""
    unique_pads: bool = True
    """A pad (id 0) at text position p is embedded and predicted as id V + p."""
    text_positions: bool = True
    """Learned positions for the text part."""
    image_positions: str = "axial"
    """Image positions: axial (row vector + column vector), learned (one vector each), or none."""
    rotary: bool = False
    """Rotary position embedding of DALLE-pytorch (on queries, keys and values; text and both image axes)."""
    rotary_2d: bool = False
    """Rotary positions of queries and keys: half of a head's channels by row, half by column; text counts in both."""
    shift_tokens: bool = False
    """Half of a text token's channels come from the previous token; of a code's, a quarter each from above and left."""
    stable: bool = False
    """Embedding gradients scaled by 0.1 and the last hidden state divided by its largest element (CogView)."""
    tie_embeddings: bool = False
    """The embedding tables are the heads' weights."""
    shared_attn_ids: tuple[int, ...] | None = None
    """Layers with the same id share one attention layer; cycled. None: nothing is shared."""
    shared_ff_ids: tuple[int, ...] | None = None
    """Layers with the same id share one feed-forward layer; cycled. None: nothing is shared."""
    init_std: float = 0.0
    """Standard deviation of normal initialisation with zero biases (minDALL-E: 0.02); 0: PyTorch's defaults."""
    base_width: float = 0.0
    """The width that `init_std` and the learning rate were tuned at, see `width_ratio`; 0: this one."""

    def __post_init__(self) -> None:
        for name in (
            "num_text_tokens",
            "num_image_tokens",
            "text_seq_len",
            "grid",
            "dim",
            "depth",
            "heads",
            "dim_head",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"model option {name} must be at least 1, not {getattr(self, name)!r}")
        if not self.attn_types:
            raise UserError(
                "model option attn_types names no attention pattern; give at least one of "
                + ", ".join(ATTENTION_PATTERNS)
            )
        for pattern in self.attn_types:
            if pattern not in ATTENTION_PATTERNS:
                raise UserError(
                    "unknown attention pattern {!r} in attn_types.{} Known: {}".format(
                        pattern, nearest(pattern, ATTENTION_PATTERNS), ", ".join(ATTENTION_PATTERNS)
                    )
                )
        if self.activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {self.activation!r}; known: {', '.join(ACTIVATIONS)}")
        if self.norm not in NORMS:
            raise UserError(f"unknown norm {self.norm!r}; known: {', '.join(NORMS)}")
        if self.rotary_2d and (self.rotary or self.dim_head % 4):
            raise UserError(f"rotary_2d excludes rotary and needs a head width divisible by 4, not {self.dim_head}")
        if self.image_positions not in ("axial", "learned", "none"):
            raise UserError(f"unknown image_positions {self.image_positions!r}; known: axial, learned, none")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"model option label_smoothing must be from 0 to below 1, not {self.label_smoothing!r}")
        if self.shift_tokens and self.dim % 4:
            raise UserError(f"shift_tokens needs a width (dim) divisible by 4, not {self.dim}")
        self._check_shared_attention()

    def _check_shared_attention(self) -> None:
        """Layers that share an attention layer have one pattern: it is one module with one mask."""
        patterns: dict[int, str] = {}
        ids = self.shared_attn_ids or ()
        for layer, pattern in enumerate(self.layer_patterns if ids else ()):
            shared = ids[layer % len(ids)]
            if patterns.setdefault(shared, pattern) != pattern:
                raise UserError(
                    f"layers that share attention {shared} (shared_attn_ids) have different patterns in attn_types: "
                    f"{patterns[shared]} and {pattern}"
                )

    @property
    def width_ratio(self) -> float:
        """base_width / dim: initial weights and learning rates shrink with it, so that what was tuned at one width
        holds at others (muP, arXiv 2203.03466, table 8)."""
        return self.base_width / self.dim if self.base_width else 1.0

    @property
    def hidden(self) -> int:
        """Hidden channels of a feed-forward layer."""
        return self.ff_mult * self.dim

    @property
    def up_width(self) -> int:
        """Outputs of its first linear layer: twice the hidden channels if gated."""
        return self.hidden * (2 if self.activation in GATED else 1)

    @property
    def text_len(self) -> int:
        """P: positions of the text part."""
        return self.text_seq_len + int(self.bos)

    @property
    def image_seq_len(self) -> int:
        """N: image tokens."""
        return self.grid * self.grid

    @property
    def seq_len(self) -> int:
        """L: positions the transformer sees in training (the last image token is only predicted)."""
        return self.text_len + self.image_seq_len - 1

    @property
    def text_table_size(self) -> int:
        """Rows of the text embedding table and of the text head."""
        return self.num_text_tokens + (self.text_seq_len if self.unique_pads else 0)

    @property
    def layer_patterns(self) -> tuple[str, ...]:
        """The attention pattern of each layer, `depth` of them."""
        return tuple(islice(cycle(self.attn_types), self.depth))

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as plain values (tuples as lists), for a checkpoint or JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DalleConfig:
        """Build from `to_dict`'s result. Raises UserError on an unknown or a missing key."""
        known = {field.name for field in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"unknown model option {key!r}.{nearest(key, known)}")
        try:
            options: dict[str, Any] = {
                key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
            }
            return cls(**options)
        except TypeError as error:
            raise UserError(f"incomplete model options: {error}") from error
