"""What the site adds to the Markdown in docs: the files of the repository that pages link to, and links to the API.

Written for the repository, where a page links to `../conf/pretrain/mae_vit_base.yaml` or to the file of a class. On the site
such a file is a page of its own, and the class's name leads to its description.
"""

import ast
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OF_THE_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}
"""Pages of the site that come from the repository's root, or stand for them."""
LINK = re.compile(r"(\[[^\]]*\])\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^```.*?^```$)", re.M | re.S)
LANGUAGES = {".yaml": "yaml", ".py": "python", ".sbatch": "bash", ".sh": "bash", ".cff": "yaml", ".cfg": "ini"}


def public_names() -> set[str]:
    """The names in `unimim.MODULE_OF`, read without importing the package."""
    tree = ast.parse((ROOT / "src" / "unimim" / "__init__.py").read_text())
    values = [node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "MODULE_OF"]
    return set(ast.literal_eval(values[0]))


NAMES = public_names()


def on_files(files: Files, config: Any) -> Files:
    """Adds changelog and contributing, and a page for each file that pages link to and that is none of the site's."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, OF_THE_ROOT[name], content=(ROOT / name).read_text()))
    pages = list(files.documentation_pages())
    while pages:
        page = pages.pop()
        for part in FENCED.split(page.content_string)[::2]:
            for _, target, _ in LINK.findall(part):
                path = target_in_repository(page.src_uri, target)
                uri = place_on_site(path)
                if uri.startswith("files/") and files.get_file_from_path(uri) is None and (ROOT / path).is_file():
                    pages.append(File.generated(config, uri, content=as_page(path)))
                    files.append(pages[-1])
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns the page's links into those of the site, code blocks left alone."""
    parts = FENCED.split(markdown)
    parts[::2] = [LINK.sub(lambda match: site_link(page.file.src_uri, *match.groups()), part) for part in parts[::2]]
    return "".join(parts)


def target_in_repository(src_uri: str, target: str) -> str:
    """Where a link of a page leads, from the repository's root."""
    moved = {page: name for name, page in OF_THE_ROOT.items() if page != "index.md"}
    source = src_uri.removeprefix("files/").removesuffix(".md") if src_uri.startswith("files/") else f"docs/{src_uri}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(moved.get(src_uri, source)), target))


def place_on_site(path: str) -> str:
    """The place on the site of a file of the repository."""
    if path.startswith("docs/") and not path.endswith(".py"):
        return path.removeprefix("docs/")
    return OF_THE_ROOT.get(path, f"files/{path}.md")


def site_link(src_uri: str, text: str, target: str, anchor: str | None) -> str:
    """A Markdown link as the site has it: a class to its description, a file to its page."""
    path = target_in_repository(src_uri, target)
    name = text.strip("[]`")
    if name in NAMES and path.startswith("src/unimim/"):
        return f"{text}[unimim.{name}]"
    anchor = None if path == "README.md" else anchor  # the start page has sections of its own
    return f"{text}({posixpath.relpath(place_on_site(path), posixpath.dirname(src_uri) or '.')}{anchor or ''})"


def as_page(path: str) -> str:
    """A file of the repository in Markdown: a notebook as its cells, any other in one block."""
    text = (ROOT / path).read_text()
    if path.endswith(".ipynb"):
        cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
        shown = [source if kind == "markdown" else f"````python\n{source}\n````" for source, kind in cells]
        return f"*The notebook `{path}`, without its pictures: they are drawn when it runs.*\n\n" + "\n\n".join(shown)
    return f"# {path}\n\n````{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"
