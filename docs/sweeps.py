"""Table and figure of docs/sweeps.md, as the last sweep of the sample measured them. `make sweep-docs` writes both."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from unimim.cli.sweep import OUTPUT, table, write

PAGE = Path(__file__).with_suffix(".md")
MEASURED = Path(__file__).with_suffix("")
"""The folder beside the page, with results.json and figure.png."""
START, END = "<!-- sweep -->\n", "<!-- /sweep -->"


def page_with(page: str, results: dict[str, Any] | None) -> str:
    """The page's text with the table between its marks; None where nothing was measured."""
    content = "Not measured yet.\n"
    if results is not None:
        seconds = [trial["seconds"] for trial in results["trials"]]
        took = f"Some of the {len(seconds)} trials were interrupted, so their time is unknown."
        if None not in seconds:
            took = f"The {len(seconds)} trials took {sum(seconds) / 60:.0f} minutes."
        content = f"{table(results)}\n\n{took}\n\n![{results['metric']['name']} against the masking ratio](sweeps/figure.png)\n"
    return re.sub(f"{START}.*?{END}", lambda _: START + content + END, page, flags=re.S)


def into_page() -> None:
    """Copies what `make sweep` measured beside the page, and the table into it."""
    finished = OUTPUT / "mask_ratio"
    if not (finished / "results.json").is_file():
        sys.exit(f"there is no {finished / 'results.json'}: make sweep")
    measured = json.loads((finished / "results.json").read_text())
    if any(trial["error"] for trial in measured["trials"]):
        sys.exit(f"some trials in {finished / 'results.json'} have failed: make sweep tries them again")
    write(MEASURED / "results.json", measured)
    shutil.copyfile(finished / "figure.png", MEASURED / "figure.png")
    PAGE.write_text(page_with(PAGE.read_text(), measured))
    print(f"{PAGE}: {len(measured['points'])} points")


if __name__ == "__main__":
    into_page()
