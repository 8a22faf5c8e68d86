"""An import points only to a lower floor, or to a file of its own folder, and never in a circle."""

import ast
import subprocess
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

import unimim

SOURCE = ROOT / "src" / "unimim"
FLOORS = {
    "errors": 0,
    "lightning": 0,
    "printing": 0,
    "shapes": 0,
    "pictures": 1,
    "weights": 1,
    "data": 1,
    "letters": 2,
    "training": 2,
    "samples": 2,
    "caching": 3,
    "tasks": 4,
    "cli": 5,
    "__main__": 6,
}
"""The floor of each folder, and of each file that is in none."""
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = {path: path.relative_to(SOURCE).with_suffix("").parts for path in FILES}
PLACES = {".".join(parts): path for path, parts in NAMES.items()}


def imported(path: Path) -> set[str]:
    """The files of unimim that a file imports, wherever in the file, such as `letters.heads`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports name the package"
            if (node.module or "").split(".")[0] == "unimim":
                module = (node.module or "").removeprefix("unimim").removeprefix(".")
                inside = {f"{module}.{alias.name}".removeprefix(".") for alias in node.names}
                names |= {name if name in PLACES else module for name in inside}
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("unimim.") for alias in node.names if alias.name.startswith("unimim.")}
    return names - {""}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    """To a lower floor, or within a folder."""
    folder, *_ = parts = NAMES[path]
    if parts == ("__init__",):  # re-exports
        return
    for name in imported(path):
        other = name.split(".")[0]
        assert other == folder or FLOORS[other] < FLOORS[folder], f"{'/'.join(parts)} imports {name}"


def test_there_are_few_floors() -> None:
    assert all(isinstance(floor, int) for floor in FLOORS.values())
    assert len(set(FLOORS.values())) <= 7


def test_no_file_imports_itself_by_way_of_others() -> None:
    """The files can be put in an order in which each imports only those before it."""
    graph = {name: imported(path) for name, path in PLACES.items() if name != "__init__"}
    graph = {
        name: {f"{other}.__init__" if f"{other}.__init__" in graph else other for other in others}
        for name, others in graph.items()
    }
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_every_file_has_a_floor_and_a_head() -> None:
    for path in FILES:
        assert NAMES[path] == ("__init__",) or NAMES[path][0] in FLOORS
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no sentence at its head"


def test_wandb_and_jsonargparse_stay_on_the_top_floor() -> None:
    for path in FILES:
        if NAMES[path][0] == "cli":
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
