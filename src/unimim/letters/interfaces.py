"""The equation that this package is made of, and its abstract letters.

    L( N(T(x)),  H(S(M(x))) )        on the selected patches

T teacher, N normalization, M masking, S student, H head, L loss: "A Unified View of Masked Image Modeling" (Peng et al.,
TMLR 2023), equation 1. N and L are plain `nn.Module`; the four others are defined here. The shape letters are
explained in `unimim.shapes`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F

from unimim.data.batches import check_images
from unimim.errors import UserError
from unimim.letters.mask import Mask, Selection
from unimim.letters.tokens import Tokens
from unimim.shapes import RGB, Grid
from unimim.weights.models import check_object


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

    def forward_image(self, images: Tensor, grid_size: Grid) -> Tensor:
        """Gives the target of the whole image, which a term with the selection `image` asks for.

        [b 3 H W] in [0, 1] -> float [b c], or long [b]. `grid_size` is the student's, as in `forward`.

        A target that is only of images gives it in `forward` already.

        Raises:
            ValueError: this target is of patches only.
        """
        target: Tensor = self(images, grid_size)
        if target.ndim != (1 if target.dtype == torch.long else 2):
            raise UserError(f"{type(self).__name__} gives no target of the whole image, which selection 'image' needs")
        return target

    def forward_both(self, images: Tensor, grid_size: Grid) -> tuple[Tensor, Tensor]:
        """Gives `forward` and `forward_image`, for terms that share this teacher; a network runs once for both."""
        return self(images, grid_size), self.forward_image(images, grid_size)

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


def targets_of(teacher: TargetGenerator, images: Tensor, grid_size: Grid, kinds: Collection[str]) -> dict[str, Tensor]:
    """Runs a teacher once for the kinds of targets that are asked for: "patches", "image" or both."""
    if "image" not in kinds:
        return {"patches": teacher(images, grid_size)}
    if "patches" not in kinds:
        return {"image": teacher.forward_image(images, grid_size)}
    return dict(zip(("patches", "image"), teacher.forward_both(images, grid_size), strict=True))


class Masking(nn.Module, ABC):
    """M: which patches the student does not see."""

    @abstractmethod
    def forward(self, images: Tensor, grid_size: Grid) -> Mask | Tensor:
        """[b 3 H W] -> the hidden patches [b h w], on the images' device, the same count in every image of a batch.

        A bool tensor [b h w], True = hidden, does as well; whoever calls the masking gets a `Mask` of it.
        """

    def __call__(self, images: Tensor, grid_size: Grid) -> Mask:
        """Calls `forward`.

        Raises:
            ValueError: it gives neither a mask nor a bool tensor [b h w] with one count in all images.
        """
        made = super().__call__(images, grid_size)
        return made if isinstance(made, Mask) else Mask(made)

    def attach(self, teacher: TargetGenerator) -> None:
        """Called once, before training, for a masking that samples by the teacher's attention."""


class Student(nn.Module, ABC):
    """S: an encoder that sees the corrupted image. `MaskTokenStudent` and `VisibleStudent` make one of a timm model.

    A student of yours sets `backbone`, the encoder that pretraining is for, and says the sizes of its grid and tokens.

    Args:
        mean: of the pixels in [0, 1], by which they are normalized.
        std: their standard deviation, likewise.

    Raises:
        ValueError: mean and std are not those of pixels in [0, 1].
    """

    backbone: Any
    """The encoder; its `forward_features` takes normalized images [b 3 H W]."""
    image_size: Grid
    """(H, W) in pixels."""
    grid_size: Grid
    """(h, w) of the tokens that come out, in patches."""
    embed_dim: int
    """d"""
    num_prefix_tokens: int = 0
    """CLS and register tokens, which come before the patch tokens; hierarchical backbones have none."""
    drops_patches: bool = False
    """Whether only the visible patches have tokens."""
    blocks: tuple[int, ...] = ()
    """The earlier blocks whose tokens come out too, because a head asks for them."""
    init: str = "timm"
    """How the weights began, by its name in `unimim.letters.initialization`, which heads follow."""
    decayed: tuple[str, ...] = ()
    """The tokens, positions and bias tables that get weight decay, by the last part of their parameter's name."""
    mean: Tensor
    std: Tensor

    def __init__(self, mean: RGB = IMAGENET_DEFAULT_MEAN, std: RGB = IMAGENET_DEFAULT_STD) -> None:
        super().__init__()
        check_statistics("model.student", mean, std)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    @abstractmethod
    def forward(self, images: Tensor, mask: Mask) -> Tokens:
        """[b 3 H W] in [0, 1], the hidden patches -> tokens [b p+n d] of all patches, or of the visible ones."""

    def ask(self, blocks: Sequence[int]) -> None:
        """Called once for each head, with the earlier blocks whose tokens it needs.

        Raises:
            ValueError: this student has no such blocks.
        """
        if blocks:
            raise UserError(f"model.head asks for blocks {list(blocks)}, and {type(self).__name__} gives only its last tokens")

    def check_image_size(self, images: Tensor) -> None:
        """
        Raises:
            ValueError: the images [b 3 H W] are not of the size that the backbone was built for; or as `check_images`.
        """
        check_images(images)
        if tuple(images.shape[-2:]) != tuple(self.image_size):
            given, built = ("x".join(map(str, size)) for size in (images.shape[-2:], self.image_size))
            raise UserError(
                f"the images are {given} pixels, but {getattr(self, 'name', type(self).__name__)} was built for {built}: set "
                f"data.image_size, or img_size in model.student.model_args"
            )

    def normalize(self, images: Tensor) -> Tensor:
        """[b 3 H W] in [0, 1] -> [b 3 H W] by `mean` and `std`."""
        self.check_image_size(images)
        return (images - self.mean) / self.std


class Head(nn.Module, ABC):
    """H: from the student's tokens to the target's channels. Modules take it as a factory, `Head(student, target)`.

    Args:
        student: gives d, the width of its tokens.
        target: gives c, the channels of the target.
    """

    student_blocks: tuple[int, ...] = ()
    """The student's blocks, by index, whose tokens it takes beside the last ones: `tokens.blocks[index]`."""
    uses_student: bool = False
    """Whether it computes with modules of the student, which shards keep apart."""
    decayed: tuple[str, ...] = ()
    """The tokens that get weight decay: a decoder's mask token, where the student says so."""

    @abstractmethod
    def __init__(self, student: Student, target: TargetGenerator) -> None:
        super().__init__()

    def attach(self, heads: "Mapping[str, Head]") -> None:
        """Called once, with the heads of the earlier terms by name, for a head that uses one of them."""

    @abstractmethod
    def forward(self, tokens: Tokens, mask: Mask, selected: Selection) -> Tensor:
        """Tokens [b p+n d], hidden patches, selected ones -> [m c], in row-major order of these; [b c] of the whole image."""
