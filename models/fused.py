"""Products with gradients of their own, which keep less for the backward pass than autograd would.

Autograd keeps the input of every operation. What is cheap to compute is computed a second time here: normalised inputs
from the residual stream, gelu from its argument, attention weights of the sparse patterns from queries and keys. The
output of a scaled branch is not needed at all. L16 keeps 55 % of what it would otherwise, at the same speed.

Plain PyTorch; on a CPU in float32, where a compiler is, the kernels of models/kernels do the same with less traffic. A
device that knows no autograd functions written in Python (IPU) takes the modules' own `forward` instead, which compute
the same.

Letters: B batch, L positions, D width of a layer's input, C of its output, H heads, K width of a head, P positions of
the text part.
"""

from typing import Any, Dict, NamedTuple, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import attention as attention_kernel
from models.kernels import training as kernels
from models.kernels.build import usable
from models.local_attention import from_windows, window_weights, windows

Gradients = Tuple[Optional[Tensor], ...]


def _autocasts(x: Tensor) -> bool:
    """Whether products of x may be computed in another type than its own."""
    if hasattr(torch, "get_autocast_dtype"):  # from PyTorch 2.4 on there is one question for all devices
        return torch.is_autocast_enabled(x.device.type)
    return torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()


def _linear_into(result: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """F.linear with a place for the result, (..., C)."""
    rows = result.view(-1, result.shape[-1])
    if bias is None:
        torch.mm(_rows(x), weight.t(), out=rows)
    else:
        torch.addmm(bias, _rows(x), weight.t(), out=rows)
    return result


def _weight_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """A place for the gradient of a weight: what stays is taken before what is needed for a moment only, or memory
    would be full of holes."""
    return torch.empty_like(weight, dtype=gradient.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class _NormLinear(torch.autograd.Function):
    """Linear(LayerNorm(x)), of which only x is kept."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Optional[Tensor]
    ) -> Tensor:
        result = None if _autocasts(x) else x.new_empty(*x.shape[:-1], len(weight))  # before what is freed again
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return F.linear(normed, weight, bias) if result is None else _linear_into(result, normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, scale, shift, mean, rstd, weight = ctx.saved_tensors
        for_weight = _weight_gradient(gradient, weight)
        normed = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)[0].to(gradient.dtype)
        torch.mm(_rows(gradient).t(), _rows(normed), out=for_weight)
        del normed
        for_normed = gradient @ weight.to(gradient.dtype)
        for_bias = _rows(gradient).sum(dim=0).to(weight.dtype) if ctx.has_bias else None
        for_x, for_scale, for_shift = torch.ops.aten.native_layer_norm_backward(
            for_normed.to(x.dtype), x, x.shape[-1:], mean, rstd, scale, shift, [True, True, True]
        )
        return for_x, for_scale, for_shift, None, for_weight.to(weight.dtype), for_bias


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """linear(norm(x)). (B, L, D) -> (B, L, C)."""
    return _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias)


class Function(Protocol):
    """What comes before a product and is cheap to compute again."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        """Compute it again, and write the gradient for x to `for_x`. `incoming`, that of the result, may be lost."""


class _Identity:
    def __call__(self, x: Tensor) -> Tensor:
        return x

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        for_x.copy_(incoming)
        return x


class _Geglu:
    """The first half of x, gated by the second."""

    def __call__(self, x: Tensor) -> Tensor:
        if kernels.suits(x):
            return kernels.gelu(x, gated=True)
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        if kernels.suits(x, incoming, for_x):
            kernels.gelu_again(x, True, incoming, for_x)
            return incoming
        x, gate = x.chunk(2, dim=-1)
        for_x, for_gate = for_x.chunk(2, dim=-1)
        active = F.gelu(gate)
        torch.mul(incoming, active, out=for_x)
        torch.ops.aten.gelu_backward.grad_input(incoming.mul_(x), gate, grad_input=for_gate)
        return active.mul_(x)


class _Gelu:
    def __call__(self, x: Tensor) -> Tensor:
        return kernels.gelu(x, gated=False) if kernels.suits(x) else F.gelu(x)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        if kernels.suits(x, incoming, for_x):
            kernels.gelu_again(x, False, incoming, for_x)
            return incoming
        torch.ops.aten.gelu_backward.grad_input(incoming, x, grad_input=for_x)
        return F.gelu(x)


class _QuickGelu:
    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(1.702 * x).mul_(x)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        gate = torch.sigmoid(1.702 * x)
        torch.mul(incoming.mul_(gate), 1 + 1.702 * x * (1 - gate), out=for_x)
        return gate.mul_(x)


ACTIVATIONS: Dict[str, Function] = {"geglu": _Geglu(), "gelu": _Gelu(), "quick_gelu": _QuickGelu()}
"""Of the feed-forward layer, by their names in a configuration."""
IDENTITY: Function = _Identity()


class _Parts(NamedTuple):
    """Queries (scaled), keys and values of text and codes, and who attends to what how much."""

    text_query: Tensor
    """(B, H, P, K), and so are text_key and text_value."""
    text_key: Tensor
    text_value: Tensor
    query: Tensor
    """(B, H, G, G, K); the last position, which is not there, is zeros."""
    key: Tensor
    """(B, H, G, W * G, K), and so is value."""
    value: Tensor
    text_weights: Tensor
    """Of the text on itself, (B, H, P, P)."""
    on_text: Tensor
    """Of the codes on the text, (B, H, N, P)."""
    on_window: Tensor
    """(B, H, G, G, W * G)"""
    weights: Tensor
    """Both side by side, (B, H, G, G, P + W * G)."""


class LocalAttention:
    """`local_attention` of a pattern: qkv (B, L, 3 * H * K) -> (B, L, H * K)."""

    def __init__(self, bias: Tensor, pattern: str, heads: int) -> None:
        """bias: see `window_bias`."""
        self.bias, self.pattern, self.heads = bias, pattern, heads
        self.grid = bias.shape[0]
        self.rows = bias.shape[2] // self.grid

    def _split(self, x: Tensor, parts: int) -> Tuple[Tensor, int]:
        """(B, L, parts * H * K) -> a view (parts, B, H, L, K) and P."""
        x = x.unflatten(2, (parts, self.heads, -1))
        return x.permute(2, 0, 3, 1, 4), x.shape[1] - self.grid**2 + 1

    def _on_grid(self, codes: Tensor) -> Tensor:
        """`on_grid` in one copy, (..., N - 1, K) -> (..., G, G, K)."""
        grid = self.grid
        result = codes.new_empty(*codes.shape[:-2], grid, grid, codes.shape[-1])
        by_row = result.transpose(-3, -2) if self.pattern == "axial_col" else result
        whole = grid * (grid - 1)
        by_row[..., :-1, :, :] = codes[..., :whole, :].unflatten(-2, (grid - 1, grid))
        by_row[..., -1, :-1, :] = codes[..., whole:, :]
        by_row[..., -1, -1, :] = 0
        return result

    def _off_grid(self, codes: Tensor, result: Tensor) -> None:
        """The way back, into the image positions of `result` (B, H, L, K)."""
        grid, text_len = self.grid, result.shape[2] - self.grid**2 + 1
        by_row = codes.transpose(2, 3) if self.pattern == "axial_col" else codes
        whole = text_len + grid * (grid - 1)
        result[:, :, text_len:whole].unflatten(2, (grid - 1, grid)).copy_(by_row[:, :, :-1])
        result[:, :, whole:] = by_row[:, :, -1, :-1]

    def _parts(self, qkv: Tensor) -> _Parts:
        heads, text_len = self._split(qkv, 3)
        text_query, text_key, text_value = heads[:, :, :, :text_len].contiguous().unbind(0)
        query, key, value = self._on_grid(heads[:, :, :, text_len:]).unbind(0)
        factor = query.shape[-1] ** -0.5
        text_query, query = text_query.mul_(factor), query.mul_(factor)
        key, value = windows(key, self.rows), windows(value, self.rows)
        later = torch.full((text_len, text_len), float("-inf"), dtype=qkv.dtype, device=qkv.device).triu(1)
        text_weights = torch.softmax(torch.matmul(text_query, text_key.transpose(-1, -2)).add_(later), dim=-1)
        weights = window_weights(query, key, text_key, self.bias)
        on_text, on_window = weights[..., :text_len].flatten(2, 3), weights[..., text_len:]
        return _Parts(
            text_query, text_key, text_value, query, key, value, text_weights, on_text, on_window, weights
        )

    def _attend(self, parts: _Parts, result: Tensor) -> None:
        """Write what all positions attend to into `result` (B, H, L, K)."""
        result[:, :, : parts.text_query.shape[2]] = torch.matmul(parts.text_weights, parts.text_value)
        image = torch.matmul(parts.on_window, parts.value)
        image += torch.matmul(parts.on_text, parts.text_value).view_as(image)
        self._off_grid(image, result)

    def __call__(self, x: Tensor) -> Tensor:
        result = x.new_empty(*x.shape[:2], x.shape[2] // 3)  # before what is freed again
        with torch.autocast(x.device.type, enabled=False):  # x has the type that products have
            self._attend(self._parts(x), self._split(result, 1)[0][0])
        return result

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        parts = self._parts(x)
        factor = parts.query.shape[-1] ** -0.5
        (for_query, for_key, for_value), text_len = self._split(for_x, 3)
        gradient = self._split(incoming, 1)[0][0]  # (B, H, L, K)

        # Text positions among themselves.
        on_text = gradient[:, :, :text_len].contiguous()
        for_text_value = torch.matmul(parts.text_weights.transpose(-1, -2), on_text)
        on_text = torch.matmul(on_text, parts.text_value.transpose(-1, -2))
        scores = _softmax_gradient(on_text, parts.text_weights)
        for_query[:, :, :text_len] = torch.matmul(scores, parts.text_key).mul_(factor)
        for_text_key = torch.matmul(scores.transpose(-1, -2), parts.text_query)

        # Image positions: what they see of the text, and of their window.
        on_grid = self._on_grid(gradient[:, :, text_len:])
        codes = on_grid.flatten(2, 3)  # (B, H, N, K)
        for_text_value += torch.matmul(parts.on_text.transpose(-1, -2), codes)
        self._off_grid(from_windows(torch.matmul(parts.on_window.transpose(-1, -2), on_grid), self.rows), for_value)
        on_text = torch.matmul(codes, parts.text_value.transpose(-1, -2)).unflatten(2, on_grid.shape[2:4])
        on_window = torch.matmul(on_grid, parts.value.transpose(-1, -2))
        scores = _softmax_gradient(torch.cat([on_text, on_window], dim=-1), parts.weights)
        text_scores, window_scores = scores[..., :text_len].flatten(2, 3), scores[..., text_len:]
        for_codes = torch.matmul(window_scores, parts.key)
        for_codes += torch.matmul(text_scores, parts.text_key).view_as(for_codes)
        self._off_grid(for_codes.mul_(factor), for_query)
        for_text_key += torch.matmul(text_scores.transpose(-1, -2), parts.query.flatten(2, 3))
        self._off_grid(from_windows(torch.matmul(window_scores.transpose(-1, -2), parts.query), self.rows), for_key)
        for_key[:, :, :text_len], for_value[:, :, :text_len] = for_text_key, for_text_value

        self._attend(parts, gradient)  # in the place of what came in
        return incoming


class KernelAttention:
    """Attention of the patterns full, axial_row and axial_col by a kernel: qkv (B, L, 3 * H * K) -> (B, L, H * K)."""

    @staticmethod
    def suits(qkv: Tensor, pattern: str) -> bool:
        """Whether there is a kernel for it."""
        return pattern in ("full", "axial_row", "axial_col") and usable(qkv) and attention_kernel.available()

    def __init__(self, pattern: str, heads: int, grid: int) -> None:
        self.pattern = attention_kernel.Pattern(heads, 0 if pattern == "full" else grid, pattern == "axial_col")

    def __call__(self, x: Tensor) -> Tensor:
        return attention_kernel.forward(x, self.pattern)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        attention_kernel.backward(x, self.pattern, incoming, for_x)
        return incoming


def _softmax_gradient(for_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient for the scores of softmax(scores) = weights."""
    return torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)


class _AddLinear(torch.autograd.Function):
    """residual + scale * Linear(before(x)), of which only x is kept.

    The gradient for `scale` does not need the branch: sum_r g[r, c] (W a[r] + b)[c] is the sum over k of W[c, k] times
    (g.T a)[c, k], a product that the gradient for W needs anyway, plus b[c] times the sum of g.
    """

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Optional[Tensor],
        scale: Optional[Tensor],
        before: Function,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.before = before
        if _autocasts(x):
            branch = F.linear(before(x), weight, bias)
            return residual + branch if scale is None else torch.addcmul(residual, branch, scale)
        result = torch.empty_like(residual)
        if kernels.suits(residual, result, weight, bias, scale):
            return kernels.add_branch(residual, scale, bias, _linear_into(result, before(x), weight, None))
        _linear_into(result, before(x), weight, bias)
        return result.add_(residual) if scale is None else torch.addcmul(residual, result, scale, out=result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight, bias, scale = ctx.saved_tensors
        own = gradient.to(x.dtype)
        for_weight = _weight_gradient(own, weight)
        scaled = own if scale is None else (gradient * scale).to(x.dtype)
        for_x = torch.empty_like(x)
        active = ctx.before.again(x, scaled @ weight.to(x.dtype), for_x)
        for_weight = torch.mm(_rows(own).t(), _rows(active), out=for_weight).to(weight.dtype)
        for_bias = None if bias is None else _rows(gradient).sum(dim=0).to(bias.dtype)
        for_scale = None
        if scale is not None:
            factor = scale.flatten()
            for_scale = _sum_and_scale(for_weight, weight, factor)
            if for_bias is not None:
                for_scale = for_scale + for_bias * bias
                for_bias = for_bias * factor
            for_scale = for_scale.view_as(scale)
        return gradient, for_x, for_weight, for_bias, for_scale, None


def _sum_and_scale(for_weight: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """The sums (D) over rows of for_weight * weight (D, C); then scale the rows of for_weight."""
    if kernels.suits(for_weight, weight, factor):
        return kernels.sum_products_and_scale(for_weight, weight, factor)
    sums = (for_weight * weight).sum(dim=1)
    for_weight.mul_(factor[:, None])
    return sums


def add_linear(
    residual: Tensor, x: Tensor, linear: nn.Linear, scale: Optional[Tensor], before: Function = IDENTITY
) -> Tensor:
    """residual + scale * linear(before(x)), scale (1, 1, D) or None for 1. residual (B, L, D), x (B, L, anything)."""
    return _AddLinear.apply(residual, x, linear.weight, linear.bias, scale, before)
