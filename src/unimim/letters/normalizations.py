"""N, the normalization of the target; `nn.Identity` is none."""

import torch
from einops import rearrange
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from unimim.errors import UserError


class LayerNorm(nn.Module):
    """Each patch to mean 0 and variance 1 over its channels, without learned scale and shift: MaskDistill's choice.

    Args:
        eps: added to the variance. MAE and dBOT have 1e-6.
        unbiased: divide by c - 1 in the variance, as the official code of MAE (its per-patch pixel normalization,
            `norm_pix_loss`) and of dBOT does.
    """

    def __init__(self, eps: float = 1e-6, unbiased: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.unbiased = unbiased

    def forward(self, target: Tensor) -> Tensor:
        """[b h w c] -> [b h w c]"""
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True, correction=int(self.unbiased))
        return (target - mean) * torch.rsqrt(variance + self.eps)

    def extra_repr(self) -> str:
        return f"eps={self.eps}, unbiased={self.unbiased}"


class L2Norm(nn.Module):
    """Each patch to length 1 over its channels (MVP, MILAN, MaskFeat with DINO's features)."""

    def forward(self, target: Tensor) -> Tensor:
        """[b h w c] -> [b h w c]"""
        return F.normalize(target, dim=-1)


class InstanceNorm(nn.Module):
    """Each channel to mean 0 and variance 1 over the patches of one image, without learned scale and shift.

    Args:
        eps: added to the variance.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, target: Tensor) -> Tensor:
        """[b h w c] -> [b h w c]"""
        normalized = F.instance_norm(rearrange(target, "b h w c -> b c h w"), eps=self.eps)
        return rearrange(normalized, "b c h w -> b h w c")

    def extra_repr(self) -> str:
        return f"eps={self.eps}"


class CenteredSoftmax(nn.Module):
    """Logits to probabilities, with a running mean taken away first, so that no channel wins everywhere (DINO, iBOT).

    Args:
        channels: c.
        temperature: the teacher's; lower than the student's, so that its answer is sharper. iBOT warms it up from 0.04 to 0.07.
        momentum: of the running mean (iBOT: 0.9). It moves in training only, and is one for all processes.
    """

    center: Tensor

    def __init__(self, channels: int, temperature: float = 0.07, momentum: float = 0.9) -> None:
        super().__init__()
        if channels < 1 or not temperature > 0 or not 0 <= momentum <= 1:
            raise UserError(
                f"CenteredSoftmax: channels at least 1, temperature above 0, momentum within 0 to 1; got {channels}, "
                f"{temperature}, {momentum}"
            )
        self.temperature = temperature
        self.momentum = momentum
        self.register_buffer("center", torch.zeros(channels))

    def forward(self, target: Tensor) -> Tensor:
        """Logits [b h w c], or of whole images [b c] -> probabilities [b h w c] or [b c]

        Raises:
            ValueError: c is not `channels`.
        """
        if target.shape[-1] != len(self.center):
            raise UserError(f"model.normalization.channels is {len(self.center)}, but the target has {target.shape[-1]}")
        probabilities = F.softmax((target - self.center) / self.temperature, dim=-1)
        if self.training:
            mean = target.flatten(0, -2).mean(0)
            if distributed.is_initialized():
                distributed.all_reduce(mean)
                mean /= distributed.get_world_size()
            self.center.lerp_(mean.to(self.center.dtype), 1 - self.momentum)
        return probabilities

    def extra_repr(self) -> str:
        return f"{len(self.center)}, temperature={self.temperature}, momentum={self.momentum}"
