"""T as the student's own past: a copy that follows the student by an exponential moving average (EMA)."""

import copy
import math
from collections.abc import Iterable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.errors import UserError
from unimim.letters.interfaces import Head, Student, TargetGenerator, check_positive
from unimim.letters.mask import Mask, WholeImage
from unimim.pictures.patches import code_colors
from unimim.shapes import Grid


class FollowingTarget(TargetGenerator):
    """What both share: a copy of the student that follows it.

    Args:
        momentum: the share of the copy that stays in one optimizer step.
        final_momentum: where a half cosine over the whole training takes the momentum; None leaves it constant.

    Raises:
        ValueError: a momentum outside [0, 1]; when training starts, weights of 16 bits, too few for steps of 1 - 0.9998.
    """

    def __init__(self, momentum: float, final_momentum: float | None) -> None:
        super().__init__()
        self.momentum = momentum
        self.final_momentum = momentum if final_momentum is None else final_momentum
        if not 0 <= momentum <= 1 or not 0 <= self.final_momentum <= 1:
            raise UserError(
                f"model.teacher.momentum is {momentum}, final_momentum {final_momentum}, but both lie within 0 to 1"
            )

    def attach(self, student: Student) -> None:
        """Copies the student."""
        self.average = copy.deepcopy(student)

    def prepare(self, batches: Iterable[Tensor], grid_size: Grid) -> None:
        """Looks that the weights can follow."""
        if any(parameter.dtype in (torch.bfloat16, torch.float16) for parameter in self.parameters()):
            raise UserError("an EMA of weights in 16 bits cannot move: set trainer.precision to bf16-mixed (or 32-true)")

    def update(self, student: Student, head: Head, progress: float) -> None:
        """One step of the EMA."""
        follow(self.average, student, self.momentum_at(progress))

    def momentum_at(self, progress: float) -> float:
        """The half cosine, at `progress` in [0, 1]."""
        return self.final_momentum + (self.momentum - self.final_momentum) * (1 + math.cos(math.pi * progress)) / 2


class EMATarget(FollowingTarget):
    """data2vec's target (Baevski et al., 2022): the outputs of the EMA's last blocks, each normalized, averaged.

    The EMA sees the whole image. The normalization of the mean is N.

    Args:
        top_blocks: how many of the last blocks are averaged (data2vec, ViT-B: 6).
        momentum: the share of the copy that stays in one optimizer step (data2vec, ViT-B: 0.9998).
        final_momentum: where a half cosine over the whole training takes it; None leaves it constant (data2vec).

    Raises:
        ValueError: a momentum outside [0, 1]; when training starts, weights of 16 bits; on `attach`, the student has fewer
            blocks, or the last ones differ in width or grid (Swin: use `top_blocks=1`).
    """

    def __init__(self, top_blocks: int = 6, momentum: float = 0.9998, final_momentum: float | None = None) -> None:
        super().__init__(momentum, final_momentum)
        self.top_blocks = top_blocks

    def attach(self, student: Student) -> None:
        """Copies the student; its width becomes `dim`."""
        blocks = student.backbone.feature_info
        alike = [b for b in blocks if (b["num_chs"], b["reduction"]) == (blocks[-1]["num_chs"], blocks[-1]["reduction"])]
        if not 1 <= self.top_blocks <= len(alike):
            raise UserError(
                f"model.teacher.top_blocks is {self.top_blocks}, but {student.name} has only {len(alike)} last blocks of one "
                f"width and grid"
            )
        super().attach(student)
        self.dim = student.embed_dim

    @torch.no_grad()
    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> float32 [b h w c]"""
        blocks: list[Tensor] = self.average.backbone.forward_intermediates(
            self.average.normalize(images), indices=self.top_blocks, norm=False, intermediates_only=True
        )
        layers = [rearrange(block.float(), "b c h w -> b h w c") for block in blocks]
        return torch.stack([F.layer_norm(layer, layer.shape[-1:]) for layer in layers]).mean(0)


class EMAHeadTarget(FollowingTarget):
    """iBOT's target (Zhou et al., 2022): what the EMA of student and head predicts for the whole image.

    Its centring and softmax are N: `CenteredSoftmax`.

    Args:
        prototypes: c, the width of the head.
        momentum: the share of the copies that stays in one optimizer step (iBOT: 0.996).
        final_momentum: where a half cosine over the whole training takes it (iBOT: 1); None leaves it constant.

    Raises:
        ValueError: a momentum outside [0, 1], or no prototypes; when training starts, weights of 16 bits.
    """

    def __init__(self, prototypes: int = 8192, momentum: float = 0.996, final_momentum: float | None = 1.0) -> None:
        super().__init__(momentum, final_momentum)
        check_positive("model.teacher", prototypes=prototypes)
        self.dim = prototypes

    def attach_head(self, head: Head) -> None:
        """Copies the head.

        Raises:
            ValueError: the head computes with parts of the student, which a copy would not follow.
        """
        if head.uses_student:
            raise UserError(
                f"EMAHeadTarget averages the head, and {type(head).__name__} is in part the student's: take another head"
            )
        self.average.ask(head.student_blocks)
        self.average_head = copy.deepcopy(head)

    def update(self, student: Student, head: Head, progress: float) -> None:
        """One step of the EMA."""
        super().update(student, head, progress)
        follow(self.average_head, head, self.momentum_at(progress))

    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> float32 [b h w c]"""
        return self.predict(images, grid_size, patches=True)[0]

    def forward_image(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> float32 [b c], from CLS"""
        return self.predict(images, grid_size, image=True)[0]

    def forward_both(self, images: Tensor, grid_size: Grid) -> tuple[Tensor, Tensor]:
        """[b 3 H W] in [0, 1] -> float32 [b h w c], float32 [b c]"""
        patches, whole = self.predict(images, grid_size, patches=True, image=True)
        return patches, whole

    @torch.no_grad()
    def predict(self, images: Tensor, grid_size: Grid, patches: bool = False, image: bool = False) -> list[Tensor]:
        """Runs both copies on images [b 3 H W] in [0, 1], with nothing hidden: float32 [b h w c] and [b c], if asked for."""
        h, w = grid_size
        nothing = Mask(torch.zeros(len(images), h, w, dtype=torch.bool, device=images.device), 0)
        tokens = self.average(images, nothing)
        predicted = []
        if patches:
            logits = self.average_head(tokens, nothing, nothing.full()).float()
            predicted.append(rearrange(logits, "(b h w) c -> b h w c", h=h, w=w))
        if image:
            predicted.append(self.average_head(tokens, nothing, WholeImage()).float())
        return predicted

    def picture(self, values: Tensor, target: Tensor) -> Tensor:
        """The colour of the nearest prototype, of probabilities and logits alike: [b h w c] -> [b 3 h w] in [0, 1]"""
        return code_colors(values.argmax(-1))


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Every parameter of `average` becomes `momentum` of itself and the rest of its like in `module`; buffers are copied."""
    pairs = list(zip(average.parameters(), module.parameters(), strict=True))
    torch._foreach_lerp_([ours for ours, _ in pairs], [theirs.detach() for _, theirs in pairs], 1 - momentum)
    for ours, theirs in zip(average.buffers(), module.buffers(), strict=True):
        ours.copy_(theirs)
