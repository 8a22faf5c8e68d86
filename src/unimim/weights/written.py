"""A file is whole or not there: it is written under a name of its writer, then renamed; what dead writers left is removed."""

import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from unimim.errors import UnwritableError

NUMBERS = count()
"""Tell the parts of one process from each other."""
DAY = 86_400
"""Seconds in which each living writer has changed its file."""


def part_of(path: Path) -> Path:
    """Where this process writes what then gets the name `path`: NAME.NUMBER.MACHINE-PROCESS.part in the same folder."""
    return path.with_name(f"{path.name}.{next(NUMBERS)}.{machine()}-{os.getpid()}.part")


@cache
def machine() -> str:
    """A word for this machine since it was started, in which a process number means one process: also within a container."""
    boot, processes = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    started = boot.read_text()[:8] if boot.exists() else re.sub("[^A-Za-z0-9]", "_", socket.gethostname())
    return f"{started}_{processes.stat().st_ino if processes.exists() else 0}"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A place beside `path` for a file or a folder, which gets that name when it is written; after an error it is removed.

    So of several writers each leaves a whole file. Of folders the first stays, and the others are thrown away.
    """
    part = part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        part.replace(path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


@contextmanager
def naming(what: object, fix: str) -> Iterator[None]:
    """Within it, an error of the disk becomes one line.

    Args:
        what: the file that is written.
        fix: what the user can do.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(f"{what} cannot be written ({error.strerror or error}): {fix}") from error


def save_tensors(content: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A file of safetensors, on the disk, that has the mode of every new file. (`save_file` leaves it to its owner alone.)"""
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(content, path, metadata)
    path.chmod(mode)
    with path.open("rb") as written:
        os.fsync(written.fileno())


def remove_dead(parts: Iterable[Path]) -> None:
    """Removes, of the paths that were found, the parts of dead writers; what no writer of this package names so, stays."""
    for part in list(parts):
        with suppress(OSError):  # another run was faster, it is another user's, or the folder is only to be read
            if is_dead(part):
                shutil.rmtree(part) if part.is_dir() else part.unlink()


def is_dead(part: Path) -> bool:
    """Whether it is a part that no one writes any more.

    Its writer was a process of this machine that has ended; or, on whatever machine, it has not changed for a day. Version
    0.1.0 named them NAME.ckpt.part, and NAME.HEX.part with 32 hexadecimal digits.
    """
    writer = re.search(r"\.(\w+_\d+)-(\d+)\.part$", part.name)
    if writer and writer[1] == machine() and os.name == "posix" and not is_running(int(writer[2])):
        return True
    ours = writer or re.search(r"\.(ckpt|[0-9a-f]{32})\.part$", part.name)
    return bool(ours) and time.time() - part.stat().st_mtime > DAY


def is_running(process: int) -> bool:
    """Whether there is a process of this number."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True
