"""N, the normalization of the target; `nn.Identity` is none."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
