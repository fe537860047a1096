"""Linear layers fused with the ops around them, saving less for the backward pass than autograd does.

Autograd saves the input of every operation. Here what is cheap is recomputed: normalised inputs from the residual
stream, activations from their inputs, attention weights of sparse patterns from queries and keys. The output of a
scaled branch is not needed at all. L16 saves 55 % of what it would otherwise, at the same speed.

The fused versions are plain PyTorch with native kernels where they apply. The references, a line or two each, run
without gradients, under `ops.use("reference")` (IPUs do not support custom autograd functions), and for what the fused
ones do not support: a norm after a branch, dropout without kernels.

Letters: B batch, L positions, D width of a layer's input, C of its output.
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple, Optional, Protocol, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ops import dispatch, elementwise
from ops.dispatch import autocasts
from ops.elementwise import NO_DROPOUT, Dropout
from ops.matmul import available, matmul
from ops.matmul import suits as matmul_suits

Gradients = Tuple[Optional[Tensor], ...]


class Matrix(NamedTuple):
    """A linear layer: x @ weight.T + bias."""

    weight: Tensor
    """(C, D)"""
    bias: Tensor | None
    """(C,)"""


class Norm(NamedTuple):
    """A norm over the last dimension: LayerNorm, or RMSNorm without a shift."""

    scale: Tensor
    """(D,)"""
    shift: Tensor | None
    """(D,); None: RMSNorm."""
    eps: float


Projection = Union[Matrix, Callable[[Tensor], Tensor]]
"""A linear layer, or a function in place of one, such as a layer with int8 weights."""


Between = Callable[[Tensor], Tensor]
"""A function between a norm and a linear layer, (B, L, D) -> (B, L, D): a token shift."""


def fuses() -> bool:
    """Whether the custom autograd functions run: with gradients, unless the reference is selected or PyTorch traces or
    compiles. A compiler decides by itself what is recomputed, and each of them would break its graph."""
    return torch.is_grad_enabled() and not (dispatch.uses_reference() or torch.jit.is_tracing() or dispatch.compiling())


# ---- one linear layer


def linear(x: Tensor, project: Projection) -> Tensor:
    """x @ weight.T + bias, (B, L, D) -> (B, L, C)."""
    if not isinstance(project, Matrix):
        return project(x)
    if torch.is_grad_enabled() and available(x, project.weight) and not autocasts(x):
        rows = _rows(x)
        if matmul_suits(rows, project.weight.t()):
            return _Linear.apply(rows, project.weight, project.bias).view(*x.shape[:-1], -1)
    return F.linear(x, project.weight, project.bias)


class _Linear(torch.autograd.Function):
    """F.linear by the native matmul, of x (rows, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return matmul(x, weight.t(), bias=bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x, weight = ctx.saved_tensors
        grad_weight = matmul(grad_output.t(), x, out=_buffer_for(grad_output, weight))
        return matmul(grad_output, weight), grad_weight, grad_output.sum(dim=0) if ctx.has_bias else None


def _linear_into(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a buffer for the result, (..., C)."""
    matmul(_rows(x), weight.t(), result.view(-1, result.shape[-1]), bias)
    return result


def _grad_input(grad_output: Tensor, weight: Tensor) -> Tensor:
    """The gradient of F.linear's input, (..., C) @ (C, D)."""
    return matmul(_rows(grad_output), weight).view(*grad_output.shape[:-1], weight.shape[1])


def _buffer_for(grad_output: Tensor, weight: Tensor) -> Tensor:
    """A buffer for the gradient of a weight: allocated before short-lived tensors, to avoid memory fragmentation."""
    return torch.empty_like(weight, dtype=grad_output.dtype)


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


# ---- norm, then linear layer


def normalise(x: Tensor, norm: Norm) -> Tensor:
    """LayerNorm or RMSNorm over the last dimension, (..., D) -> (..., D)."""
    if norm.shift is not None:
        return torch.layer_norm(x, x.shape[-1:], *norm)
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # their squares would overflow or round
    return (wide * torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + norm.eps) * norm.scale).to(x.dtype)


def norm_linear(x: Tensor, norm: Norm, project: Projection, between: Between | None = None) -> Tensor:
    """linear(between(norm(x))). (B, L, D) -> (B, L, C)."""
    if isinstance(project, Matrix) and norm.shift is not None and between is None and fuses():
        return _NormLinear.apply(x, *norm, *project)
    normed = normalise(x, norm)
    return linear(normed if between is None else between(normed), project)


class _NormLinear(torch.autograd.Function):
    """linear(layer_norm(x)); only x is saved."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        result = None if autocasts(x) else x.new_empty(*x.shape[:-1], len(weight))  # see _buffer_for
        normed, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], scale, shift, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd, weight)
        ctx.eps, ctx.has_bias = eps, bias is not None
        return F.linear(normed, weight, bias) if result is None else _linear_into(result, normed, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x, scale, shift, mean, rstd, weight = ctx.saved_tensors
        grad_weight = _buffer_for(grad_output, weight)
        normed = torch.native_layer_norm(x, x.shape[-1:], scale, shift, ctx.eps)[0].to(grad_output.dtype)
        matmul(_rows(grad_output).t(), _rows(normed), out=grad_weight)
        del normed
        grad_normed = _grad_input(grad_output, weight.to(grad_output.dtype))
        grad_bias = _rows(grad_output).sum(dim=0).to(weight.dtype) if ctx.has_bias else None
        grad_x, grad_scale, grad_shift = torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(x.dtype), x, x.shape[-1:], mean, rstd, scale, shift, [True, True, True]
        )
        return grad_x, grad_scale, grad_shift, None, grad_weight.to(weight.dtype), grad_bias


# ---- functions before the last linear layer of a branch


class Function(Protocol):
    """A function before a linear layer that is cheap to recompute."""

    differentiable: bool
    """Whether autograd can differentiate a call; else `recompute` is its gradient."""
    number: int
    """An activation's number in csrc/rows.c; -1 for other functions."""

    def __call__(self, x: Tensor) -> Tensor:
        """Compute it."""

    def recompute(self, x: Tensor, grad_output: Tensor, grad_input: Tensor) -> Tensor:
        """Recompute it, and write the gradient of x to `grad_input`. `grad_output` may be overwritten."""


class Recompute:
    """A function made of PyTorch's operators, which autograd differentiates when it is recomputed."""

    def __init__(
        self, function: Callable[[Tensor], Tensor], number: int = -1, differentiable: bool = True
    ) -> None:
        """differentiable: False saves only its input for the backward pass, see `Function`."""
        self.function, self.number, self.differentiable = function, number, differentiable

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def recompute(self, x: Tensor, grad_output: Tensor, grad_input: Tensor) -> Tensor:
        with torch.enable_grad():
            own = x.detach().requires_grad_()
            result = self.function(own)
        grad_input.copy_(torch.autograd.grad(result, own, grad_output)[0])
        return result.detach()


def _geglu(x: Tensor) -> Tensor:
    """The first half of x, gated by gelu of the second."""
    x, gate = x.chunk(2, dim=-1)
    return x * F.gelu(gate)


def _swiglu(x: Tensor) -> Tensor:
    """The first half of x, gated by silu of the second."""
    x, gate = x.chunk(2, dim=-1)
    return x * F.silu(gate)


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


class _NativeGelu(NamedTuple):
    """The exact gelu of x + bias with dropout, by a kernel."""

    gated: bool
    dropout: Dropout = NO_DROPOUT

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return elementwise.gelu(x, self.gated, bias, self.dropout)

    def recompute(self, x: Tensor, grad_output: Tensor, grad_input: Tensor, bias: Tensor | None) -> Tensor | None:
        """As `Function.recompute`, but overwrite `grad_output` with the result, and return the gradient of `bias`."""
        return elementwise.gelu_backward(x, self.gated, grad_output, grad_input, bias, self.dropout)


IDENTITY: Function = Recompute(lambda x: x)
_ACTIVATIONS: dict[str, Function] = {
    "geglu": Recompute(_geglu, 0), "gelu": Recompute(F.gelu, 1), "quick_gelu": Recompute(_quick_gelu, 2),
    "swiglu": Recompute(_swiglu, 3), "relu2": Recompute(lambda x: F.relu(x).square(), 4),
}  # fmt: skip
_NATIVE_ACTIVATIONS = {"geglu": _NativeGelu(gated=True), "gelu": _NativeGelu(gated=False)}
"""These also add the bias of the linear layer before them, and apply dropout."""


def activation(name: str) -> Function:
    """Return the activation of this name; a gated one halves the last dimension. Raises ValueError if unknown."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


# ---- the end of a branch


def _dropout(probability: float) -> Dropout | None:
    """A dropout with a new seed from PyTorch's generator, or None for probability 0."""
    return Dropout(int(torch.randint(2**63 - 1, ())), probability) if probability else None


def add_linear(
    residual: Tensor,
    x: Tensor,
    project: Projection,
    scale: Tensor | None = None,
    before: Function = IDENTITY,
    inner_dropout: float = 0.0,
    outer_dropout: float = 0.0,
    after: Norm | None = None,
) -> Tensor:
    """residual + scale * after(drop(linear(drop(before(x))))), scale (1, 1, D) or None for 1.

    residual (B, L, D), x (B, L, any) -> (B, L, D). Dropout probabilities are 0 outside training.
    """
    drops = inner_dropout or outer_dropout
    if isinstance(project, Matrix) and after is None and (not drops or _drops_natively(x)) and fuses():
        inner, outer = _dropout(inner_dropout), _dropout(outer_dropout)
        return _AddLinear.apply(residual, x, *project, scale, before, None, inner, outer)
    differentiable = before.differentiable or not torch.is_grad_enabled()
    active = before(x) if differentiable else _Recomputed.apply(x, before)
    branch = _drop(linear(_drop(active, inner_dropout), project), outer_dropout)
    if branch.dtype != residual.dtype:
        branch = branch.to(residual.dtype)
    if after is not None:
        branch = normalise(branch, after)
    return residual + branch if scale is None else torch.addcmul(residual, branch, scale)


def add_feed_forward(  # noqa: PLR0913 - all parts of a branch
    x: Tensor,
    norm: Norm,
    up: Projection,
    name: str,
    down: Projection,
    scale: Tensor | None = None,
    dropout: float = 0.0,
    after: Norm | None = None,
    between: Between | None = None,
) -> Tensor:
    """x + scale * after(down(drop(activation(up(between(norm(x))))))), scale (1, 1, D) or None for 1.

    (B, L, D) -> (B, L, D). Equals `norm_linear` and `add_linear`; native activations add the bias of `up` and drop.
    """
    before = _NATIVE_ACTIVATIONS.get(name) if after is None and fuses() and not autocasts(x) else None
    if before and isinstance(up, Matrix) and isinstance(down, Matrix) and elementwise.suits(x, *up, *down, scale):
        hidden = norm_linear(x, norm, Matrix(up.weight, None), between)
        before = before._replace(dropout=_dropout(dropout) or NO_DROPOUT)
        return _AddLinear.apply(x, hidden, *down, scale, before, up.bias, None, None)
    hidden = norm_linear(x, norm, up, between)
    return add_linear(x, hidden, down, scale, activation(name), inner_dropout=dropout, after=after)


def _drops_natively(x: Tensor) -> bool:
    return elementwise.suits(x) and not autocasts(x)


def _drop(x: Tensor, probability: float) -> Tensor:
    return F.dropout(x, probability) if probability else x


class _Recomputed(torch.autograd.Function):
    """before(x), with the gradient from `before.recompute`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Function) -> Tensor:
        ctx.save_for_backward(x)
        ctx.before = before
        return before(x)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        (x,) = ctx.saved_tensors
        grad_input = torch.empty_like(x)
        ctx.before.recompute(x, grad_output.clone(memory_format=torch.contiguous_format), grad_input)
        return grad_input, None


class _AddLinear(torch.autograd.Function):
    """residual + scale * linear(before(x)); only x is saved.

    A native activation adds the bias `shift` to x. `inner` is the dropout on before(x), which must then be a new
    tensor; `outer` the one on the linear layer's output.

    The gradient of `scale` does not need the branch: sum_r g[r, c] (W a[r] + b)[c] is the sum over k of W[c, k] times
    (g.T a)[c, k], a matmul that the gradient of W needs anyway, plus b[c] times the sum of g.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 - autograd takes no keywords
        ctx: Any,
        residual: Tensor,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor | None,
        before: Function | _NativeGelu,
        shift: Tensor | None,
        inner: Dropout | None,
        outer: Dropout | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale, shift)
        ctx.before, ctx.inner, ctx.outer = before, inner, outer
        if not isinstance(before, _NativeGelu) and autocasts(x):
            branch = F.linear(before(x), weight, bias)
            return residual + branch if scale is None else torch.addcmul(residual, branch, scale)
        result = torch.empty_like(residual)
        active = before(x, shift) if isinstance(before, _NativeGelu) else before(x)
        if inner is not None:
            elementwise.drop(active, inner)
        if outer is not None:
            elementwise.drop(_linear_into(result, active, weight, bias), outer)
            return elementwise.add_branch(residual, scale, None, result)
        if elementwise.suits(residual, result, weight, bias, scale):
            return elementwise.add_branch(residual, scale, bias, _linear_into(result, active, weight, None))
        _linear_into(result, active, weight, bias)
        return result.add_(residual) if scale is None else torch.addcmul(residual, result, scale, out=result)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Gradients:
        x, weight, bias, scale, shift = ctx.saved_tensors
        residual, inner, outer = grad_output, ctx.inner, ctx.outer
        if outer is not None:
            grad_output = elementwise.drop(grad_output.clone(memory_format=torch.contiguous_format), outer)
        own = grad_output.to(x.dtype)
        grad_weight = _buffer_for(own, weight)
        scaled = own if scale is None else (grad_output * scale).to(x.dtype)
        grad_x = torch.empty_like(x)
        grad_active, grad_shift = _grad_input(scaled, weight.to(x.dtype)), None
        if inner is not None:
            elementwise.drop(grad_active, inner)
        if isinstance(ctx.before, _NativeGelu):
            active, grad_shift = grad_active, ctx.before.recompute(x, grad_active, grad_x, shift)
        else:
            active = ctx.before.recompute(x, grad_active, grad_x)
        if inner is not None:
            elementwise.drop(active, inner)
        grad_weight = matmul(_rows(own).t(), _rows(active), out=grad_weight).to(weight.dtype)
        grad_bias = None if bias is None else _rows(grad_output).sum(dim=0).to(bias.dtype)
        grad_scale = None
        if scale is not None:
            factor = scale.flatten()
            grad_scale = _sum_and_scale(grad_weight, weight, factor)
            if grad_bias is not None:
                grad_scale = grad_scale + grad_bias * bias
                grad_bias = grad_bias * factor
            grad_scale = grad_scale.view_as(scale)
        return residual, grad_x, grad_weight, grad_bias, grad_scale, None, grad_shift, None, None


def _sum_and_scale(grad_weight: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
    """Return the row sums (D) of grad_weight * weight (D, C), then scale the rows of grad_weight in place."""
    if elementwise.suits(grad_weight, weight, factor):
        return elementwise.row_dots_and_scale(grad_weight, weight, factor)
    sums = (grad_weight * weight).sum(dim=1)
    grad_weight.mul_(factor[:, None])
    return sums
