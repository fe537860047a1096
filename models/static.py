"""One code of each image with fixed shapes at fixed addresses: `stepping.py` for a device that replays recordings.

A GPU runs an operation of a token in a few microseconds; Python needs longer to ask for it. A CUDA graph asks for all
of them at once, but does again exactly what was recorded: the position is a tensor on the device, what it selects is
looked up there, and keys lie in rooms of fixed size that a bias of 0 or -inf opens as far as the position may see.

Letters: B rows (images, twice as many with guidance), P positions of the text part, G side of the code grid, N = G * G
codes, D width, H heads, K width of a head, W codes that a sparse pattern shows at most, n codes within reach.
"""

from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import LayerCache
from models.config import DalleConfig
from models.dalle import DALLE
from models.patterns import allowed_codes
from models.stepping import Product, adder, feed_forward, norm
from models.transformer import Block
from ops import rotate

#: Keys of a row are made a multiple of it, for which the kernels of a GPU read half precision fastest.
_ALIGNED = 8


class StaticCache(LayerCache):
    """Keys and values of a layer where an operation of fixed shape finds them.

      text   (2, H, prompts, P, K), shared by all images of a prompt
      codes  (2, H, B, N, K)
      shown  (B, G + N, D) for each sub-layer, only with shift_tokens: a row of zeros in front of the inputs

    Heads come first, so that images of a prompt are rows of one matrix product without a copy. Filled by the same
    functions as every cache, at the beginning; then by `attend`.
    """

    def _make_room(self, config: DalleConfig) -> None:
        rows, zeros = self.prompts * self.images, self.text_key.new_zeros
        self.text = zeros(2, config.heads, self.prompts, config.text_len, config.dim_head)
        self.text_key, self.text_value = self.text.transpose(1, 2).unbind(0)
        self.codes = zeros(2, config.heads, rows, self.grid**2, config.dim_head)
        self.shown: List[Tensor] = []
        if config.shift_tokens:
            self.shown = [zeros(rows, self.grid + self.grid**2, config.dim) for _ in range(2)]
            self.history = [shown[:, self.grid :] for shown in self.shown]

    def put_first_codes(self, key: Tensor, value: Tensor) -> None:
        for room, codes in zip(self.codes, (key, value)):
            room[:, :, : codes.shape[2]] = codes.transpose(0, 1)

    def clear(self) -> None:
        """Zero everything: what an earlier image left is hidden, but not a number times no weight is not a number."""
        for tensor in (self.text, self.codes, *self.shown):
            tensor.zero_()

    def attend(self, qkv: Tensor, position: Tensor, sight: "Sight") -> Tensor:  # type: ignore[override]
        """Keep key and value of the code at `position` (1,) and attend from there. (B, 3, H, K) -> (B, 1, H * K)."""
        rows, _, heads, width = qkv.shape
        prompts, images, text_len = self.prompts, self.images, self.text_len
        self.codes.index_copy_(3, position, qkv[:, 1:].permute(1, 2, 0, 3)[:, :, :, None])
        codes = self.codes[:, :, :, : sight.count] if sight.codes is None else self.codes.index_select(3, sight.codes)
        keys, values = (room.flatten(0, 1) for room in codes.unbind(0))  # (H * B, n, K)
        query, scores = sight.query, sight.scores
        torch.mul(qkv[:, 0].transpose(0, 1), width**-0.5, out=query)  # (H, B, K)
        # Images of a prompt read the same text keys: one matrix product for all of them.
        grouped, text = query.view(heads * prompts, images, width), self.text.flatten(1, 2)
        end = text_len + keys.shape[1]
        by_prompt, by_row = (heads * prompts, images, -1), (heads * rows, 1, -1)
        scores.view(by_prompt)[..., :text_len].baddbmm_(grouped, text[0].transpose(1, 2), beta=0)
        scores.view(by_row)[..., text_len:end].baddbmm_(query.view(by_row), keys.transpose(1, 2), beta=0)
        weights = torch.softmax(scores + sight.bias, dim=-1)
        attended = torch.bmm(weights.view(by_row)[..., text_len:end], values).view(by_prompt)
        attended = attended.baddbmm_(weights.view(by_prompt)[..., :text_len], text[1])
        return attended.view(heads, rows, width).transpose(0, 1).reshape(rows, 1, heads * width)


class Sight(NamedTuple):
    """What the layers of one pattern see from one position, and where they compute it."""

    codes: Optional[Tensor]
    """Indices (W,) of the codes to look at; None: the first `count` ones."""
    count: int
    bias: Tensor
    """(1, keys): 0 for the text and for what is seen, -inf for the rest."""
    query: Tensor
    """(H, B, K), room for all layers one after the other."""
    scores: Tensor
    """(H, B, keys): text, codes, and as many zeros as make the count of keys a multiple of 8."""


def _tables(pattern: str, grid: int) -> Tuple[Optional[Tensor], Tensor]:
    """For each position the codes to look at (N, W), and which of them are seen, (N, W) bool. None: the first N."""
    allowed = allowed_codes(pattern, grid)
    if pattern == "full":
        return None, allowed
    count = int(allowed.sum(dim=1).max())
    order = torch.argsort(allowed.int(), dim=1, descending=True, stable=True)[:, :count]  # the seen ones in order
    return order, allowed.gather(1, order)


class _View:
    """The tables of one pattern on the device, and for each reach room for scores: a recording holds on to it."""

    def __init__(self, config: DalleConfig, pattern: str, rows: int, reaches: Sequence[int], like: Tensor) -> None:
        codes, seen = _tables(pattern, config.grid)
        self.codes = None if codes is None else codes.to(like.device)
        bias = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
        bias = F.pad(bias, (config.text_len, 0)).to(like.device)  # (N, P + N) or (N, P + W)
        self.query = like.new_zeros(config.heads, rows, config.dim_head)
        self.rooms: Dict[int, Tuple[Tensor, Tensor]] = {}
        for reach in reaches:
            keys = config.text_len + (reach if codes is None else codes.shape[1])
            pad = -keys % _ALIGNED
            scores = like.new_zeros(config.heads, rows, keys + pad)
            self.rooms[reach] = (F.pad(bias[:, :keys], (0, pad), value=float("-inf")), scores)

    def at(self, position: Tensor, reach: int) -> Sight:
        """What is seen from `position` (1,), which must lie below `reach`."""
        bias, scores = self.rooms[reach]
        codes = None if self.codes is None else self.codes.index_select(0, position)[0]
        return Sight(codes, reach, bias.index_select(0, position), self.query, scores)


def computed_in(model: DALLE) -> torch.dtype:
    """The type in which a linear layer computes now, under autocast or not."""
    like = model.text_emb.weight.detach()[:1, :1]
    return F.linear(like, like).dtype


def _linear(module: nn.Module, dtype: torch.dtype) -> Product:
    if type(module) is not nn.Linear:
        return module.forward  # int8 weights, say
    weight, bias = module.weight.detach().to(dtype), None if module.bias is None else module.bias.detach().to(dtype)
    return lambda x: F.linear(x.to(dtype), weight, bias)


class StaticStepper:
    """Feeds one code of each image at a time, at a position that only the device knows.

    What autocast would do in each step is done once: linear layers are copied to the type it computes them in, norms
    and sums stay in the weights' own. Must be called with autocast off. reaches: those that it will be called with.
    """

    def __init__(self, model: DALLE, rows: int, reaches: Sequence[int]) -> None:
        config, self.model = model.config, model
        self.dtype = computed_in(model)
        like = torch.empty(0, dtype=self.dtype, device=model.text_emb.weight.device)
        self.views = {pattern: _View(config, pattern, rows, reaches, like) for pattern in set(config.layer_patterns)}
        self.patterns = config.layer_patterns
        self.layers = [_layer(block, self.dtype) for block in model.transformer.layers]
        self.table = model.image_emb.weight.detach()
        self.positions = None if model.image_pos_emb is None else model.image_pos_emb.table().detach()
        angles = model.transformer.angles
        self.angles = None if angles is None else angles[config.text_len :]
        column = torch.arange(config.image_seq_len, device=like.device) % config.grid
        self.inside = (column != 0).to(self.table.dtype) if config.shift_tokens else None
        self.logits = _linear(model.image_head, self.dtype)
        """Hidden states (B, D) -> logits of the codes (B, C)."""

    def make_caches(self, prompts: int, images: int) -> List[StaticCache]:
        """Empty caches, one for each layer."""
        config, device = self.model.config, self.table.device
        return [StaticCache(config, pattern, prompts, images, device, self.dtype) for pattern in self.patterns]

    def __call__(self, codes: Tensor, position: Tensor, caches: List[StaticCache], reach: int) -> Tensor:
        """Feed the codes (B,) at an image position, (1,) on the device, below `reach`; return what follows, (B, D).

        Only codes before `reach` are read by dense layers: it may grow with the position, and is fixed in a recording.
        """
        x = F.embedding(codes, self.table)[:, None]
        if self.positions is not None:
            x = x + self.positions.index_select(0, position)
        angles = None if self.angles is None else self.angles.index_select(0, position)
        inside = None if self.inside is None else self.inside.index_select(0, position)
        sights = {pattern: view.at(position, reach) for pattern, view in self.views.items()}
        for layer, cache, pattern in zip(self.layers, caches, self.patterns):
            x = layer(x, position, cache, sights[pattern], angles, inside)
        return self.model.hidden(x)[:, 0]


def _shift(x: Tensor, position: Tensor, shown: Tensor, grid: int, inside: Tensor) -> Tensor:
    """`models.transformer.shift_image` at one position. x (B, 1, D), shown (B, G + N, D) with zeros in front."""
    quarter = x.shape[-1] // 4
    shown.index_copy_(1, position + grid, x.to(shown.dtype))
    above = shown.index_select(1, position)[..., :quarter]
    left = shown.index_select(1, position + (grid - 1))[..., quarter : 2 * quarter]
    return torch.cat([above.to(x.dtype), left.to(x.dtype) * inside, x[..., 2 * quarter :]], dim=-1)


def _layer(block: Block, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Return (x (B, 1, D), position, cache, sight, angles, inside) -> (B, 1, D): `Block.forward` at one position."""
    attention, grid = block.attention.fn, block.grid
    heads, width = attention.heads, attention.dim_head
    first_norm, second_norm = norm(block.attention.norm), norm(block.feed_forward.norm)
    add, other_add = adder(block.attention), adder(block.feed_forward)
    qkv, out = _linear(attention.qkv, dtype), _linear(attention.out, dtype)
    other = block.feed_forward.fn
    up_and_down = feed_forward(other.activation, _linear(other.up, dtype), _linear(other.down, dtype))

    def step(
        x: Tensor,
        position: Tensor,
        cache: StaticCache,
        sight: Sight,
        angles: Optional[Tensor],
        inside: Optional[Tensor],
    ) -> Tensor:
        normed = first_norm(x)
        if inside is not None:
            normed = _shift(normed, position, cache.shown[0], grid, inside)
        parts = qkv(normed).view(-1, 3, heads, width)
        if angles is not None:
            parts = rotate(parts, angles)
        attended = cache.attend(parts.to(dtype), position, sight)
        x = add(x, out(attended).to(x.dtype))
        normed = second_norm(x)
        if inside is not None:
            normed = _shift(normed, position, cache.shown[1], grid, inside)
        return other_add(x, up_and_down(normed).to(x.dtype))

    return step
