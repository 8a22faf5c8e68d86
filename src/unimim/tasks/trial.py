"""The trial: all parts of the equation see two blank images, so that parts that do not fit fail before the data is read."""

from typing import Any

import torch
from torch import Tensor, nn

from unimim.errors import UserError
from unimim.letters.losses import CosineLoss, SoftCrossEntropyLoss
from unimim.letters.mask import Mask, WholeImage
from unimim.letters.normalizations import CenteredSoftmax
from unimim.letters.term import Term, watched
from unimim.letters.tokens import Tokens

# The losses of (prediction, target) that the recipes choose from; others are taken as they are.
REGRESSION: tuple[type[nn.Module], ...] = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, CosineLoss)
CLASSIFICATION: tuple[type[nn.Module], ...] = (nn.CrossEntropyLoss, SoftCrossEntropyLoss)


def try_parts(model: Any) -> None:
    """Tries masking, student and every term of a `MaskedImageModeling` on two blank images.

    Raises:
        ValueError: grids that do not meet, a shape other than promised, a student that cannot take its images, no patch
            that counts in the loss, or a loss that is not for this kind of target.
    """
    model.eval()
    blank = torch.zeros(2, 3, *model.student.image_size)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        mask = tried_mask(model.masking, blank, model.student.grid_size)
        for name, term in model.terms.items():  # before the student: without a patch there is nothing to try
            check_selected(term, mask, model.masking, where_is(name))
        tokens = tried_tokens(model.student, blank, mask)
        for name, term in model.terms.items():
            try_term(term, blank, tokens, mask, where_is(name), model.student)
    model.train()


def tried_mask(masking: nn.Module, images: Tensor, grid_size: tuple[int, int]) -> Mask:
    """Calls M.

    Raises:
        ValueError: it gives no mask of the grid, or one that says another number of patches than it has.
    """
    name = type(masking).__name__
    try:
        mask: Mask = masking(images, grid_size)
    except UserError as error:
        if str(error).startswith("a mask "):  # of `Mask`, which does not know whose it is
            raise UserError(str(error).replace("a mask", name if "hides" in str(error) else f"{name}: a mask", 1)) from error
        raise
    for one in (mask, mask.predicted):
        promise(masking, "mask", one.tensor, (len(images), *grid_size))
        counts = one.tensor.flatten(1).sum(1).tolist()
        if set(counts) != {one.count}:
            raise UserError(
                f"{name} gives a mask that says {one.count} patches, and has {counts}: make a new one, Mask(tensor)"
            )
    if (mask.predicted.tensor & ~mask.tensor).any():
        raise UserError(
            f"{name} gives a mask whose predicted patches are not all hidden: the student would see what it predicts"
        )
    return mask


def tried_tokens(student: Any, images: Tensor, mask: Mask) -> Tokens:
    """Calls S.

    Raises:
        ValueError: it cannot take the images, or gives other than tokens of its grid and width.
    """
    try:
        tokens = student(images, mask)
    except RuntimeError as error:
        raise UserError(f"the student does not work on a blank image ({described(student)}): {error}") from error
    name = type(student).__name__
    if not isinstance(tokens, Tokens):
        raise UserError(f"{name} gives a {type(tokens).__name__}, but it has to be unimim.Tokens(prefix, patches, where)")
    promise(student, "patch tokens", tokens.patches, (len(images), tokens.where.count, student.embed_dim))
    promise(student, "prefix tokens", tokens.prefix, (len(images), student.num_prefix_tokens, student.embed_dim))
    return tokens


def try_term(term: Term, images: Tensor, tokens: Tokens, mask: Mask, where: str, student: Any) -> None:
    """Calls a term, and looks at what each of its letters gives.

    Raises:
        ValueError: as `try_parts`.
    """
    seen = watched(term)
    failed: Exception | None = None
    try:
        seen(images, tokens, mask)
    except (AttributeError, TypeError, NotImplementedError, RuntimeError, ValueError, IndexError) as error:
        failed = error
    raw, target, prediction = seen.run.given, seen.normalization.given, seen.head.given
    if seen.run.failed:
        assert failed is not None
        raise failed
    check_tensor(term.teacher, "target", raw)
    teacher = type(term.teacher).__name__
    if seen.normalization.failed:
        if isinstance(failed, UserError):
            raise failed
        kinds = f"{type(term.normalization).__name__} does not take the {raw.dtype} of {teacher}"
        raise UserError(f"{where}.normalization: {kinds} ({failed}); for a discrete one it is torch.nn.Identity") from failed
    check_tensor(term.normalization, "target", target)
    if target.dtype in (torch.int32, torch.int16, torch.uint8):
        raise UserError(f"{teacher} gives {target.dtype}: discrete targets are long, add .long()")
    channels = () if target.dtype == torch.long else (term.teacher.dim,)
    of_image = isinstance(seen.select.given, WholeImage)
    promise(term.teacher, "target", target, (len(images), *(() if of_image else mask.grid_size), *channels))
    if seen.head.failed:
        if isinstance(failed, RuntimeError):
            raise UserError(f"student and head do not work on a blank image ({described(student)}): {failed}") from failed
        assert failed is not None
        raise failed
    count = len(images) * seen.select.given.count
    promise(term.head, "prediction", prediction, (count, term.teacher.dim))
    check_kind(term, seen.select.given.of(target), where)
    if seen.loss.failed:
        shapes = f"{tuple(prediction.shape)} and {tuple(seen.select.given.of(target).shape)} {target.dtype}"
        loss = type(term.loss).__name__
        raise UserError(f"{where}.loss: {loss} does not take prediction and target of {shapes}: {failed}") from failed
    promise(term.loss, "loss", seen.loss.given, ())


def where_is(name: str) -> str:
    """Returns the key of a term in a configuration."""
    return "model" if name == "first" else f"model.terms.{name}"


def check_selected(term: Term, mask: Mask, masking: nn.Module, where: str) -> None:
    """Checks that a term has something to compare.

    Raises:
        ValueError: no patch counts in the loss of the term.
    """
    if not term.select(mask).count:
        raise UserError(
            f"{type(masking).__name__} leaves no patch for the loss, which is on the {term.selection} ones: set "
            f"{where}.selection to all, or another model.masking"
        )


def check_kind(term: Term, target: Tensor, where: str) -> None:
    """Checks that the loss of a term is for its kind of target.

    Raises:
        ValueError: the loss is not for this kind of target: discrete, probabilities, or plain numbers.
    """
    teacher, loss, normalization = (type(part).__name__ for part in (term.teacher, term.loss, term.normalization))
    if target.dtype == torch.long:
        if isinstance(term.loss, (*REGRESSION, SoftCrossEntropyLoss, nn.NLLLoss)):
            raise UserError(
                f"{teacher} is discrete, and {loss} is not for its logits: set {where}.loss to torch.nn.CrossEntropyLoss"
            )
    elif isinstance(term.loss, CLASSIFICATION) and not is_probability(target):
        raise UserError(
            f"{loss} is for classes or probabilities, which {teacher} with {normalization} does not give: set {where}.loss to "
            f"a regression such as torch.nn.SmoothL1Loss, or {where}.normalization to CenteredSoftmax"
        )
    elif isinstance(term.loss, REGRESSION) and isinstance(term.normalization, (CenteredSoftmax, nn.Softmax)):
        raise UserError(
            f"{normalization} gives probabilities, and {loss} would compare them with logits: set {where}.loss to "
            f"SoftCrossEntropyLoss"
        )


def is_probability(target: Tensor) -> bool:
    """Returns whether every row of [m c] is a distribution."""
    return bool((target >= 0).all()) and torch.allclose(target.sum(1), target.new_ones(()), atol=1e-4)


def described(student: Any) -> str:
    """Returns how a student was made, for a message."""
    return f"{getattr(student, 'name', type(student).__name__)} with model_args {getattr(student, 'model_args', {})}"


def promise(part: nn.Module, name: str, value: Tensor, shape: tuple[int, ...]) -> None:
    """Checks the shape of what a part gave for two images.

    Raises:
        ValueError: what a part gave for two images is no tensor, or of another shape than it has to be.
    """
    check_tensor(part, name, value)
    if value.shape != shape:
        raise UserError(
            f"{type(part).__name__} gives a {name} of shape {tuple(value.shape)} for two images, not {shape}, which the "
            f"student's grid promises (and the teacher's dim, for target and prediction)"
        )


def check_tensor(part: nn.Module, name: str, value: object) -> None:
    """Checks that a part gave a tensor, and did not forget to return it.

    Raises:
        ValueError: it gave something else.
    """
    if not isinstance(value, Tensor):
        raise UserError(
            f"{type(part).__name__} gives a {type(value).__name__} as {name}, but it has to be a tensor: return one"
        )
