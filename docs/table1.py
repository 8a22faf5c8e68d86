"""Table 1 of README and docs/unified_view.md: a row for each recipe of conf/pretrain and each further term, a column a letter.

`make table` writes it from the yamls.
"""

import inspect
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
TORCH = "https://docs.pytorch.org/docs/stable/generated"
START, END = "<!-- table 1 -->\n", "<!-- /table 1 -->"
SAID = {
    "teacher": ["network", "weights", "norm", "project", "bits", "top_blocks", "prototypes"],
    "normalization": ["unbiased", "temperature"],
    "masking": ["ratio", "unit"],
    "student": ["backbone"],
    "loss": ["beta", "weight", "temperature"],
}
"""The arguments that tell one recipe from another, for each letter."""
OURS = ("demo_", "photos")
"""How recipes begin that are of no paper."""


def recipes() -> list[Path]:
    """MaskDistill first, then the others by name, without `OURS`."""
    paths = [path for path in (ROOT / "conf" / "pretrain").glob("*.yaml") if not path.stem.startswith(OURS)]
    return sorted(paths, key=lambda path: (not path.stem.startswith("maskdistill"), path.stem))


def link(class_path: str) -> str:
    """A class's name, linked to its file, or to torch's page."""
    module, _, name = class_path.rpartition(".")
    if module == "torch.nn":
        return f"[`{name}`]({TORCH}/torch.nn.{name}.html)"
    part = getattr(import_module(module), name)
    return f"[`{name}`]({Path(inspect.getfile(part)).relative_to(ROOT)})"


def cell(letter: str, part: Any, selection: str) -> str:
    """One part: its class, and what it is given in this recipe."""
    if isinstance(part, str) and "." not in part:
        return f"that of the {part} term"
    part = {"class_path": part} if isinstance(part, str) else part
    given = part.get("init_args", {})
    said = [f"{name}={given[name]}" for name in SAID.get(letter, []) if given.get(name) is not None]
    said = [f"`{argument.removeprefix('network=').removeprefix('backbone=')}`" for argument in said]
    if letter == "loss" and selection != "masked":
        said.append("on the image" if selection == "image" else f"on {selection} patches")
    return "<br>".join([link(part["class_path"]), *said])


def table() -> str:
    """The whole table in Markdown."""
    head = "| recipe | T teacher | N normalization | M masking | S student | H head | L loss |\n|---|---|---|---|---|---|---|\n"
    rows = []
    for path in recipes():
        model = yaml.safe_load(path.read_text())["model"]
        letters = ("teacher", "normalization", "masking", "student", "head", "loss")
        cells = [cell(letter, model[letter], model["selection"]) for letter in letters]
        rows.append(f"| {' | '.join([f'[{path.stem}]({path.relative_to(ROOT)})', *cells])} |\n")
        for name, term in model.get("terms", {}).items():
            own = {letter: cell(letter, term[letter], term["selection"]) for letter in letters if letter in term}
            rows.append(f"| {' | '.join([f'+ {name}', *(own.get(letter, '') for letter in letters)])} |\n")
    return head + "".join(rows)


def readme_with_table(text: str) -> str:
    """The README's text with the table between its marks."""
    return re.sub(f"{START}.*?{END}", lambda _: START + table() + END, text, flags=re.S)


def page_with_table(text: str) -> str:
    """The text of docs/unified_view.md with the table between its marks, its links from there."""
    rows = re.sub(r"\]\((?!http)", "](../", table())
    return re.sub(f"{START}.*?{END}", lambda _: START + rows + END, text, flags=re.S)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(readme_with_table(readme.read_text()))
    page = ROOT / "docs" / "unified_view.md"
    page.write_text(page_with_table(page.read_text()))
    print(f"Table 1: {len(recipes())} recipes")
