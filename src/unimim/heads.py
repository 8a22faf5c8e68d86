"""H, the head: from the student's tokens to predictions at the selected patches."""

from torch import Tensor, nn

from unimim.interfaces import Head, Student, TargetGenerator


class LinearHead(Head):
    """One fully connected layer: the head of BEiT, MaskFeat and both public re-implementations of MaskDistill.

    Args:
        student: gives d, the width of the tokens.
        target: gives c, the channels to predict.
    """

    def __init__(self, student: Student, target: TargetGenerator) -> None:
        super().__init__(student, target)
        self.linear = nn.Linear(student.embed_dim, target.dim)
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        """[b h w d], bool [b h w], bool [b h w] -> [m c]"""
        prediction: Tensor = self.linear(tokens[selected])
        return prediction
