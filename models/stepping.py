"""One code of each image at a time: the transformer with all that no position changes looked up beforehand.

A token of a few images is many small operations and a pass over all weights. Here the modules' attributes are read
once and not for every token, and on a CPU weights are laid out for the rows there are: in each product with a handful
of rows MKL rearranges the weight, which costs more than the product; rearranged once, 8 rows take about half the time
(AVX-512, L16). Where kernels of our own can be had, they do all of it (native_rows.py).

Letters: B rows (images, twice as many with guidance), D width, H heads, K width of a head.
"""

import contextlib
import functools
from typing import Any, Callable, Iterator, List, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cache import LayerCache
from models.dalle import DALLE
from models.native_rows import RowStepper, row_stepper, suits
from models.transformer import Block, Residual
from ops import rotate

#: Bytes of weights up to which a second copy is made. Larger models need the memory more than the time.
_MAX_BYTES = 2 * 2**30
#: From so many rows on, packed weights are faster. Two or three read them as fast as memory gives them anyway.
_PACKED_ROWS = 4

Product = Callable[[Tensor], Tensor]


def _linears(model: DALLE) -> List[nn.Linear]:
    roots = (model.transformer, model.image_head)
    return [module for root in roots for module in root.modules() if isinstance(module, nn.Linear)]


def _small(linears: List[nn.Linear]) -> bool:
    """Whether a second copy of these is no burden."""
    return sum(linear.weight.numel() * 4 for linear in linears) <= _MAX_BYTES


def _copies(model: DALLE) -> bool:
    """Whether weights may be laid out anew: float32 on a CPU with MKL, and not too many."""
    linears = _linears(model)
    return (
        all(linear.weight.device.type == "cpu" and linear.weight.dtype == torch.float32 for linear in linears)
        and _small(linears)
        and torch.backends.mkl.is_available()
    )


@functools.lru_cache(maxsize=None)
def _packs() -> bool:
    """Whether PyTorch has the product with packed weights: 2.0 has its name and nothing behind it."""
    try:
        weight = torch.zeros(1, 1)
        torch.ops.mkl._mkl_linear(weight, torch.ops.mkl._mkl_reorder_linear_weight(weight, 1), weight, None, 1)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return True


def product(module: nn.Module, rows: int, copies: bool) -> Product:
    """Return what a linear layer does to x (rows, 1, C): x @ weight.T + bias. `copies` allows another layout."""
    if type(module) is not nn.Linear:
        return module.forward  # int8 weights, say
    weight, bias = module.weight.detach(), module.bias
    if copies and rows == 1:
        columns = weight.t().contiguous().t()
        return lambda x: F.linear(x, columns, bias)
    if copies and rows >= _PACKED_ROWS and _packs():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, rows)
        multiply = torch.ops.mkl._mkl_linear
        return lambda x: multiply(x, packed, weight, bias, rows)
    return lambda x: F.linear(x, weight, bias)


def norm(module: nn.LayerNorm) -> Product:
    """`LayerNorm.forward` with its parameters at hand."""
    shape, weight, bias, eps = module.normalized_shape, module.weight, module.bias, module.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def adder(branch: Residual) -> Callable[[Tensor, Tensor], Tensor]:
    """`Residual.add` with its parameters at hand."""
    if branch.norm_out is not None:
        return branch.add
    scale = branch.scale
    return torch.add if scale is None else lambda x, y: torch.addcmul(x, y, scale)


def feed_forward(activation: str, up: Product, down: Product) -> Product:
    """`FeedForward.forward` from what its linear layers do."""

    def geglu(x: Tensor) -> Tensor:
        x, gate = up(x).chunk(2, dim=-1)
        return down(F.gelu(gate).mul_(x))

    def quick_gelu(x: Tensor) -> Tensor:
        x = up(x)
        return down(x * torch.sigmoid(1.702 * x))

    return {"geglu": geglu, "gelu": lambda x: down(F.gelu(up(x))), "quick_gelu": quick_gelu}[activation]


def _layer(block: Block, rows: int, copies: bool) -> Callable[..., Tensor]:
    """Return (x (B, 1, D), position, cache, angles) -> (B, 1, D): `Block.forward` at one image position."""
    attention, heads, width = block.attention.fn, block.attention.fn.heads, block.attention.fn.dim_head
    first_norm, second_norm = norm(block.attention.norm), norm(block.feed_forward.norm)
    add, other_add = adder(block.attention), adder(block.feed_forward)
    qkv, out = product(attention.qkv, rows, copies), product(attention.out, rows, copies)
    other = block.feed_forward.fn
    up_and_down = feed_forward(other.activation, product(other.up, rows, copies), product(other.down, rows, copies))
    shift = block.shift_cached if block.shifts else None

    def step(x: Tensor, position: int, cache: LayerCache, angles: Optional[Tensor]) -> Tensor:
        normed = first_norm(x)
        if shift is not None:
            normed = shift(normed, position, cache.history[0])
        query, key, value = qkv(normed).view(rows, 3, heads, 1, width).unbind(1)
        if angles is not None:
            query, key, value = (rotate(tensor, angles) for tensor in (query, key, value))
        x = add(x, out(cache.attend(query, key, value, position).reshape(rows, 1, heads * width)))
        normed = second_norm(x)
        if shift is not None:
            normed = shift(normed, position, cache.history[1])
        return other_add(x, up_and_down(normed))

    return step


class Stepper:
    """Feeds one code of each image at a time. Weights must not change while it lives; no gradient, no dropout."""

    def __init__(self, model: DALLE, rows: int) -> None:
        self.model, self.rows = model, rows
        self.copies = _copies(model)
        self.layers = [_layer(block, rows, self.copies) for block in model.transformer.layers]
        self.table = model.image_emb
        self.positions = None if model.image_pos_emb is None else model.image_pos_emb.table()
        self.logits = product(model.image_head, rows, self.copies)
        """Hidden states (B, D) -> logits of the codes (B, C)."""

    def __call__(self, codes: Tensor, position: int, caches: Sequence[LayerCache]) -> Tensor:
        """Feed the codes (B,) at an image position; return the hidden state after them (B, D)."""
        x = self.table(codes)[:, None]
        if self.positions is not None:
            x = x + self.positions[position]
        first = self.model.config.text_len + position
        angles = self.model.transformer.angles
        angles = None if angles is None else angles[first : first + 1]
        for layer, cache in zip(self.layers, caches):
            x = layer(x, position, cache, angles)
        return self.model.hidden(x)[:, 0]


def batch_changes_logits(model: DALLE) -> bool:
    """Whether the number of rows may change the logits of one, by rounding: only kernels sum in one order for all."""
    return not (_small(_linears(model)) and suits(model, 1))


@contextlib.contextmanager
def stepping(model: DALLE, rows: int) -> Iterator[Union[Stepper, RowStepper]]:
    """Within the context, what feeds codes to so many rows: a `Stepper`, or kernels that do the same in less time."""
    kernels = row_stepper(model, rows) if _small(_linears(model)) else None
    if kernels is not None:
        yield kernels
        return
    stepper = Stepper(model, rows)
    before: Any = None
    if stepper.copies:
        # For a row or two, oneDNN takes longer to set up its gelu than PyTorch's own takes to compute it.
        before = torch.backends.mkldnn.set_flags(False)
    try:
        yield stepper
    finally:
        if before is not None:
            torch.backends.mkldnn.set_flags(before[0])
