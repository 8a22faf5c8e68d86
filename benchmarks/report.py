"""What the benchmarks share: repetitions in turn, the machine, a table of median, min and max, its JSON and its place in docs.

    make bench       (python benchmarks/NAME.py)   a table, and outputs/bench/NAME.json with every repetition
    make bench-docs  (python benchmarks/report.py) puts what lies in outputs/bench into docs/performance.{json,md}

One measurement is one table: one key of docs/performance.json, and in docs/performance.md what stands between
<!-- KEY --> and <!-- /KEY -->.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

OUTPUT = Path("outputs/bench")
DOCUMENT = Path("docs/performance.md")
KEPT = Path("docs/performance.json")


def in_turn(
    ways: Mapping[str, Callable[[], object]], repetitions: int, warmup: int = 1, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each call. All ways run once, then all again: what disturbs the machine meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repetition in range(-warmup, repetitions):
        for name, way in ways.items():
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            if repetition >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: str) -> None:
    """Until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def peak_gib(device: str = "cpu") -> float:
    """The most memory so far: on a CPU of this process, imports included, else what torch took of the device."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status").read_text()  # of Linux; getrusage's is at least that of the process that started this
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kib) / 2**20


def machine(*packages: str, device: str = "cpu") -> str:
    """What is measured on: processor, threads, versions of torch and `packages`, and how memory is kept."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", *packages))
    if device != "cpu":
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}, {versions}"
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    processors = {line.partition(": ")[2] for line in lines if line.startswith("model name")}
    allocator = "" if os.environ.get("MALLOC_MMAP_MAX_") != "0" else ", freed memory kept (MALLOC_MMAP_MAX_=0)"
    allocator += "" if os.environ.get("THP_MEM_ALLOC_ENABLE") != "1" else ", large pages (THP_MEM_ALLOC_ENABLE=1)"
    return f"{', '.join(sorted(processors)) or platform.machine()}, {torch.get_num_threads()} threads, {versions}{allocator}"


def report(
    key: str,
    rows: Mapping[str, Mapping[str, Any]],
    *,
    of: str,
    unit: str,
    setup: str,
    machine: str,
    reference: str | None = None,
) -> None:
    """Prints the table of a measurement, and keeps it as outputs/bench/KEY.json.

    Args:
        key: names the measurement, also in docs.
        rows: what was measured, each with `values`, one of each repetition (none: not measured), and further columns.
        of: what a row is, heads the first column.
        unit: of the values.
        setup: batch, sizes, precision, repetitions: what one has to know beside the machine.
        machine: as `machine` says it.
        reference: the row whose median the others are compared with.
    """
    results = {"machine": machine, "setup": setup, "of": of, "unit": unit, "reference": reference, "rows": rows}
    OUTPUT.mkdir(parents=True, exist_ok=True)
    file = OUTPUT / f"{key}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\n{table(results)}\n\n{file}", flush=True)


def table(results: Mapping[str, Any]) -> str:
    """In Markdown, as docs/performance.md has it."""
    rows, reference = results["rows"], results["reference"]
    more = list(dict.fromkeys(name for row in rows.values() for name in row if name != "values"))
    heads = [results["of"], f"median {results['unit']}", "min", "max", *(["times the reference"] if reference else []), *more]
    lines = [f"{results['machine']}; {results['setup']}.", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, row in rows.items():
        values = row["values"]
        cells = [f(values) for f in (statistics.median, min, max)] if values else [None] * 3
        if reference:
            others = rows[reference]["values"]
            cells.append(statistics.median(values) / statistics.median(others) if values and others else None)
        lines.append(f"| {' | '.join([name, *map(cell, cells), *(cell(row.get(column)) for column in more)])} |")
    return "\n".join(lines)


def cell(value: float | str | None) -> str:
    """A number of three digits, or text; None was not measured."""
    if value is None or isinstance(value, str):
        return "not measured" if value is None else value
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")


def document_with(document: str, kept: Mapping[str, Any]) -> str:
    """The text of docs/performance.md with each measurement between its two marks.

    Raises:
        ValueError: a measurement has no marks there.
    """
    for key, results in kept.items():
        start, end = f"<!-- {key} -->", f"<!-- /{key} -->"
        if start not in document or end not in document:
            raise ValueError(f"{DOCUMENT} has no place for {key}: put {start} and {end} where its table belongs")
        before, _, rest = document.partition(start)
        document = f"{before}{start}\n{table(results)}\n{end}{rest.partition(end)[2]}"
    return document


def main() -> None:
    """The measurements in outputs/bench into docs; those that are not there stay as they are."""
    measured = {file.stem: json.loads(file.read_text()) for file in sorted(OUTPUT.glob("*.json"))}
    kept = json.loads(KEPT.read_text()) | measured
    document = document_with(DOCUMENT.read_text(), kept)
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    DOCUMENT.write_text(document)
    print(f"{', '.join(measured) or 'nothing'} -> {KEPT}, {DOCUMENT}")


if __name__ == "__main__":
    main()
