"""Seconds until Python has imported unimim, and until its command line answers, beside importing torch, timm and Lightning.

make bench        (python benchmarks/start.py)         a table, and outputs/bench/start.json
Each in a process of its own, one after the other in turn, with the files in the machine's page cache.
"""

import statistics
import subprocess
import sys
from functools import partial

from report import in_turn, machine, report

REPETITIONS = 7
REFERENCE = "import torch, timm, pytorch_lightning (reference)"
WAYS = {
    REFERENCE: ["-c", "import torch, timm, pytorch_lightning"],
    "import unimim": ["-c", "import unimim"],
    "from unimim import *": ["-c", "from unimim import *"],  # every public name, and with them all that they import
    "unimim --help": ["-m", "unimim", "--help"],
    "unimim pretrain fit --help": ["-m", "unimim", "pretrain", "fit", "--help"],
}


def run(words: list[str]) -> None:
    """One process, whose output nobody reads."""
    subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    seconds = in_turn({name: partial(run, words) for name, words in WAYS.items()}, REPETITIONS)
    rows = {
        name: {
            "values": values,
            "s more than the reference": statistics.median(
                mine - its for mine, its in zip(values, seconds[REFERENCE], strict=True)
            ),
        }
        for name, values in seconds.items()
    }
    report(
        "start",
        rows,
        of="process",
        unit="s",
        setup=f"{REPETITIONS} repetitions in turn after a warm-up; the difference is the median of those within a turn",
        machine=machine("timm", "pytorch-lightning", "jsonargparse"),
    )


if __name__ == "__main__":
    main()
