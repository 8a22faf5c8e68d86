"""L, the losses that torch lacks."""

from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError


class CosineLoss(nn.Module):
    """One minus the cosine of prediction and target, averaged over the selected patches (MVP, EVA, MILAN).

    Args:
        weight: a factor. MILAN has 2 (its 2 - 2 cos); with gradient clipping it matters.

    Raises:
        ValueError: the weight is not above 0.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        if not weight > 0:
            raise UserError(f"CosineLoss: weight is {weight}, but it is above 0")
        self.weight = weight

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """[m c], [m c] -> []"""
        return self.weight * (1 - F.cosine_similarity(prediction, target, dim=-1)).mean()

    def extra_repr(self) -> str:
        return f"weight={self.weight}"


class SoftCrossEntropyLoss(nn.Module):
    """Cross-entropy with a distribution, of logits divided by a temperature (DINO, iBOT).

    Args:
        temperature: the student's (iBOT: 0.1). torch's CrossEntropyLoss has none.

    Raises:
        ValueError: the temperature is not above 0.
    """

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"SoftCrossEntropyLoss: temperature is {temperature}, but it is above 0")
        self.temperature = temperature

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Logits [m c], probabilities [m c] -> []"""
        return F.cross_entropy(prediction.float() / self.temperature, target)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}"
