"""One term of the equation: w L( N(T(x)), H(tokens) ), on the patches that it selects."""

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from unimim.errors import UserError
from unimim.letters.interfaces import Head, Student, TargetGenerator, targets_of
from unimim.letters.mask import Mask, Selection, WholeImage
from unimim.letters.tokens import Tokens
from unimim.shapes import Grid
from unimim.weights.models import check_object

if TYPE_CHECKING:
    TermName = str
else:

    class TermName(str):
        """The name of a term: small letters, digits and _. By this type the command line tells it from a class.

        Raises:
            ValueError: it is another kind of text.
        """

        def __new__(cls, name: object) -> "TermName":
            if not isinstance(name, str) or not re.fullmatch("[a-z_][a-z0-9_]*", name):
                raise UserError(f"{name!r} is no name of a term, which has small letters, digits and _ only")
            return super().__new__(cls, name)


Selected = Literal["masked", "visible", "all", "image"]
"""Which patches count in a term's loss, or the image as a whole."""
LETTERS = {"teacher": "T", "normalization": "N", "head": "H", "loss": "L"}
"""The letters that each term has; M and S are one for all of them."""


class Term(nn.Module):
    """One term of the loss, beside the first, which the module's own teacher, normalization, head and loss make.

    Args:
        teacher: T; or the name of an earlier term, whose teacher it shares: that runs once in a step. The first is "first".
        normalization: N, of the target; `nn.Identity()` for none.
        head: H, given as a factory (usually the class), called with student and teacher; or the name of an earlier term, whose
            head it shares.
        loss: L, any module of (prediction, target).
        selection: the patches that count in the loss: "masked", "visible" or "all"; or "image", for a target of the whole image
            [b c] and a prediction from CLS.
        weight: w, the factor of this term in the sum.

    Raises:
        ValueError: an unknown selection, a weight that is not above 0, a class in place of an object or the reverse.
    """

    def __init__(
        self,
        teacher: TermName | TargetGenerator,
        normalization: nn.Module,
        head: TermName | Callable[[Student, TargetGenerator], Head],
        loss: nn.Module,
        selection: Selected = "masked",
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        check_selection("selection", selection)
        if not weight > 0:
            raise UserError(f"weight of a term is {weight}, but it is above 0")
        if not isinstance(teacher, str):
            check_object("teacher", teacher, TargetGenerator, "unimim.HOGTarget()")
        check_object("normalization", normalization, nn.Module, "unimim.LayerNorm()")
        check_object("loss", loss, nn.Module, "torch.nn.SmoothL1Loss()")
        self.teacher: Any = teacher
        self.normalization = normalization
        self.head: Any = head
        self.loss = loss
        self.selection = selection
        self.weight = weight
        self.shared: dict[str, str] = {}
        self.run: Any = TeacherRun(self.teacher, [selection])

    def forward(self, images: Tensor, tokens: Tokens, mask: Mask) -> Tensor:
        """[b 3 H W] in [0, 1], the student's tokens, the hidden patches -> the weighted loss of this term, []"""
        selected = self.select(mask)
        with torch.no_grad():
            target = self.normalization(self.run(images, mask.grid_size, self.selection))  # N(T(x))
        prediction = self.head(tokens, mask, selected)  # H(S(M(x)))
        return self.weight * self.loss(prediction, selected.of(target))  # L

    def select(self, mask: Mask) -> Selection:
        """Chooses what counts in the loss."""
        return selected_by(self.selection, mask)

    def build(self, student: Student, earlier: Mapping[str, "Term"], name: str) -> None:
        """Makes the head, and ties the teacher to the student; what another term owns stays with that one.

        Raises:
            ValueError: no earlier term has that name, or the parts do not go together.
        """
        for letter in ("teacher", "head"):
            of = getattr(self, letter)
            if isinstance(of, str):
                if of not in earlier:
                    raise UserError(
                        f"model.terms.{name}.{letter} is {of!r}, but the terms before it are {', '.join(earlier)}: name one of "
                        f"these, or give a {letter} of its own"
                    )
                self.shared[letter] = of
                delattr(self, letter)
        self.share(earlier)
        if "teacher" not in self.shared:
            attach(self.teacher, student, f"model.terms.{name}.teacher")
        if "head" not in self.shared:
            heads = {other: term.head for other, term in earlier.items()}
            self.head = built(self.head, student, self.teacher, f"model.terms.{name}.head", heads)
        if "teacher" not in self.shared:
            self.teacher.attach_head(self.head)
            self.teacher.requires_grad_(False).eval()
        elif overrides(self.teacher, "attach_head") and "head" not in self.shared:
            raise UserError(
                f"model.terms.{name}.head: {type(self.teacher).__name__} predicts by the head of the term "
                f"{self.shared['teacher']!r}: name that head too, or give this term a teacher of its own"
            )

    def share(self, terms: Mapping[str, "Term"]) -> None:
        """Takes the parts that other terms own, without becoming their owner."""
        for letter, of in self.shared.items():
            object.__setattr__(self, letter, getattr(terms[of], letter))  # `nn.Module` would register it a second time


class TeacherRun:
    """Runs a teacher once in a step, for all terms that share it.

    Args:
        teacher: T.
        selections: of these terms.
    """

    def __init__(self, teacher: Any, selections: list[Selected]) -> None:
        self.teacher = teacher
        self.selections = selections
        self.left: list[Selected] = []
        self.images: Tensor | None = None
        self.targets: dict[str, Tensor] = {}

    def __call__(self, images: Tensor, grid_size: Grid, selection: Selected) -> Tensor:
        """[b 3 H W] in [0, 1] -> the target of each patch [b h w c], long [b h w]; or of the image [b c]"""
        if images is not self.images or selection not in self.left:
            self.targets = targets_of(self.teacher, images, grid_size, {kind_of(one) for one in self.selections})
            self.images, self.left = images, list(self.selections)
        self.left.remove(selection)
        target = self.targets[kind_of(selection)]
        if not self.left:  # nobody else asks
            self.images, self.targets = None, {}
        return target


def kind_of(selection: Selected) -> str:
    """Returns the kind of target that a selection needs."""
    return "image" if selection == "image" else "patches"


class Watched:
    """Calls a letter and keeps what it gives, for the trial and the pictures."""

    given: Any = None
    failed = True

    def __init__(self, letter: Callable[..., Any]) -> None:
        self.letter = letter

    def __call__(self, *args: Any) -> Any:
        self.given = self.letter(*args)
        self.failed = False
        return self.given


def watched(term: Term) -> Any:
    """Gives a term of the same letters, each of which keeps what it gives: `watched(term).head.given`."""
    seen = Term("", term.normalization, "", term.loss, term.selection, term.weight)
    for letter in ("run", "normalization", "head", "loss", "select"):
        object.__setattr__(seen, letter, Watched(getattr(term, letter)))
    return seen


def selected_by(selection: Selected, mask: Mask) -> Selection:
    """Gives the patches that a selection means, or the whole image."""
    if selection == "masked":
        return mask.predicted
    if selection == "visible":
        return ~mask
    return mask.full() if selection == "all" else WholeImage()


def attach(teacher: TargetGenerator, student: Student, where: str) -> None:
    """Ties a teacher to the student.

    Raises:
        ValueError: it has no `dim`.
    """
    teacher.attach(student)
    if not isinstance(getattr(teacher, "dim", None), int):
        raise UserError(f"{where}: {type(teacher).__name__} has no dim: set it to the number of channels or classes")


def built(
    factory: object, student: Student, teacher: TargetGenerator, where: str, earlier: Mapping[str, Head] = MappingProxyType({})
) -> Head:
    """Makes a head, shows it the heads of earlier terms, and tells the student of the blocks that it asks for.

    Raises:
        ValueError: what is given cannot make a head of a student and a teacher.
    """
    if isinstance(factory, nn.Module):
        name = type(factory).__name__
        raise UserError(
            f"{where} is a {name} object, but it is made here, of student and teacher: give the class {name}, or "
            f"functools.partial({name}, ...) with its arguments"
        )
    if not callable(factory) or (isinstance(factory, type) and not issubclass(factory, Head)):
        given = f"the class {factory.__name__}" if isinstance(factory, type) else repr(factory)
        raise UserError(f"{where} is {given}, but has to be a class of heads, such as unimim.LinearHead")
    head: Any = factory(student, teacher)
    check_object(f"what {where} makes", head, Head, "unimim.LinearHead's")
    head.attach(earlier)
    student.ask(head.student_blocks)
    made: Head = head
    return made


def check_selection(where: str, selection: str) -> None:
    """Refuses an unknown selection.

    Raises:
        ValueError: it is unknown.
    """
    known = get_args(Selected)
    if selection not in known:
        raise UserError(f"{where} is {selection!r}, known are {', '.join(map(repr, known[:-1]))} and {known[-1]!r}")


def overrides(teacher: TargetGenerator, method: str) -> bool:
    """Returns whether a teacher has its own of a method of `TargetGenerator`."""
    return getattr(type(teacher), method) is not getattr(TargetGenerator, method)
