"""docs/recipes.md: what each recipe of conf says of itself: reported numbers, sources, command. `make recipes` writes it.

The tables of initial weights at its end are those of initial_weights.py.
"""

import re
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "recipes.md"
START, END = "<!-- recipes -->\n", "<!-- /recipes -->"
FOLDERS = {"pretrain": "Pretraining", "finetune": "Fine-tuning", "probe": "Probes", "segment": "Segmentation"}
NAMES = "Reported|Ours|Fine-tuning|Segmentation|Source|deviation|open"
MARKS = re.compile(rf"(?<=[.)]) (?=(?:{NAMES}): |Command[ :])")


def header(path: Path) -> list[str]:
    """The comment lines before the first key, without their sign."""
    lines = path.read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [line.removeprefix("# ") for line in lines[:first]]


def section(path: Path) -> str:
    """One recipe: its header, in which indented lines are commands, and a mark such as `Reported:` begins an item."""
    name = f"conf/{path.parent.name}/{path.name}"
    shown = [f"### {path.parent.name}/{path.stem}", f"[{name}](../{name})"]
    for is_command, group in groupby(header(path), lambda line: line.startswith("  ")):
        if is_command:
            joined = re.sub(r" *\\\n", " ", "\n".join(line.strip() for line in group))
            shown.append(f"```bash\n{joined}\n```")
        else:
            text = re.sub(r"\bconf/\w+/\w+\.yaml", r"[\g<0>](../\g<0>)", " ".join(group))
            shown += [re.sub(rf"^({NAMES}|Command)\b", r"**\1**", item) for item in MARKS.split(text)]
    return "\n\n".join(shown) + "\n"


def page_with_recipes(text: str) -> str:
    """The page's text with the recipes between its marks."""
    parts = []
    for folder, name in FOLDERS.items():
        paths = sorted(
            (ROOT / "conf" / folder).glob("*.yaml"),
            key=lambda path: (path.stem.startswith(("demo", "photos", "sample")), path.stem),
        )
        parts += [f"## {name}\n", *map(section, paths)]
    return re.sub(f"{START}.*?{END}", lambda _: START + "\n" + "\n".join(parts) + END, text, flags=re.S)


if __name__ == "__main__":
    from initial_weights import page_with_weights

    PAGE.write_text(page_with_weights(page_with_recipes(PAGE.read_text())))
