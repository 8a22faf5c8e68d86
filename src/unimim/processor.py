"""On a CPU a step waits for memory and multiplications: here it keeps less for its backward pass, and oneDNN multiplies."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

WIDE = 2**18
"""Weights of a linear layer from which on it pays: a narrower one is slower by oneDNN, and so is making its input again."""
PIECE = 2**19
"""Numbers of an attention map on which the backward pass of an attention works at a time, so that they stay in a cache."""


def sparing(task: pl.LightningModule) -> AbstractContextManager[Any]:
    """Within it a training step of the task takes less memory and time on a CPU; on another device nothing is different.

    No module is touched: layers of timm or of a user, and hooks between them, run as they are written, and some of what torch
    computes for them in float32 is computed otherwise, with the same gradients. Values differ in the last digits.

    - A wide linear layer is multiplied by oneDNN. It does not keep an input that is cheap to make again: a layer norm's, a
      GELU's or the attention's below.
    - A layer scale behind a linear layer does not keep what it scales.
    - Attention with a bias that learns is the fused kernel, which torch has for one that does not.

    A graph made within it cannot be differentiated twice. A task with compiled modules, or modules that compute their
    activations again, goes without.
    """
    used = task.device.type == "cpu" and torch.backends.mkldnn.is_available() and not any(map(differs, task.modules()))
    return Sparing() if used else nullcontext()


def differs(module: Any) -> bool:
    """Whether a module's forward pass is compiled, or made again (timm's `grad_checkpointing`, our `checkpointing`)."""
    again = getattr(module, "grad_checkpointing", False) or getattr(module, "checkpointing", False)
    return again or module._compiled_call_impl is not None


class Sparing(TorchFunctionMode):
    """What `sparing` says."""

    def __init__(self) -> None:
        super().__init__()
        self.latest: tuple[Tensor, int, Callable[[Tensor, Tensor], Tensor]] | None = None
        """What the last linear layer made, its version, and what makes (scale, that) a scaled layer of it."""
        self.replaced: dict[Any, Callable[..., Tensor | None]] = {
            F.layer_norm: layer_norm,
            F.gelu: gelu,
            F.linear: self.linear,
            F.scaled_dot_product_attention: attention,
            Tensor.mul: self.mul,
        }

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        replaced = self.replaced.get(function)
        result = replaced(*args, **kwargs) if replaced is not None else None
        if result is None:
            result = function(*args, **kwargs)
            if function in (Tensor.transpose, Tensor.reshape) and (made := how(args[0])):
                remember(result, viewed(function, made.by, args[1:], kwargs), made.of)
        return result

    def __exit__(self, *args: Any) -> None:
        self.latest = None
        super().__exit__(*args)

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """[... c], [d c], [d] -> [... d]"""
        self.latest = None
        if not is_plain(input, weight, bias) or weight.numel() < WIDE or input.ndim < 2 or not input.numel():
            return None
        if not learns(input, weight, bias):
            return multiplied(input, weight, bias)
        made = how(input)
        by, of = (made.by, made.of) if made is not None else (None, ())

        def layer(scale: Tensor | None = None, result: Tensor | None = None) -> Tensor:
            made_again: Tensor = Linear.apply(by, scale, result, input, weight, bias, *of)
            return made_again

        result = layer()
        self.latest = result, result._version, layer
        return result

    def mul(self, left: Any, right: Any) -> Tensor | None:
        """A layer scale, [d], of what the last linear layer made, [... d], in either order."""
        if self.latest is None:
            return None
        values, version, layer = self.latest
        scale = left if right is values else right
        if (values is not left and values is not right) or not isinstance(scale, nn.Parameter):
            return None
        unseen = values._version == version and not values._backward_hooks and not values.retains_grad
        if not unseen or scale.shape != values.shape[-1:] or not is_plain(scale):
            return None
        self.latest = None
        return layer(scale, values.detach())


class Made(NamedTuple):
    """How a tensor was made: `by(*of)` makes it again; `version` tells whether it was changed in place since."""

    by: Callable[..., Tensor]
    of: tuple[Tensor, ...]
    version: int


def how(tensor: Tensor) -> Made | None:
    """How the tensor was made, where that is cheap and still true."""
    made: Made | None = vars(tensor).get("made")
    return made if made is not None and made.version == tensor._version else None


def remember(tensor: Tensor, by: Callable[..., Tensor], of: tuple[Tensor, ...]) -> None:
    """For `how`, where a gradient is wanted."""
    if tensor.requires_grad:
        vars(tensor)["made"] = Made(by, of, tensor._version)


def viewed(view: Any, by: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Tensor]:
    """What makes a view of what `by` makes; it holds on to no tensor."""
    return lambda *of: view(by(*of), *args, **kwargs)


def is_plain(*tensors: Any) -> bool:
    """Whether all are float32 on a CPU and no subclasses, outside of autocast; None is."""
    types = (Tensor, nn.Parameter, type(None))
    fitting = all(type(t) in types and (t is None or (t.dtype == torch.float32 and t.device.type == "cpu")) for t in tensors)
    return fitting and not torch.is_autocast_enabled("cpu")


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient has to reach one of them."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def layer_norm(
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """torch's, and how it was made."""

    def again(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    result = F.layer_norm(input, normalized_shape, weight, bias, eps)
    if weight is not None and bias is not None:
        remember(result, again, (input, weight, bias))
    return result


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """torch's, and how it was made."""

    def again(input: Tensor) -> Tensor:
        return F.gelu(input, approximate=approximate)

    result = again(input)
    remember(result, again, (input,))
    return result


def multiplied(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[... c], [d c], [d] -> [... d], by oneDNN, which also on processors of others takes the weights as they lie."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


class Linear(torch.autograd.Function):
    """`scale * (input @ weight.T + bias)`, of which it keeps what the input is made of."""

    @staticmethod
    def forward(
        ctx: Any,
        by: Callable[..., Tensor] | None,
        scale: Tensor | None,
        result: Tensor | None,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *of: Tensor,
    ) -> Tensor:
        """
        Args:
            by: what makes the input of `of`; None: the input is kept.
            scale: [d]
            result: of the multiplication, where it is there already.
            input: [... c]
            weight: [d c]
            bias: [d]
            of: see `by`.
        """
        ctx.by, ctx.wants_weight = by, weight.requires_grad or scale is not None
        ctx.save_for_backward(scale, weight, bias, *((of if by else (input,)) if ctx.wants_weight else ()))
        if result is None:
            result = multiplied(input, weight, bias)
        return result if scale is None else result * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """[... d] -> as the arguments of `forward`"""
        scale, weight, bias, *of = ctx.saved_tensors
        _, wants_scale, _, wants_input, wants_weight, wants_bias, *rest = ctx.needs_input_grad
        of_scale = of_input = of_weight = of_bias = None
        whole, gradient = gradient.shape[:-1], gradient.flatten(0, -2)
        before = gradient  # the scale
        if scale is not None:
            gradient = gradient * scale
        if wants_input:
            of_input = (gradient @ weight).unflatten(0, whole)
        if ctx.wants_weight:
            input = (ctx.by(*of) if ctx.by else of[0]).flatten(0, -2)
            product = before.t() @ input
            if wants_scale:  # of sum(before * (input @ weight.T + bias)) over the rows, without that product
                of_scale = (product * weight).sum(1)
                if bias is not None:
                    of_scale += bias * before.sum(0)
            if wants_weight:
                of_weight = product if scale is None else product.mul_(scale[:, None])
        if wants_bias:
            of_bias = gradient.sum(0)
        return None, of_scale, None, of_input, of_weight, of_bias, *[None for _ in rest]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """[b heads n d], [b heads k d], [b heads k d] and a bias [(1) heads n k] -> [b heads n d]"""
    if attn_mask is None or not learns(attn_mask) or dropout_p or is_causal or enable_gqa:
        return None
    bias = attn_mask if attn_mask.ndim == 4 else attn_mask[None]
    fits = bias.shape == (1, *query.shape[1:3], key.shape[2]) and key.shape == value.shape
    if not fits or not is_plain(query, key, value, bias):
        return None
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    result: Tensor = BiasedAttention.apply(query, key, value, bias, scale)
    remember(result, partial(attended, scale=scale), (query, key, value, bias))
    return result


def pieces(images: int, bias: Tensor) -> Iterator[slice]:
    """Of a batch, a few images each."""
    size = max(1, PIECE // bias.numel())
    return (slice(first, first + size) for first in range(0, images, size))


def attended(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
    """As `attention`, by torch's fused kernel; it lies in memory as it is used next, [b n heads d]."""
    result = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    for piece in pieces(len(query), bias):
        result[piece] = F.scaled_dot_product_attention(query[piece], key[piece], value[piece], bias, scale=scale)
    return result


class BiasedAttention(torch.autograd.Function):
    """Scaled dot-product attention with a bias that learns, of which neither maps nor result are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        """[b heads n d], [b heads k d], [b heads k d], [1 heads n k] -> [b heads n d]"""
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, bias)
        return attended(query, key, value, bias, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """[b heads n d] -> as the arguments of `forward`"""
        query, key, value, bias = ctx.saved_tensors
        of_query, of_key, of_value = (torch.empty_like(tensor) for tensor in (query, key, value))
        of_bias = torch.zeros_like(bias)
        for piece in pieces(len(query), bias):
            q, k, g = query[piece] * ctx.scale, key[piece], gradient[piece]
            weights = (q @ k.mT).add_(bias).softmax(-1)
            of_value[piece] = weights.mT @ g
            scores = g @ value[piece].mT
            scores = scores.sub_((scores * weights).sum(-1, keepdim=True)).mul_(weights)
            of_bias += scores.sum(0)
            of_query[piece] = (scores @ k).mul_(ctx.scale)
            of_key[piece] = scores.mT @ q
        return of_query, of_key, of_value, of_bias, None
