"""Products with gradients of their own, which keep less for the backward pass than autograd would.

Autograd keeps the input of every operation. What is cheap to compute is computed a second time here: normalised inputs
from the residual stream, gelu from its argument, attention weights of the sparse patterns from queries and keys. The
output of a scaled branch is not needed at all. L16 keeps 55 % of what it would otherwise, at the same speed.

Plain PyTorch; on a CPU in float32, where a compiler is, the kernels of models/kernels do the same faster. A
device that knows no autograd functions written in Python (IPU) takes the modules' own `forward` instead, which compute
the same.

Letters: B batch, L positions, D width of a layer's input, C of its output.
"""

from typing import Any, Dict, NamedTuple, Optional, Protocol, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import matrix
from models.kernels import training as kernels

Gradients = Tuple[Optional[Tensor], ...]


def _autocasts(x: Tensor) -> bool:
    """Whether products of x may be computed in another type than its own."""
    if hasattr(torch, "get_autocast_dtype"):  # from PyTorch 2.4 on there is one question for all devices
        return torch.is_autocast_enabled(x.device.type)
    return torch.is_autocast_enabled() if x.is_cuda else torch.is_autocast_cpu_enabled()


def _linear_into(result: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
    """F.linear with a place for the result, (..., C)."""
    matrix.product(_rows(x), weight.t(), result.view(-1, result.shape[-1]), bias)
    return result


def _input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """What F.linear's input gets, (..., C) @ (C, D)."""
    return matrix.product(_rows(gradient), weight).view(*gradient.shape[:-1], weight.shape[1])


def _weight_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """A place for the gradient of a weight: what stays is taken before what is needed for a moment only, or memory
    would be full of holes."""
    return torch.empty_like(weight, dtype=gradient.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


class _Linear(torch.autograd.Function):
    """F.linear by the products of matrix.py, of x (rows, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return matrix.product(x, weight.t(), bias=bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        for_weight = matrix.product(gradient.t(), x, out=_weight_gradient(gradient, weight))
        return matrix.product(gradient, weight), for_weight, gradient.sum(dim=0) if ctx.has_bias else None


def linear(x: Tensor, module: nn.Module) -> Tensor:
    """module(x), (B, L, D) -> (B, L, C); in training by the products of matrix.py if it is a plain nn.Linear."""
    if type(module) is not nn.Linear or not torch.is_grad_enabled():
        return module(x)
    if not matrix.available(x, module.weight) or _autocasts(x):
        return module(x)
    rows = _rows(x)
    if not matrix.suits(rows, module.weight.t()):
        return module(x)
    return _Linear.apply(rows, module.weight, module.bias).view(*x.shape[:-1], -1)


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
        matrix.product(_rows(gradient).t(), _rows(normed), out=for_weight)
        del normed
        for_normed = _input_gradient(gradient, weight.to(gradient.dtype))
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
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate).mul_(x)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        for_x, for_gate = for_x.chunk(2, dim=-1)
        active = F.gelu(gate)
        torch.mul(incoming, active, out=for_x)
        torch.ops.aten.gelu_backward.grad_input(incoming.mul_(x), gate, grad_input=for_gate)
        return active.mul_(x)


class _Gelu:
    def __call__(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        torch.ops.aten.gelu_backward.grad_input(incoming, x, grad_input=for_x)
        return F.gelu(x)


class _QuickGelu:
    def __call__(self, x: Tensor) -> Tensor:
        return torch.sigmoid(1.702 * x).mul_(x)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor) -> Tensor:
        gate = torch.sigmoid(1.702 * x)
        torch.mul(incoming.mul_(gate), 1 + 1.702 * x * (1 - gate), out=for_x)
        return gate.mul_(x)


class _KernelGelu:
    """gelu or geglu of x + bias by a kernel."""

    def __init__(self, gated: bool) -> None:
        self.gated = gated

    def __call__(self, x: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return kernels.gelu(x, self.gated, bias)

    def again(self, x: Tensor, incoming: Tensor, for_x: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        kernels.gelu_again(x, self.gated, incoming, for_x, bias)
        return incoming


ACTIVATIONS: Dict[str, Function] = {"geglu": _Geglu(), "gelu": _Gelu(), "quick_gelu": _QuickGelu()}
"""Of the feed-forward layer, by their names in a configuration."""
_KERNEL_ACTIVATIONS = {"geglu": _KernelGelu(gated=True), "gelu": _KernelGelu(gated=False)}
"""Those that take the bias of the product before them too."""
IDENTITY: Function = _Identity()


class Dropout(NamedTuple):
    """One dropout, by kernels only. The backward pass finds out by the seed which numbers were dropped."""

    seed: int
    probability: float

    @classmethod
    def of(cls, module: nn.Dropout) -> "Optional[Dropout]":
        """A new one, by PyTorch's random numbers, or None where the module drops nothing."""
        if not module.training or not module.p:
            return None
        return cls(int(torch.randint(2**63 - 1, ())), module.p)

    @staticmethod
    def suits(x: Tensor) -> bool:
        """Whether it can drop numbers of tensors like x."""
        return kernels.suits(x) and not _autocasts(x)

    def drop(self, x: Tensor) -> Tensor:
        """Drop some of x, in its place."""
        return kernels.drop(x, self.seed, self.probability)


class _AddLinear(torch.autograd.Function):
    """residual + scale * Linear(before(x)), of which only x is kept.

    `shift` is a bias for x, which `before` adds. `inner` drops some of what before(x) gives, which must be a tensor of
    its own then, `outer` some of what Linear gives.

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
        shift: Optional[Tensor],
        inner: Optional[Dropout],
        outer: Optional[Dropout],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.before, ctx.inner, ctx.outer = before, inner, outer
        if _autocasts(x):
            branch = F.linear(before(x), weight, bias)
            return residual + branch if scale is None else torch.addcmul(residual, branch, scale)
        result = torch.empty_like(residual)
        active = before(x) if shift is None else before(x, shift)
        if inner is not None:
            inner.drop(active)
        if outer is not None:
            outer.drop(_linear_into(result, active, weight, bias))
            return kernels.add_branch(residual, scale, None, result)
        if kernels.suits(residual, result, weight, bias, scale):
            return kernels.add_branch(residual, scale, bias, _linear_into(result, active, weight, None))
        _linear_into(result, active, weight, bias)
        return result.add_(residual) if scale is None else torch.addcmul(residual, result, scale, out=result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Gradients:
        x, weight, bias, scale, shift = ctx.saved_tensors
        residual, inner, outer = gradient, ctx.inner, ctx.outer
        if outer is not None:
            gradient = outer.drop(gradient.clone(memory_format=torch.contiguous_format))
        own = gradient.to(x.dtype)
        for_weight = _weight_gradient(own, weight)
        scaled = own if scale is None else (gradient * scale).to(x.dtype)
        for_x = torch.empty_like(x)
        shifts = () if shift is None else (shift,)
        incoming = _input_gradient(scaled, weight.to(x.dtype))
        if inner is not None:
            inner.drop(incoming)
        active = ctx.before.again(x, incoming, for_x, *shifts)
        if inner is not None:
            inner.drop(active)
        for_shift = None if shift is None else _rows(for_x).sum(dim=0)
        for_weight = matrix.product(_rows(own).t(), _rows(active), out=for_weight).to(weight.dtype)
        for_bias = None if bias is None else _rows(gradient).sum(dim=0).to(bias.dtype)
        for_scale = None
        if scale is not None:
            factor = scale.flatten()
            for_scale = _sum_and_scale(for_weight, weight, factor)
            if for_bias is not None:
                for_scale = for_scale + for_bias * bias
                for_bias = for_bias * factor
            for_scale = for_scale.view_as(scale)
        return residual, for_x, for_weight, for_bias, for_scale, None, for_shift, None, None


def _sum_and_scale(for_weight: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """The sums (D) over rows of for_weight * weight (D, C); then scale the rows of for_weight."""
    if kernels.suits(for_weight, weight, factor):
        return kernels.sum_products_and_scale(for_weight, weight, factor)
    sums = (for_weight * weight).sum(dim=1)
    for_weight.mul_(factor[:, None])
    return sums


def add_linear(
    residual: Tensor,
    x: Tensor,
    linear: nn.Linear,
    scale: Optional[Tensor],
    before: Function = IDENTITY,
    outer: Optional[Dropout] = None,
) -> Tensor:
    """residual + scale * outer(linear(before(x))), scale (1, 1, D) or None for 1.

    residual (B, L, D), x (B, L, anything) -> (B, L, D).
    """
    return _AddLinear.apply(residual, x, linear.weight, linear.bias, scale, before, None, None, outer)


def add_feed_forward(
    x: Tensor,
    norm: nn.LayerNorm,
    up: nn.Linear,
    activation: str,
    down: nn.Linear,
    scale: Optional[Tensor],
    inner: Optional[Dropout] = None,
) -> Tensor:
    """x + scale * down(inner(activation(up(norm(x))))), scale (1, 1, D) or None for 1. (B, L, D) -> (B, L, D)."""
    fits = kernels.suits(x, up.weight, up.bias, down.weight, down.bias, scale) and not _autocasts(x)
    before = _KERNEL_ACTIVATIONS.get(activation) if fits else None
    if before is None:
        hidden = norm_linear(x, norm, up)
        return _AddLinear.apply(x, hidden, down.weight, down.bias, scale, ACTIVATIONS[activation], None, inner, None)
    hidden = _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, up.weight, None)
    return _AddLinear.apply(x, hidden, down.weight, down.bias, scale, before, up.bias, inner, None)
