"""Seconds a GB of reading a checkpoint, and of verifying it: our checksum, the CRCs of a zip, beside plain torch.load.

make bench        (python benchmarks/verify.py)        a table, outputs/bench/verify.json
"""

import tempfile
from functools import partial
from pathlib import Path

import torch
from report import in_turn, machine, report

from unimim.weights.files import checksum, read_pickle, save

TENSORS, NUMBERS, REPETITIONS = 200, 2**20, 5


def main() -> None:
    content = {f"blocks.{i}.weight": torch.randn(NUMBERS) for i in range(TENSORS)}
    size = TENSORS * NUMBERS * 4 / 1e9
    with tempfile.TemporaryDirectory() as folder:
        ours, plain = Path(folder, "ours.ckpt"), Path(folder, "plain.pth")
        save({"state_dict": content}, ours)
        torch.save({"state_dict": content}, plain)
        reference = "torch.load (reference), verifies nothing"
        ways = {
            reference: partial(torch.load, plain, map_location="cpu", weights_only=True),
            "our checkpoint, verified and not kept in memory": partial(read_pickle, ours, mmap=True),
            "another's, CRCs of the zip, not kept in memory": partial(read_pickle, plain, mmap=True),
            "our checkpoint, read and verified": partial(read_pickle, ours),
            "the checksum, when it is written": partial(checksum, content),
        }
        seconds = in_turn(ways, REPETITIONS)
    report(
        "verify",
        {name: {"values": [value / size for value in values]} for name, values in seconds.items()},
        of="a checkpoint",
        unit="s/GB",
        setup=f"{TENSORS} tensors, {size:.2f} GB, in the page cache, {REPETITIONS} repetitions in turn after a warm-up",
        machine=machine(),
        reference=reference,
    )


if __name__ == "__main__":
    main()
