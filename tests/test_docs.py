"""What the documentation says is so: links and anchors exist, commands are understood, public names are documented."""

import ast
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import is_dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import OF_A_TASK, ROOT
from torch import nn
from torch.utils.data import DataLoader

import unimim
from unimim.cli.main import main

DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [*sorted(ROOT.glob("*.md")), *DOCS]
WITH_COMMANDS = [page for page in DOCS if page.name != "cluster.md"]  # whose lines test_launch.py has
FENCED = re.compile(r"^```.*?^```$", re.M | re.S)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_in(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


def anchors_of(page: Path) -> set[str]:
    """Of its headings, by the rule that GitHub and Python-Markdown share for plain words."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", page.read_text()), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", FENCED.sub("", page.read_text()))
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        destination = (page.parent / path).resolve() if path else page
        assert destination.is_relative_to(ROOT), target
        assert destination.exists(), target
        if anchor:
            assert anchor in anchors_of(destination), target


@every_page
def test_the_commands_of_make_exist(page: Path) -> None:
    text = page.read_text()
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ {4}(\S.*)$", text, re.M)]
    for line in code:
        for words in re.findall(r"(?:^|\s)make ([a-z- ]+)", line):
            assert set(words.split()) <= set(targets), line


COMMANDS = [
    line
    for page in WITH_COMMANDS
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.M | re.S)
    for line in block.splitlines()
]


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_every_command_is_understood(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Parsed as it stands, with the page's own mytarget.py in the working directory."""
    (tmp_path / "mytarget.py").write_text(python_in(ROOT / "docs" / "new_target.md")[0])
    (tmp_path / "conf").symlink_to(ROOT / "conf")
    (tmp_path / "outputs" / "pretrain" / "version_0").mkdir(parents=True)
    recipe = ROOT / "conf" / "pretrain" / "maskdistill_vit_base.yaml"
    shutil.copy(recipe, tmp_path / "outputs" / "pretrain" / "version_0" / "config.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    program, *words = shlex.split(command, comments=True)
    assert program == "unimim"
    with pytest.raises(SystemExit) as end:
        main([*words, "--print_config"] if "--print_config" not in words else words)
    assert not end.value.code
    assert OF_A_TASK[words[0]] in capsys.readouterr().out


def test_the_options_named_in_the_text_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Those that stand alone in code, such as `--model.masking.ratio 0.6`, on the recipe of the page's context."""
    fill = {"NAME": "vit_base_patch16_224.dino", "PATH": "weights.pt", "CHECKPOINT": "epoch=0.ckpt"}
    recipe = str(ROOT / "conf" / "pretrain" / "maskdistill_vit_base.yaml")
    several = str(ROOT / "conf" / "pretrain" / "medic_vit_base.yaml")
    finetuning = ["finetune", "fit", "--config", str(ROOT / "conf" / "finetune" / "vit_base.yaml")]
    found = {
        words
        for page in WITH_COMMANDS
        for words in re.findall(r"`(--(?:trainer|model|data)\.?[^`]+)`", FENCED.sub("", page.read_text()))
        if " " in words and "mytarget" not in words and "model.teacher.NAME" not in words and page.name != "recipes.md"
    }
    assert len(found) > 20
    for words in sorted(found):
        given = shlex.split(re.sub("NAME|PATH|CHECKPOINT", lambda match: fill[match[0]], words))
        task = (
            finetuning
            if {"--model.checkpoint", "--model.layer_decay"} & set(given)
            else ["pretrain", "fit", "--config", several if ".terms." in words else recipe]
        )
        with pytest.raises(SystemExit) as end:
            main([*task, *given, *([] if ".help" in words else ["--print_config"])])
        assert not end.value.code, words


def test_the_readmes_examples_are_the_sites() -> None:
    assert python_in(ROOT / "docs" / "index.md")[0] == python_in(ROOT / "README.md")[0]


def test_the_training_step_of_the_page_is_the_one_that_runs() -> None:
    shown = python_in(ROOT / "docs" / "unified_view.md")
    running = (unimim.MaskedImageModeling.training_step, unimim.Term.forward)
    for text, method in zip(shown[:2], running, strict=True):
        assert inspect.cleandoc("\n" + inspect.getsource(method)) == text.strip()


def test_the_data_of_ones_own_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class of docs/data.md gives what pretraining takes."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(python_in(ROOT / "docs" / "data.md")[0], names)
    loader: DataLoader[Any] = names["MyData"]().train_dataloader()
    assert next(iter(loader)).shape == (4, 3, 224, 224)


def test_the_recipes_page_is_what_the_recipes_say() -> None:
    """`make recipes` writes it."""
    sys.path.insert(0, str(ROOT / "docs"))
    import recipes

    page = (ROOT / "docs" / "recipes.md").read_text()
    assert recipes.page_with_recipes(page) == page
    sections = set(re.findall(r"^### (\S+)$", page, re.M))
    assert sections == {
        f"{path.parent.name}/{path.stem}" for folder in recipes.FOLDERS for path in (ROOT / "conf" / folder).glob("*")
    }
    for text in page.split("\n### ")[1:]:
        assert "**Reported**: " in text
        assert "**Ours**: " in text
        assert "```bash\nunimim " in text


def test_table_1_of_the_page_is_the_readmes() -> None:
    """`make table` writes both."""
    sys.path.insert(0, str(ROOT / "docs"))
    import table1

    page = (ROOT / "docs" / "unified_view.md").read_text()
    assert table1.page_with_table(page) == page
    assert page.count("](../conf/pretrain/") == len(table1.recipes())


def test_every_page_is_in_the_sites_menu() -> None:
    listed = re.findall(r"^ +- .*?([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M)
    of_the_root = {"changelog.md", "contributing.md"}
    assert sorted(listed) == sorted([*of_the_root, *(str(page.relative_to(ROOT / "docs")) for page in DOCS)])


def test_every_line_of_the_safety_page_has_a_test() -> None:
    """The last column names tests that exist; only what is trusted has none."""
    text = (ROOT / "docs/safety.md").read_text()
    rows = [row.split(" | ") for row in re.findall(r"^\| (?!what |---)(.+)\|$", text, re.M)]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
        assert named or "weights_only=False" in row[0], row[0]
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), test


# The public API


def test_every_public_name_has_one_place_in_the_docs() -> None:
    placed = [name for page in DOCS for name in re.findall(r"^::: unimim\.(\w+)$", page.read_text(), re.M)]
    assert sorted(placed) == sorted(unimim.__all__)
    overview = (ROOT / "docs" / "api" / "index.md").read_text()
    assert set(re.findall(r"`(\w+)`", overview)) >= set(unimim.__all__)


def documented(docstring: str, section: str) -> set[str]:
    """What stands before the colons in the section of a docstring in Google's style."""
    found = re.search(rf"^{section}:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(docstring), re.M | re.S)
    return set(re.findall(r"^    (\S[^:]*):", found[1], re.M)) if found else set()


@pytest.mark.parametrize("name", unimim.__all__)
def test_a_public_name_says_what_it_takes(name: str) -> None:
    """Each argument has an entry of its own, as the command line's help and the site show it, and none is invented.

    Of a class that has the constructor of another, the other's docstring may say it.
    """
    thing = getattr(unimim, name)
    own = vars(thing).get("__doc__") if inspect.isclass(thing) else thing.__doc__
    assert own, f"{name} has no docstring of its own"
    owner = next(cls for cls in thing.__mro__ if "__init__" in vars(cls)) if inspect.isclass(thing) else thing
    takes_none = owner in (object, nn.Module)
    arguments = set() if takes_none else set(inspect.signature(thing).parameters)
    section = "Attributes" if is_dataclass(thing) else "Args"
    assert (documented(own, section) or documented(owner.__doc__ or "", section)) == arguments


@pytest.mark.parametrize("name", [name for name in unimim.__all__ if inspect.isclass(getattr(unimim, name))])
def test_a_method_says_nothing_of_arguments_that_it_lacks(name: str) -> None:
    for method in vars(getattr(unimim, name)).values():
        if inspect.isfunction(method) and not method.__name__.startswith("_"):
            assert documented(method.__doc__ or "", "Args") <= set(inspect.signature(method).parameters)


LETTERS = [
    name
    for name in unimim.__all__
    if inspect.isclass(thing := getattr(unimim, name)) and issubclass(thing, nn.Module) and "forward" in vars(thing)
]


@pytest.mark.parametrize("name", LETTERS)
def test_a_forward_says_its_shapes(name: str) -> None:
    """In brackets and the letters of interfaces.py, before and behind an arrow."""
    thing = getattr(unimim, name)
    assert re.search(r"\[[^]]*\].* -> .*\[[^]]*\]", f"{thing.__doc__}\n{inspect.getdoc(thing.forward)}")


# Docstrings

NO_SENTENCE = re.compile(
    r"^(About|After|Among|As|At|Before|Behind|Beside|Between|By|For|From|How|If|In|Into|Of|On|Over|Raises|Through|To|Under|What|"
    r"When|Where|Whether|Which|Who|Whose|Why|With|Within|Without|Those)\b"
)


def docstrings_without_a_sentence(source: str) -> list[str]:
    """First lines that start with a preposition or such a word, or are a section alone."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = [ast.get_docstring(node) or "" for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    return [text.split("\n")[0] for text in texts if NO_SENTENCE.match(text)]


SOURCE = ROOT / "src" / "unimim"
# For a time: files whose docstrings are still to be rewritten. Take a file out when it is done.
NOT_YET_REWRITTEN = {
    "caching/files.py",
    "cli/tasks.py",
    "data/batches.py",
    "data/crops.py",
    "data/folder.py",
    "data/listing.py",
    "data/photos.py",
    "data/segmentation_transforms.py",
    "letters/heads.py",
    "letters/initialization.py",
    "letters/interfaces.py",
    "letters/masking.py",
    "letters/students.py",
    "letters/targets/ema.py",
    "letters/targets/features.py",
    "letters/targets/hog.py",
    "letters/targets/pixels.py",
    "pictures/patches.py",
    "samples/scenes.py",
    "tasks/callbacks.py",
    "tasks/finetuning.py",
    "tasks/optim.py",
    "tasks/pretraining.py",
    "tasks/probing.py",
    "tasks/segmentation.py",
    "tasks/upernet.py",
    "training/checkpoints.py",
    "training/faults.py",
    "training/launch.py",
    "training/monitoring.py",
    "training/shards.py",
    "training/waiting.py",
    "weights/checkpoint.py",
    "weights/files.py",
    "weights/fitting.py",
    "weights/models.py",
    "weights/written.py",
}


def test_the_first_line_of_a_docstring_is_a_sentence() -> None:
    """It says what a thing is or does, to a reader of English as a second language."""
    found = {str(path.relative_to(SOURCE)): docstrings_without_a_sentence(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert not {file: lines for file, lines in found.items() if lines and file not in NOT_YET_REWRITTEN}
    assert set(found) >= NOT_YET_REWRITTEN


# The site


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra `docs`, which make install brings")
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    assert "WARNING" not in built.stderr
    pages = sorted((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES)
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?([^\" >]+)", text)
        loaded += re.findall(r"<link[^>]+rel=\"?(?:stylesheet|preconnect|preload|icon)[^>]*href=\"?([^\" >]+)", text)
        assert not [url for url in loaded if url.startswith(("http", "//"))], page
    start = (tmp_path / "site" / "index.html").read_text()
    assert "TMLR 2023" in start
    masking = (tmp_path / "site" / "letters" / "masking.html").read_text()
    assert 'id="unimim.BlockMasking"' in masking
