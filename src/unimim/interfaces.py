"""The equation that this package is made of, and its abstract letters.

    L( N(T(x)),  H(S(M(x))) )        on the selected patches

T teacher, N normalization, M masking, S student, H head, L loss: "A Unified View of Masked Image Modeling" (Peng et al.,
TMLR 2023), equation 1. N and L are plain `nn.Module`; the four others are defined here.

The shape letters, used everywhere and explained only here:
`b` images, `H W` pixels, `h w` patch grid, `m` selected patches of the whole batch, `d` student width, `c` target
channels.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.backbones import check_object, create_backbone
from unimim.batches import check_images
from unimim.errors import UserError
from unimim.pictures import code_colors, principal_components

Grid = tuple[int, int]
"""(h, w) of a patch grid, or (H, W) of an image in pixels."""
RGB = tuple[float, float, float]
"""One number a colour channel, for pixels in [0, 1]."""
IGNORED = 255
"""The label of a pixel that counts neither in the loss nor in a metric of segmentation."""


class Frozen:
    """A network that never learns, kept out of the module tree.

    Because it is no `nn.Module`, the network it holds is in no state dict, no optimizer, no DDP bucket and no EMA copy,
    and no `.train()` reaches it. A `TargetGenerator` moves the ones it has to its own device. A deep copy shares it.

    Args:
        network: is put into eval mode, and its parameters get no gradient.

    Raises:
        ValueError: a class, or anything else that is no module.
    """

    def __init__(self, network: nn.Module) -> None:
        check_object("the network in Frozen", network, nn.Module, "unimim.EfficientNetLite0()")
        self.network: Any = network.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Frozen":
        return self


def held_by(value: Any) -> Iterator[Frozen]:
    """The `Frozen` in a value, also in lists and dicts; modules are left to themselves."""
    if isinstance(value, Frozen):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from held_by(item)
    elif isinstance(value, dict):
        yield from held_by(list(value.values()))


def check_positive(owner: str, **numbers: int) -> None:
    """
    Raises:
        ValueError: one of the numbers is below 1; it is named.
    """
    for name, value in numbers.items():
        if value < 1:
            raise UserError(f"{owner}: {name} is {value}, but it is at least 1")


def check_statistics(owner: str, mean: Sequence[float], std: Sequence[float]) -> None:
    """
    Raises:
        ValueError: they cannot be the mean and standard deviation of three channels of pixels in [0, 1].
    """
    three = len(mean) == len(std) == 3
    if not three or not all(0 <= value <= 1 for value in mean) or not all(0 < value <= 1 for value in std):
        raise UserError(
            f"{owner}: mean {tuple(mean)} and std {tuple(std)} are not those of red, green and blue in [0, 1]: three numbers "
            f"each, std above 0 (those of pixels in 0 to 255 are divided by 255)"
        )


class TargetGenerator(nn.Module, ABC):
    """T: what the student has to predict at each patch.

    A new target is one subclass with `dim` and `forward`. Frozen networks are kept as `self.x = Frozen(network)`.
    """

    dim: int
    """c, the channels of the target, or the size of the vocabulary when the target is discrete."""

    @abstractmethod
    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] with pixels in [0, 1] -> float [b h w c], or long [b h w] for discrete tokens."""

    def attach(self, student: "Student") -> None:
        """Called once, before training. An EMA teacher copies the student's backbone here and sets `dim`."""

    def attach_head(self, head: "Head") -> None:
        """Called once, when the head exists. A teacher whose target passes through a head copies it here."""

    def prepare(self, batches: Iterable[Tensor], grid_size: Grid) -> None:
        """Called once when training starts, with batches of training images. A codebook is fitted to them here."""

    def update(self, student: "Student", head: "Head", progress: float) -> None:
        """Called once per optimizer step, `progress` being the share of all steps done. An EMA teacher follows here."""

    def callbacks(self) -> list[pl.Callback]:
        """What goes along with a training, beside the step. A cache follows the data here."""
        return []

    @property
    def follows_student(self) -> bool:
        """Whether it changes as the student learns."""
        hooks = ("attach", "attach_head", "update")
        return any(getattr(type(self), hook) is not getattr(TargetGenerator, hook) for hook in hooks)

    def picture(self, values: Tensor, target: Tensor) -> Tensor:
        """The target itself, or a prediction of it, as a person can look at it: -> [b 3 H' W'] in [0, 1].

        The first three principal components of the target, or a colour for each code. A target that is seen better another
        way has its own.

        Args:
            values: float [b h w c]; of a discrete target codes [b h w], or logits [b h w codes].
            target: float [b h w c] or long [b h w], which decides what a colour means.
        """
        if target.dtype == torch.long:
            return code_colors(values if values.dtype == torch.long else values.argmax(-1))
        return principal_components(values, target)

    def reconstruction(self, prediction: Tensor, target: Tensor, before: Tensor) -> Tensor | None:
        """The images that a prediction means, with N taken back: -> [b 3 H W] in [0, 1]; None where a target is no image.

        Args:
            prediction: of every patch, [b h w c].
            target: N(T(x)), likewise.
            before: T(x), likewise.
        """
        return None

    def check_patch_size(self, patch_size: int, images: Tensor, grid_size: Grid) -> None:
        """For targets that are cut from the image itself.

        Raises:
            ValueError: the images [b 3 H W] are not `patch_size` pixels times the grid (h, w).
        """
        (height, width), (h, w) = images.shape[-2:], grid_size
        if (height, width) == (h * patch_size, w * patch_size):
            return
        whole = height % h == 0 and width % w == 0 and height // h == width // w
        fix = f"are patches of {height // h} pixels; set model.teacher.patch_size to that" if whole else "are no whole patches"
        raise UserError(
            f"{type(self).__name__}(patch_size={patch_size}) and the student's grid do not meet: {height}x{width} pixels on a "
            f"{h}x{w} grid {fix}"
        )

    def resize(self, images: Tensor, size: Grid) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b 3 H' W'] in [0, 1], bicubic and antialiased; images of that size as they are."""
        if tuple(images.shape[-2:]) == size:
            return images
        return F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)

    def train(self, mode: bool = True) -> "TargetGenerator":
        """A target is always in eval mode, also one that holds its network as a plain submodule."""
        return super().train(False)

    def networks(self) -> list[nn.Module]:
        """The frozen networks, also of targets within this one, which `parameters()` does not see."""
        return [held.network for module in self.modules() for held in held_by(vars(module))]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TargetGenerator":
        for held in held_by(vars(self)):
            held.network._apply(fn)
        return super()._apply(fn, recurse)


class Masking(nn.Module, ABC):
    """M: which patches the student does not see."""

    @abstractmethod
    def forward(self, images: Tensor, grid_size: Grid) -> Tensor:
        """[b 3 H W] -> bool [b h w] on the images' device, True = hidden, the same count in every image of every batch."""

    def attach(self, teacher: TargetGenerator) -> None:
        """Called once, before training, for a masking that samples by the teacher's attention."""


class Student(nn.Module, ABC):
    """S: a timm backbone that sees the corrupted image. The backbone is what pretraining is for; it stays timm's own.

    Args:
        backbone: a timm name; built with `global_pool=''` and `num_classes=0`, so that it ends in its final norm.
        model_args: further arguments of the timm model, such as `img_size` or `drop_path_rate`.
        mean: of the pixels in [0, 1], by which they are normalized. It also becomes the `mean` of `backbone.pretrained_cfg`, so
            that whoever gets the backbone feeds it the same.
        std: their standard deviation, likewise.

    Raises:
        ValueError: timm has no such name, the model does not take these arguments, its image is not a whole number of
            patches, or mean and std are not those of pixels in [0, 1].
    """

    drops_patches: bool = False
    """Whether the tokens are those of the visible patches only, [b prefix+visible d]."""
    init: str = "timm"
    """How the weights began, by its name in `unimim.initialization`, which heads follow."""
    decayed: tuple[str, ...] = ()
    """The tokens, positions and bias tables that get weight decay, by the last part of their parameter's name."""
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: str,
        model_args: dict[str, Any] | None = None,
        mean: RGB = IMAGENET_DEFAULT_MEAN,
        std: RGB = IMAGENET_DEFAULT_STD,
    ) -> None:
        super().__init__()
        self.name = backbone
        self.model_args = dict(model_args or {})
        if taken := [key for key in ("num_classes", "global_pool", "patch_drop_rate") if key in self.model_args]:
            raise UserError(
                f"model.student.model_args cannot hold {', '.join(taken)}: a student has no classifier, and masking "
                f"is model.masking's"
            )
        self.backbone: Any = create_backbone(backbone, {"num_classes": 0, "global_pool": "", **self.model_args})
        if not hasattr(getattr(self.backbone, "patch_embed", None), "grid_size") or not hasattr(self.backbone, "feature_info"):
            raise UserError(f"{backbone} has no patch embedding: a student is a ViT, BEiT, EVA or Swin")
        check_statistics("model.student", mean, std)
        self.backbone.pretrained_cfg = {**self.backbone.pretrained_cfg, "mean": tuple(mean), "std": tuple(std)}
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        reduction = self.backbone.feature_info[-1]["reduction"]
        if any(side % reduction for side in self.image_size):
            given = "x".join(map(str, self.image_size))
            raise UserError(f"{backbone} with img_size {given}: that is no whole number of its patches of {reduction} pixels")

    @property
    def image_size(self) -> Grid:
        """(H, W) in pixels."""
        height, width = self.backbone.patch_embed.img_size
        return height, width

    @property
    def grid_size(self) -> Grid:
        """(h, w) of the tokens that come out, in patches."""
        reduction = self.backbone.feature_info[-1]["reduction"]
        return self.image_size[0] // reduction, self.image_size[1] // reduction

    @property
    def embed_dim(self) -> int:
        """d"""
        return int(self.backbone.num_features)

    @property
    def num_prefix_tokens(self) -> int:
        """CLS and register tokens, which come before the patch tokens; hierarchical backbones have none."""
        return getattr(self.backbone, "num_prefix_tokens", 0)

    def check_image_size(self, images: Tensor) -> None:
        """
        Raises:
            ValueError: the images [b 3 H W] are not of the size that the backbone was built for; or as `check_images`.
        """
        check_images(images)
        if tuple(images.shape[-2:]) != self.image_size:
            given, built = ("x".join(map(str, size)) for size in (images.shape[-2:], self.image_size))
            raise UserError(
                f"the images are {given} pixels, but {self.name} was built for {built}: set data.image_size, or "
                f"img_size in model.student.model_args"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b 3 H W] by `mean` and `std`."""
        self.check_image_size(images)
        return (images - self.mean) / self.std

    @abstractmethod
    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1], bool [b h w] -> tokens: [b h w d], or [b prefix+visible d] of a student that drops."""


class Head(nn.Module, ABC):
    """H: from the student's tokens to the target's channels. Modules take it as a factory, `Head(student, target)`.

    Args:
        student: gives d, the width of its tokens.
        target: gives c, the channels of the target.
    """

    decayed: tuple[str, ...] = ()
    """The tokens that get weight decay: a decoder's mask token, where the student says so."""

    @abstractmethod
    def __init__(self, student: Student, target: TargetGenerator) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, tokens: Tensor, mask: Tensor, selected: Tensor) -> Tensor:
        """Tokens of the student, bool [b h w], bool [b h w] -> [m c], in row-major order of the selected patches."""
