"""The command line: `unimim TASK SUBCOMMAND`. torch is imported once a task has been chosen, not before."""

import argparse
import difflib
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

TASKS = {
    "pretrain": ("masked image modeling, L( N(T(x)), H(S(M(x))) )", ("fit",)),
    "finetune": ("a pretrained backbone learns to classify", ("fit", "validate", "predict")),
    "segment": ("a pretrained backbone learns to label every pixel, with UperNet", ("fit", "validate", "predict")),
    "probe": ("a linear or attentive probe on the frozen backbone", ("fit", "validate")),
    "knn": ("accuracy of the frozen backbone's nearest neighbours", ()),
    "export": ("a checkpoint's backbone as a file for timm", ()),
    "sweep": ("the trials of a W&B sweep file, without an account", ()),
}
"""What each is, and its subcommands."""

HELP = f"""\
usage: unimim [-h] [--version] TASK [SUBCOMMAND] [options]

Masked image modeling as one equation. Tasks:
{chr(10).join(f"  {name:10} {' | '.join(names):26} {text}" for name, (text, names) in TASKS.items())}

  unimim pretrain fit --config conf/pretrain/maskdistill_vit_base.yaml --data.root FOLDER
  unimim pretrain fit --config ... --model.masking.ratio 0.6 --print_config
  unimim finetune fit --config conf/finetune/vit_base.yaml --model.checkpoint FILE --data.root FOLDER
  unimim pretrain fit --help
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs one command.

    Args:
        args: the words after `unimim`; None takes those of the process.
    """
    if "_ARGCOMPLETE" in os.environ:
        complete()
    words = list(sys.argv[1:] if args is None else args)
    task = words[0] if words else "--help"
    if task in ("-h", "--help"):
        print(HELP, end="")
        return
    if task == "--version":
        print(f"unimim {version('unimim')}")
        return
    if task not in TASKS:
        unknown("task", task, TASKS)
    subcommands = TASKS[task][1]
    if subcommands and len(words) > 1 and not words[1].startswith("-") and words[1] not in subcommands:
        unknown(f"subcommand of {task}", words[1], subcommands)
    here = str(Path.cwd())  # last: a user's own mytarget.MeanColor is found, an einops.py is not taken for the library
    sys.path[:] = [*(path for path in sys.path if path not in ("", here)), here]
    from unimim.cli import sweep as sweeping
    from unimim.cli import tasks as commands

    getattr(sweeping if task == "sweep" else commands, task)(words[1:])


def complete() -> None:
    """Answers argcomplete, with which a shell completes a task or its subcommand, and ends. (Options would take torch.)"""
    import argcomplete

    parser = argparse.ArgumentParser(add_help=False)
    tasks = parser.add_subparsers()
    for name, (_, subcommands) in TASKS.items():
        task = tasks.add_parser(name, add_help=False)
        if subcommands:
            task.add_argument("subcommand", choices=subcommands)
    argcomplete.autocomplete(parser)


def unknown(kind: str, name: str, known: Iterable[str]) -> NoReturn:
    """Ends with one line that names the nearest of the known."""
    near = difflib.get_close_matches(name, known := list(known), n=1, cutoff=0.4)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    sys.exit(f"unimim: error: there is no {kind} {name!r}.{meant} Known: {', '.join(known)}")
