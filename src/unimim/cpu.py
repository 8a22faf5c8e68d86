"""A precision plugin for CPUs: steps in float32 keep less for their backward pass, and multiply faster."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import Precision
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

WIDE = 2**18
"""Weights of a linear layer from which on it pays: a narrower one is slower by oneDNN, and so is making its input again."""
WIDE_BY_ONEDNN = 2**14
"""The same where oneDNN multiplies all."""
PIECE = 2**19
"""Numbers of an attention map on which the backward pass of an attention works at a time, so that they stay in a cache."""


class CPUPrecision(Precision):
    """Lets every step of a training, validation, test and prediction in float32 take less memory and time on a CPU.

    Lightning enters its contexts around every step, so a subclass's own `training_step` is faster too. The command line takes
    it on a CPU where no other precision is given; in Python it is `Trainer(plugins=[CPUPrecision()])`. What it computes
    otherwise, and for which modules it does nothing, is said in `faster_on_cpu`.
    """

    module: nn.Module | None = None

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> tuple[nn.Module, Any, Any]:
        """Takes the model whose steps these are."""
        self.module = model
        return model, optimizers, lr_schedulers

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with nullcontext() if self.module is None else faster_on_cpu(self.module):
            yield


def choose_cpu_precision(trainer: pl.Trainer) -> None:
    """Gives a Trainer that computes on a CPU in float32 `CPUPrecision`; any other precision, or plugin for it, stays."""
    strategy = trainer.strategy
    if strategy.root_device.type == "cpu" and type(strategy.precision_plugin) is Precision:
        strategy.precision_plugin = CPUPrecision()


def faster_on_cpu(module: nn.Module) -> AbstractContextManager[Any]:
    """Within it what the module computes takes less memory and time on a CPU; elsewhere nothing is different.

    No module is touched: layers of timm or of a user, and hooks between them, run as they are written, and some of what torch
    computes for them in float32 is computed otherwise, with the same gradients. Values differ in the last digits.

    - A wide linear layer is multiplied by oneDNN or by MKL, whichever is quicker on the processor. It does not keep an input
      that is cheap to make again: a layer norm's or a GELU's.
    - A layer scale behind a linear layer does not keep what it scales. (Who asks for the gradient of that, once it is scaled,
      finds that nothing came of it.)
    - Attention with a bias that learns is the fused kernel, which torch has for one that does not.

    What is made within it is differentiated once, backwards: twice, forwards or by `torch.func` is an error. Without a gradient
    only the multiplications are others. A module goes without if its parameters are not on a CPU, or if parts of it are
    compiled, sharded by FSDP2, or compute their activations again.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return FasterOnCPU() if on_cpu and has_onednn and not any(map(differs, module.modules())) else nullcontext()


def differs(module: Any) -> bool:
    """Whether a module is compiled, sharded, or computes again (timm's `grad_checkpointing`, our `checkpointing`)."""
    again = getattr(module, "grad_checkpointing", False) or getattr(module, "checkpointing", False)
    compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    return again or compiled or isinstance(module, FSDPModule)


class Made(NamedTuple):
    """How a tensor was made: `by(*of)` makes it again; `version` tells whether it was changed in place since."""

    by: Callable[..., Tensor]
    of: tuple[Tensor, ...]
    version: int


class Layer(NamedTuple):
    """What a linear layer gave and was given, the versions of these, and the layer with a scale, `scaled(scale, result)`."""

    result: Tensor
    given: tuple[Tensor, ...]
    versions: list[int]
    scaled: Callable[[Tensor, Tensor], Tensor]

    def is_untouched(self) -> bool:
        """Whether nothing was changed in place since, and no one waits for the result's gradient."""
        same = self.versions == [tensor._version for tensor in (self.result, *self.given)]
        return same and not self.result._backward_hooks and not self.result.retains_grad


class FasterOnCPU(TorchFunctionMode):
    """Computes as `faster_on_cpu` says."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Any = WeakTensorKeyDictionary()
        self.latest: Layer | None = None
        """The last linear layer, until there is another: a layer scale may follow."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # a frozen network's blocks may be compiled without the task's
            return function(*args, **kwargs)
        replaced = REPLACED.get(function)
        result = replaced(self, *args, **kwargs) if replaced is not None and not computes_again() else None
        if result is None:
            result = function(*args, **kwargs)
        return result

    def __exit__(self, *args: Any) -> None:
        self.made.clear()
        self.latest = None
        super().__exit__(*args)

    def remember(self, tensor: Tensor, by: Callable[..., Tensor], of: tuple[Tensor, ...]) -> None:
        """For `how`, where a gradient is wanted."""
        if tensor.requires_grad:
            self.made[tensor] = Made(by, of, tensor._version)

    def how(self, tensor: Tensor) -> Made | None:
        """How the tensor was made, where that is cheap and still true."""
        made: Made | None = self.made.get(tensor)
        return made if made is not None and made.version == tensor._version else None

    def layer_norm(
        self,
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
            self.remember(result, again, (input, weight, bias))
        return result

    def gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        """torch's, and how it was made."""
        again = partial(F.gelu, approximate=approximate)
        result = again(input)
        self.remember(result, again, (input,))
        return result

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """[... c], [d c], [d] -> [... d]"""
        self.latest = None
        wide = WIDE_BY_ONEDNN if by_onednn(gradient=True) else WIDE
        if not is_plain(input, weight, bias) or weight.numel() < wide or input.ndim < 2 or not input.numel():
            return None
        if weight.ndim != 2 or (bias is not None and bias.shape != weight.shape[:1]):
            return None
        if not learns(input, weight, bias):
            return multiplied(input, weight, bias)
        made = self.how(input)
        by, of = (made.by, made.of) if made is not None else (None, ())

        def layer(scale: Tensor | None = None, result: Tensor | None = None) -> Tensor:
            made: Tensor = Linear.apply(by, scale, result, input, weight, bias, *of)
            return made

        result, given = layer(), (input, weight, *of)
        if weight.requires_grad:
            self.latest = Layer(result, given, [tensor._version for tensor in (result, *given)], layer)
        return result

    def mul(self, input: Any, other: Any) -> Tensor | None:
        """A layer scale, [d], of what the last linear layer gave, [... d], in either order."""
        latest = self.latest
        if latest is None or (input is not latest.result and other is not latest.result):
            return None
        scale = input if other is latest.result else other
        fits = isinstance(scale, nn.Parameter) and is_plain(scale) and scale.shape == latest.result.shape[-1:]
        if not fits or not torch.is_grad_enabled() or not latest.is_untouched():
            return None
        self.latest = None
        return latest.scaled(scale, latest.result.detach())

    def attention(
        self,
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
        if not is_plain(query, key, value, bias) or query.ndim != 4 or key.ndim != 4 or not bias.numel():
            return None
        fits = bias.shape == (1, *query.shape[1:3], key.shape[2])
        fits = fits and key.shape == value.shape == (*query.shape[:2], key.shape[2], query.shape[3])
        if not fits or not bias.isfinite().all():  # where it hides keys, torch knows what becomes of who sees none
            return None
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        result: Tensor = BiasedAttention.apply(query, key, value, bias, scale)
        return result


REPLACED: dict[Any, Callable[..., Tensor | None]] = {
    F.layer_norm: FasterOnCPU.layer_norm,
    F.gelu: FasterOnCPU.gelu,
    F.linear: FasterOnCPU.linear,
    F.scaled_dot_product_attention: FasterOnCPU.attention,
    Tensor.mul: FasterOnCPU.mul,
}


def computes_again() -> bool:
    """Whether what runs is within `torch.utils.checkpoint`, which wants the same tensors kept when it runs again."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def is_plain(*tensors: Any) -> bool:
    """Whether all are float32 on a CPU and no subclasses, outside of autocast; None is."""
    types = (Tensor, nn.Parameter, type(None))
    fitting = all(type(t) in types and (t is None or (t.dtype == torch.float32 and t.device.type == "cpu")) for t in tensors)
    return fitting and not torch.is_autocast_enabled("cpu")


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient has to reach one of them."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def is_intel() -> bool:
    """Whether Linux says that the processor is Intel's."""
    said = Path("/proc/cpuinfo")
    return said.exists() and "GenuineIntel" in said.read_text()


def by_onednn(gradient: bool) -> bool:
    """Which library is the quicker one, for a layer's result or for its gradients: oneDNN, else torch's own, MKL on x86.

    As measured with two threads: on a Xeon with AVX-512 MKL was 5 to 10 % quicker in results (gradients were not tried); on an
    EPYC with AVX-512, of which MKL makes no use on AMD's processors, oneDNN was twice as quick in both; on an EPYC with AVX2 it
    was 10 to 35 % quicker in results, and slower in gradients.
    """
    return not is_intel() and (not gradient or torch.backends.cpu.get_cpu_capability() == "AVX512")


def multiplied(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, gradient: bool = False) -> Tensor:
    """[... c], [d c], [d] -> [... d]; `gradient`: see `by_onednn`."""
    if not by_onednn(gradient):
        return F.linear(input, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def over_rows(gradient: Tensor, input: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    """Of a layer's result, [n d], with its input, [n c] -> gradients of weight, [d c], and, if it `sums`, of bias, [d]"""
    if not by_onednn(gradient=True):
        return gradient.t() @ input, gradient.sum(0) if sums else None
    # quicker than `multiplied`, where torch copies the gradient transposed; of the third tensor only the type is looked at
    operands = gradient.to_mkldnn(), input.to_mkldnn(), input
    product, total = torch.ops.aten.mkldnn_linear_backward_weights(*operands, sums)
    return product, total if sums else None


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
        ctx.by = by
        ctx.wants_product = weight.requires_grad or (scale is not None and scale.requires_grad)
        ctx.save_for_backward(
            scale,
            weight if input.requires_grad or scale is not None else None,
            None if scale is None else bias,
            *((of if by else (input,)) if ctx.wants_product else ()),
        )
        if result is None:
            result = multiplied(input, weight, bias)
        return (result if scale is None else result * scale).data  # no view, which could not be changed in place

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """[... d] -> as the arguments of `forward`"""
        scale, weight, bias, *of = ctx.saved_tensors
        _, wants_scale, _, wants_input, wants_weight, wants_bias, *rest = ctx.needs_input_grad
        of_scale = of_input = of_weight = of_bias = None
        whole, gradient = gradient.shape[:-1], gradient.flatten(0, -2)
        sums = wants_bias or (wants_scale and bias is not None)
        if ctx.wants_product:
            product, total = over_rows(gradient, (ctx.by(*of) if ctx.by else of[0]).flatten(0, -2), sums)
            if wants_scale:  # of sum(gradient * (input @ weight.T + bias)) over the rows, without that product
                of_scale = (product * weight).sum(1)
                if bias is not None:
                    of_scale += bias * total
            if wants_weight:
                of_weight = product if scale is None else product.mul_(scale[:, None])
        else:
            total = gradient.sum(0) if sums else None
        if wants_bias:
            of_bias = total if scale is None else total * scale
        if wants_input:  # the last, when the input that was made again is gone
            scaled = gradient if scale is None else gradient * scale
            of_input = multiplied(scaled, weight.t(), gradient=True).unflatten(0, whole)
        return None, of_scale, None, of_input, of_weight, of_bias, *[None for _ in rest]


def pieces(images: int, bias: Tensor) -> Iterator[slice]:
    """Of a batch, a few images each."""
    size = max(1, PIECE // bias.numel())
    return (slice(first, first + size) for first in range(0, images, size))


class BiasedAttention(torch.autograd.Function):
    """Scaled dot-product attention with a bias that learns, of which no maps are kept."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Tensor:
        """[b heads n d], [b heads k d], [b heads k d], [1 heads n k] -> [b heads n d]"""
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, bias)
        # torch takes its fused kernel only for a bias that asks for no gradient
        result = F.scaled_dot_product_attention(query, key, value, bias.detach(), scale=scale)
        return result.data  # no view, which could not be changed in place

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
            scores = torch._softmax_backward_data(g @ value[piece].mT, weights, -1, weights.dtype)
            of_bias += scores.sum(0)
            of_query[piece] = (scores @ k).mul_(ctx.scale)
            of_key[piece] = scores.mT @ q
        return of_query, of_key, of_value, of_bias, None
