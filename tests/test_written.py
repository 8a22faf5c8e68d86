"""Files of the package: whole or not there, readable by whom the umask says, and without the leavings of dead writers."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file
from test_faults import fit
from torch import nn

from unimim import AtomicCheckpointIO, FineTuning, export
from unimim.caching.files import TargetFiles
from unimim.cli.sweep import write
from unimim.weights.written import machine, remove_dead, save_tensors, whole


def dead_process() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture(params=[0o022, 0o027, 0o002])
def mode(request: pytest.FixtureRequest) -> int:
    """Of new files, by the umask that holds in the test."""
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def test_every_file_has_the_mode_of_a_new_one(tmp_path: Path, mode: int) -> None:
    """Targets of a cache, checkpoints, exports and their cards, predictions, results of a sweep."""
    files = TargetFiles(tmp_path / "cache", 4, (2, 2, 3), torch.float32)
    files.write(0, 0, torch.rand(4, 2, 2, 3), torch.rand(4, 3, 2, 2))
    trainer, _ = fit(tiny_model(), torch.rand(2, 3, 32, 32), tmp_path, plugins=[AtomicCheckpointIO()])
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    export(tmp_path / "a.ckpt", tmp_path / "a.safetensors", "safetensors")
    export(tmp_path / "a.ckpt", tmp_path / "a.pth")
    write(tmp_path / "results.json", {})
    predictor = FineTuning.__new__(FineTuning)
    nn.Module.__init__(predictor)
    predictor.classes = ["a", "b"]
    batch = (torch.tensor([[0.9, 0.1]]), torch.tensor([[1, 0]]))
    FineTuning.write_predictions(predictor, [Path("x.png")], [batch], tmp_path / "p.csv", [False])
    written = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    names = ["00000.safetensors", "a.ckpt", "a.pth", "a.pth.md", "a.safetensors", "a.safetensors.md", "p.csv", "results.json"]
    assert sorted(written) == names
    assert {name: oct(found) for name, found in written.items()} == dict.fromkeys(written, oct(mode))


def test_tensors_are_saved_as_safetensors_does(tmp_path: Path) -> None:
    save_tensors({"x": torch.arange(3)}, tmp_path / "x", {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "x")["x"], torch.arange(3))


def test_parts_of_dead_writers_only_are_removed(tmp_path: Path) -> None:
    """A dead process of this machine; one of another, or of a name without one, after a day. A living one's stays."""
    dead = dead_process()
    names = {
        f"a.ckpt.{machine()}-{dead}.part": (0, True),
        f"a.ckpt.{machine()}-{os.getppid()}.part": (0, False),
        f"a.ckpt.elsewhere_1-{dead}.part": (0, False),
        f"b.ckpt.elsewhere_1-{dead}.part": (2 * 86_400, True),
        "a.ckpt.part": (0, False),  # as version 0.1.0 named them
        "b.ckpt.part": (2 * 86_400, True),
        f"00001.safetensors.{'0' * 32}.part": (2 * 86_400, True),
        "film.mp4.part": (2 * 86_400, False),  # another program's
        f"film.{dead}.part": (2 * 86_400, False),
    }
    for name, (seconds, _) in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - seconds,) * 2)
    folder = tmp_path / f"teacher.{machine()}-{dead}.part"
    folder.mkdir()
    (folder / "made_with.json").touch()
    (tmp_path / "backup.part").mkdir()
    os.utime(tmp_path / "backup.part", (0, 0))
    remove_dead(tmp_path.glob("*.part"))
    (tmp_path / "backup.part").rmdir()
    assert {path.name for path in tmp_path.iterdir()} == {name for name, (_, is_dead) in names.items() if not is_dead}


def test_a_file_is_written_under_a_name_of_its_own(tmp_path: Path) -> None:
    """Its machine is the one that was started so; two threads of a process have two parts."""
    with whole(tmp_path / "new" / "a[1].txt") as part, whole(tmp_path / "new" / "a[1].txt") as other:
        assert part != other
        for path in (part, other):
            assert re.fullmatch(rf"a\[1\]\.txt\.\d+\.{machine()}-{os.getpid()}\.part", path.name)
        part.write_text("0")
        other.write_text("1")
    boot = Path("/proc/sys/kernel/random/boot_id")
    assert machine().startswith(boot.read_text()[:8] if boot.exists() else "")
    with pytest.raises(FileNotFoundError), whole(tmp_path / "new" / "a[1].txt") as part:
        part.write_text(Path("none").read_text())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a[1].txt"]
    assert (tmp_path / "new" / "a[1].txt").read_text() == "0"
