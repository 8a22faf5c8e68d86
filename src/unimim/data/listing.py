"""Lists the images of a folder: each real folder is read once, and what is passed over is counted and said."""

import os
from collections import Counter, deque
from pathlib import Path

from PIL import Image
from pytorch_lightning.utilities import rank_zero_info

from unimim.data.photos import PHOTOS
from unimim.errors import MissingFileError, UnwritableError
from unimim.printing import printable

NO_PHOTOS = ".nomedia"
"""A file by which a folder tells galleries that its images are no one's photos."""
MAC_COPY = "__MACOSX"
"""The folder in which macOS puts its own notes beside the files of a zip."""
HIDDEN, LISTED, NOWHERE = "hidden", "linked to a folder that is listed already or lies above", "linked to nothing"
NO_MEDIA, UNREADABLE = f"with a file {NO_PHOTOS}", "not readable"
SPECIAL, BESIDE = "neither file nor folder", "beside the class folders"


class Listing:
    """The images in and below folders, and a count of what was passed over, with an example of each reason.

    Links are followed, but a folder is listed once, however many links lead to it: at its own place if that lies within, else
    at the first link. Files and folders whose name begins with a dot are passed over, and macOS's `__MACOSX`; so is a folder
    with a file `.nomedia`, with all that is below it, as galleries do. The pictures that a run has drawn are in one.

    Args:
        root: the folder as it is named to the user.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.image_endings = image_endings()
        self.images = self.folders = 0
        self.passed_over: Counter[str] = Counter()
        self.examples: dict[str, tuple[str, str]] = {}
        self.other_endings: Counter[str] = Counter()

    def below(self, folder: Path) -> list[Path]:
        """Every image in and below a folder, in the order of their paths."""
        seen = folders_above(folder.resolve())
        found: list[str] = []
        inside, links = [str(folder)], deque[str]()
        while inside or links:
            is_link = not inside
            path = links.popleft() if is_link else inside.pop()
            try:
                real = identity(path)
                if real in seen or (is_link and real in folders_above(path)):
                    self.pass_over(LISTED, path)
                    continue
                seen.add(real)
                files, folders, linked = self.entries(path)
            except OSError as error:
                self.pass_over(UNREADABLE, path, f": {error.strerror}")
                continue
            found += files
            self.folders += bool(files)
            inside += reversed(folders)
            links += linked
        self.images += len(found)
        # the order of Paths, which take three times as long to compare
        return [Path(path) for path in sorted(found, key=lambda path: os.path.normcase(path).replace(os.sep, "\0"))]

    def entries(self, folder: str | Path) -> tuple[list[str], list[str], list[str]]:
        """The images, the folders and the links to folders right in a folder; the last two in order.

        Raises:
            OSError: the folder cannot be read.
        """
        files: list[str] = []
        folders: list[str] = []
        links: list[str] = []
        with os.scandir(folder) as scanned:
            entries = list(scanned)
        if any(entry.name == NO_PHOTOS for entry in entries):
            self.pass_over(NO_MEDIA, str(folder))
            return files, folders, links
        for entry in entries:
            name = entry.name
            try:
                is_file = entry.is_file()
                is_folder = not is_file and entry.is_dir()
            except OSError:  # a link to itself, or into a folder that is closed
                is_file = is_folder = False
            dot = name.rfind(".")  # Path.suffix takes four times as long
            ending = name[dot:].lower() if dot >= 0 else "none"
            is_image = is_file and ending in self.image_endings
            if (name.startswith(".") or name == MAC_COPY) and (is_image or is_folder):
                self.pass_over(HIDDEN, entry.path)
            elif is_image:
                files.append(entry.path)
            elif is_folder:
                (links if entry.is_symlink() else folders).append(entry.path)
            elif not is_file:
                self.pass_over(SPECIAL if os.access(entry.path, os.F_OK) else NOWHERE, entry.path)
            elif not name.startswith("."):
                self.other_endings[ending] += 1
        return files, sorted(folders), sorted(links)

    def pass_over(self, reason: str, path: str, why: str = "") -> None:
        """Counts a path that is passed over; the first by name is the example."""
        self.passed_over[reason] += 1
        self.examples[reason] = min((path, why), self.examples.get(reason, (path, why)))

    def __str__(self) -> str:
        folders = f"{self.folders} folder{'' if self.folders == 1 else 's'}"
        over = f"; passed over: {self.what_was_passed_over()}" if self.passed_over or self.other_endings else ""
        return f"{self.images} image{'' if self.images == 1 else 's'} in {folders} of {printable(self.root)}{over}"

    def what_was_passed_over(self) -> str:
        """Its number by reason: `2 hidden (.thumbs, ...), 3 of other endings (.txt 2, .xmp 1)`."""
        reasons = []
        for reason, count in self.passed_over.items():
            path, why = self.examples[reason]
            shown = printable(os.path.relpath(path, self.root)) + why
            reasons.append(f"{count} {reason} ({shown}{', ...' if count > 1 else ''})")
        if self.other_endings:
            endings = sorted(self.other_endings.items(), key=lambda item: (-item[1], item[0]))
            named = [f"{printable(ending)} {count}" for ending, count in endings[:5]] + ["..."] * (len(endings) > 5)
            reasons.append(f"{sum(self.other_endings.values())} of other endings ({', '.join(named)})")
        return ", ".join(reasons)

    def check_found(self, files: list[Path], folder: Path) -> None:
        """
        Raises:
            FileNotFoundError: there are no files; with what was passed over.
        """
        if files:
            return
        over = self.what_was_passed_over()
        raise MissingFileError(
            f"data.root: no image in or below {printable(folder)} (looked for {' '.join(sorted(self.image_endings))}"
            f"{'; passed over: ' if over else ''}{over})"
        )


def image_files(root: Path) -> list[Path]:
    """Every image in and below a folder, in the order of their paths; says how many, and what was passed over (`Listing`).

    Raises:
        FileNotFoundError: there is no such folder, or no image in it.
    """
    if not root.is_dir():
        raise MissingFileError(f"data.root: there is no folder {printable(root)}")
    listing = Listing(root)
    files = listing.below(root)
    listing.check_found(files, root)
    rank_zero_info(str(listing))
    return files


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, in order.

    Raises:
        OSError: the folder cannot be read.
    """
    return classes_of(Listing(root))


def classes_of(listing: Listing) -> list[str]:
    """As `class_folders`, of a listing's root; images beside the folders are passed over."""
    try:
        files, folders, links = listing.entries(listing.root)
    except OSError as error:
        raise UnwritableError(f"data.root: {printable(listing.root)} cannot be read ({error.strerror})") from error
    above = [path for path in links if identity(path) in folders_above(path)]
    for reason, paths in ((BESIDE, files), (LISTED, above)):
        for path in paths:
            listing.pass_over(reason, path)
    return sorted(Path(path).name for path in {*folders, *links} - {*above})


def labelled_files(
    root: Path, classes: list[str], per_class: int | None = None, say: bool = True
) -> tuple[list[Path], list[int]]:
    """The images of each class folder, and their labels; says how many, and what was passed over.

    Args:
        root: the folder of the class folders.
        classes: their names, as of `class_folders`.
        per_class: only so many of each class, the first by name; None takes all.
        say: whether to say so; not of a folder of which it was said.

    Raises:
        FileNotFoundError: a class folder has no image.
        OSError: the folder cannot be read.
    """
    listing = Listing(root)
    files: list[Path] = []
    labels: list[int] = []
    classes_of(listing)
    for label, name in enumerate(classes):
        of_class = listing.below(root / name)
        listing.check_found(of_class, root / name)
        files += of_class[:per_class]
        labels += [label] * len(of_class[:per_class])
    taken = "" if len(files) == listing.images else f" ({len(files)} of them are taken, by data.labels_per_class)"
    if say:
        rank_zero_info(f"{listing}{taken}")
    return files, labels


def image_endings() -> frozenset[str]:
    """The endings of photos that this Pillow reads. (.pfm are maps of floats.)"""
    known = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in known if kind in PHOTOS and kind in Image.OPEN and ending != ".pfm")


def folders_above(path: str | Path) -> set[tuple[int, int]]:
    """The real folders in which a file or a link lies."""
    holder = Path(path).parent.resolve()
    return {identity(folder) for folder in (holder, *holder.parents)}


def identity(folder: str | Path) -> tuple[int, int]:
    """What tells a real folder from all others, by whatever path it is reached."""
    status = Path(folder).stat()
    return status.st_dev, status.st_ino
