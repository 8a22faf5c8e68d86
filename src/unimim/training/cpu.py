"""Provides a precision plugin for CPUs: float32 steps keep less memory for the backward pass, and multiply faster."""

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
"""Least number of weights of a linear layer: with fewer, oneDNN is slower, and so is computing the input again."""
WIDE_BY_ONEDNN = 2**14
"""The same if oneDNN does all multiplications."""
PIECE = 2**19
"""Size of the part of an attention map that the backward pass handles at once, so that it fits into the CPU's cache."""


class CPUPrecision(Precision):
    """Lets every step of a training, validation, test and prediction in float32 take less memory and time on a CPU.

    Lightning enters its contexts around every step, so a subclass's own `training_step` is faster too. The command line uses
    it on a CPU if no other precision is given; in Python it is `Trainer(plugins=[CPUPrecision()])`. `faster_on_cpu` explains
    what it computes differently, and for which modules it does nothing.
    """

    module: nn.Module | None = None

    def connect(self, model: nn.Module, optimizers: Any, lr_schedulers: Any) -> tuple[nn.Module, Any, Any]:
        """Stores the model whose steps run."""
        self.module = model
        return model, optimizers, lr_schedulers

    @contextmanager
    def forward_context(self) -> Iterator[None]:
        with nullcontext() if self.module is None else faster_on_cpu(self.module):
            yield


def choose_cpu_precision(trainer: pl.Trainer) -> None:
    """Sets `CPUPrecision` in a Trainer that computes in float32 on a CPU; keeps any other precision or precision plugin."""
    strategy = trainer.strategy
    if strategy.root_device.type == "cpu" and type(strategy.precision_plugin) is Precision:
        strategy.precision_plugin = CPUPrecision()


def faster_on_cpu(module: nn.Module) -> AbstractContextManager[Any]:
    """Returns a context in which a module needs less memory and time on a CPU; it does nothing on other devices.

    No module is changed: layers of timm or of a user, and hooks between them, run as they are written. Some of torch's float32
    operations are computed in another way, with the same gradients. Values differ in the last digits.

    - A wide linear layer is multiplied by oneDNN or by MKL, whichever is faster on the processor. It does not keep an input
      that is cheap to compute again: the output of a layer norm or a GELU.
    - A layer scale after a linear layer does not keep its input. (After the scaling, the gradient of that input cannot be
      had.)
    - Attention with a trainable bias uses the fused kernel, which torch itself uses only for a bias without a gradient.

    Results can be differentiated once, backwards: a second derivative, forward mode and `torch.func` raise an error. Without a
    gradient only the multiplications differ. The context does nothing if the module's parameters are not on a CPU, or if parts
    of it are compiled, sharded by FSDP2, or checkpoint their activations.
    """
    on_cpu = all(parameter.device.type == "cpu" for parameter in module.parameters())
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return FasterOnCPU() if on_cpu and has_onednn and not any(map(differs, module.modules())) else nullcontext()


def differs(module: Any) -> bool:
    """Returns whether a module is compiled, sharded, or checkpoints (timm's `grad_checkpointing`, our `checkpointing`)."""
    again = getattr(module, "grad_checkpointing", False) or getattr(module, "checkpointing", False)
    compiled = module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
    return again or compiled or isinstance(module, FSDPModule)


class Made(NamedTuple):
    """Records how to make a tensor again, `by(*of)`; `version` shows whether it was changed in place since."""

    by: Callable[..., Tensor]
    of: tuple[Tensor, ...]
    version: int


class Layer(NamedTuple):
    """Records a linear layer's result and inputs, their versions, and the layer with a scale, `scaled(scale, result)`."""

    result: Tensor
    given: tuple[Tensor, ...]
    versions: list[int]
    scaled: Callable[[Tensor, Tensor], Tensor]

    def is_untouched(self) -> bool:
        """Returns whether nothing was changed in place since, and nothing uses the result's gradient (hooks, retain_grad)."""
        same = self.versions == [tensor._version for tensor in (self.result, *self.given)]
        return same and not self.result._backward_hooks and not self.result.retains_grad


class FasterOnCPU(TorchFunctionMode):
    """Replaces torch functions as described in `faster_on_cpu`."""

    def __init__(self) -> None:
        super().__init__()
        self.made: Any = WeakTensorKeyDictionary()
        self.latest: Layer | None = None
        """The last linear layer: a layer scale may follow it."""

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
        """Stores for `how` how a tensor was made, if it needs a gradient."""
        if tensor.requires_grad:
            self.made[tensor] = Made(by, of, tensor._version)

    def how(self, tensor: Tensor) -> Made | None:
        """Returns how the tensor was made, if this is known and it was not changed in place since."""
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
        """Computes torch's function, and remembers how the result was made."""

        def again(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(input, normalized_shape, weight, bias, eps)

        result = F.layer_norm(input, normalized_shape, weight, bias, eps)
        if weight is not None and bias is not None:
            self.remember(result, again, (input, weight, bias))
        return result

    def gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        """Computes torch's function, and remembers how the result was made."""
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
        """Multiplies the last linear layer's result, [... d], by a layer scale, [d], in either order."""
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
    """Returns whether `torch.utils.checkpoint` is active, which needs the same tensors to be kept in its second run."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def is_plain(*tensors: Any) -> bool:
    """Returns whether all are None or float32 on a CPU and no subclasses, and autocast is off."""
    types = (Tensor, nn.Parameter, type(None))
    fitting = all(type(t) in types and (t is None or (t.dtype == torch.float32 and t.device.type == "cpu")) for t in tensors)
    return fitting and not torch.is_autocast_enabled("cpu")


def learns(*tensors: Tensor | None) -> bool:
    """Returns whether one of the tensors needs a gradient."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@cache
def is_intel() -> bool:
    """Returns whether Linux reports an Intel processor."""
    said = Path("/proc/cpuinfo")
    return said.exists() and "GenuineIntel" in said.read_text()


def by_onednn(gradient: bool) -> bool:
    """Returns whether oneDNN is faster for a layer's result (or `gradient`) than torch's own library, MKL on x86.

    Measured with two threads: on a Xeon with AVX-512, MKL was 5 to 10 % faster in results (gradients were not tried). On an
    EPYC with AVX-512, which MKL does not use on AMD's processors, oneDNN was twice as fast in both. On an EPYC with AVX2 it was
    10 to 35 % faster in results, and slower in gradients.
    """
    return not is_intel() and (not gradient or torch.backends.cpu.get_cpu_capability() == "AVX512")


def multiplied(input: Tensor, weight: Tensor, bias: Tensor | None = None, *, gradient: bool = False) -> Tensor:
    """Computes a linear layer by the faster library (see `by_onednn`): [... c], [d c], [d] -> [... d]"""
    if not by_onednn(gradient):
        return F.linear(input, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
    return product


def over_rows(gradient: Tensor, input: Tensor, sums: bool) -> tuple[Tensor, Tensor | None]:
    """Gives gradients: of a layer's result, [n d], with its input, [n c] -> of weight, [d c], and, if `sums`, of bias, [d]"""
    if not by_onednn(gradient=True):
        return gradient.t() @ input, gradient.sum(0) if sums else None
    # faster than `multiplied`, where torch copies the transposed gradient; only the type of the third tensor is used
    operands = gradient.to_mkldnn(), input.to_mkldnn(), input
    product, total = torch.ops.aten.mkldnn_linear_backward_weights(*operands, sums)
    return product, total if sums else None


class Linear(torch.autograd.Function):
    """Computes `scale * (input @ weight.T + bias)`, and keeps the tensors that the input was made of."""

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
            by: computes the input from `of`; None: the input is kept.
            scale: [d]
            result: of the multiplication, if it is known already.
            input: [... c]
            weight: [d c]
            bias: [d]
            of: the arguments of `by`.
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
        if wants_input:  # last, so that the recomputed input is already freed
            scaled = gradient if scale is None else gradient * scale
            of_input = multiplied(scaled, weight.t(), gradient=True).unflatten(0, whole)
        return None, of_scale, None, of_input, of_weight, of_bias, *[None for _ in rest]


def pieces(images: int, bias: Tensor) -> Iterator[slice]:
    """Yields slices of a batch, a few images each."""
    size = max(1, PIECE // bias.numel())
    return (slice(first, first + size) for first in range(0, images, size))


class BiasedAttention(torch.autograd.Function):
    """Computes scaled dot-product attention with a trainable bias, and keeps no attention maps."""

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
