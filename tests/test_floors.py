"""An import points only to a lower floor, and files of one floor do not import each other (DESIGN: floors)."""

import ast
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT

import unimim

SOURCE = ROOT / "src" / "unimim"
FLOORS = {
    "errors": 0,
    "lightning": 0,
    "backbones": 1,
    "files": 1,
    "layouts": 1,
    "batches": 1,
    "knn": 1,
    "mask": 1,
    "tokens": 1.5,
    "pictures": 1,
    "cpu": 1,
    "written": 1,
    "monitoring": 2,
    "interfaces": 2,
    "printing": 1,
    "randomness": 2,
    "saving": 2,
    "target_files": 2,
    "waiting": 2,
    "positions": 2.5,
    "fitting": 2.5,
    "initialization": 2.75,
    "masking": 3,
    "targets": 3,
    "normalizations": 3,
    "students": 3,
    "heads": 3,
    "upernet": 3,
    "overlays": 3,
    "losses": 3,
    "term": 3,
    "trial": 3.5,
    "launching": 3,
    "optim": 3,
    "sharding": 3,
    "faults": 3,
    "checkpoint": 3,
    "data": 3,
    "efficientnet_lite": 3,
    "task": 3.5,
    "supervised": 3.75,
    "pretraining": 4,
    "finetuning": 4,
    "probing": 4,
    "segmentation": 4,
    "callbacks": 4.5,  # beside the tasks, and of them
    "commands": 5,
    "sweeping": 5.5,  # calls a command for each trial
    "cli": 6,
    "__main__": 7,
}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """The unimim modules that a file imports, wherever in the file, as first names below `unimim`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the package"
            if (node.module or "").startswith("unimim."):
                names.add(node.module.split(".")[1])
            elif node.module == "unimim":
                names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            names.update(alias.name.split(".")[1] for alias in node.names if alias.name.startswith("unimim."))
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    if parts == ("__init__",):  # re-exports
        return
    inside_folder = len(parts) > 1 and parts[-1] == "__init__"
    for name in imported(path):
        if (inside_folder or parts[0] == "data") and name == parts[0]:  # data modules share how files are read
            continue
        assert FLOORS[name] < FLOORS[parts[0]], f"{'/'.join(parts)} imports {name}"


def test_every_file_has_a_floor_and_a_head() -> None:
    for path in FILES:
        parts = path.relative_to(SOURCE).with_suffix("").parts
        assert parts == ("__init__",) or parts[0] in FLOORS
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no sentence at its head"


def test_wandb_and_jsonargparse_stay_on_the_top_floor() -> None:
    for path in FILES:
        if path.stem == "commands":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [m for m in modules if m.split(".")[0] in ("wandb", "jsonargparse") or m == "pytorch_lightning.cli"]


def test_the_public_names_are_written_once_for_people_and_once_for_python() -> None:
    """`__init__` imports lazily; the imports that type checkers read have to say the same."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    for_people = {
        alias.name: node.module.removeprefix("unimim.")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("unimim.")
        for alias in node.names
    }
    assert for_people == unimim.MODULE_OF
    assert all(getattr(unimim, name).__name__ == name for name in unimim.__all__)


def test_every_file_of_the_package_is_in_git() -> None:
    """An ignore rule for `data/` once took `src/unimim/data` with it."""
    ignored = subprocess.run(["git", "check-ignore", *map(str, FILES)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ignored.stdout == ""
