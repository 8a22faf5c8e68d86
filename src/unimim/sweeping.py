"""`unimim sweep FILE`: every trial of a W&B sweep file, one after the other in this process, without an account."""

import argparse
import gc
import hashlib
import itertools
import json
import math
import random
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

from unimim.commands import FREE, PretrainCLI, closest, in_one_line, pretrain, settings
from unimim.errors import MissingFileError, UserError
from unimim.faults import INTERRUPTED, StopOnSignal, status_after
from unimim.files import read_file
from unimim.lightning import parser_of
from unimim.pretraining import MaskedImageModeling
from unimim.randomness import derived_seed
from unimim.written import naming, remove_dead, whole

OUTPUT = Path("outputs/sweeps")
NO_ROOM = "make room, or run it from another folder; the same command goes on"
FIRST = ("fit", "--trainer.devices=1", "--pictures=false")
"""Of each trial's words: no pictures unless a parameter or option asks for them."""
SEED = "seed_everything"
RATIO = "model.masking.ratio"
KEYS = ("name", "description", "entity", "project", "program", "command", "method", "metric", "parameters", "run_cap")
"""Of a sweep file. W&B has more, which need its server."""
METHODS = ("grid", "random")
GOALS = ("minimize", "maximize")
DISTRIBUTIONS = ("uniform", "int_uniform", "log_uniform_values")
"""Those of `min` and `max` that are drawn here; W&B has more."""
PROGRAM = "unimim"
COMMAND = ("${env}", "${interpreter}", "${program}", "${args}", "-m", PROGRAM, "pretrain", "fit")
"""The words with which W&B's agent may start a trial. Beside them only the logger is its own."""


@dataclass
class Trial:
    """One command `unimim pretrain fit` of a sweep.

    `point` is what the sweep varies, `key` stands for the whole configuration, `own_folder` says whether the run can be placed
    in a folder of the sweep. `metrics` are all that it logged, as last measured, None while it is not finished; `seconds` are
    None where it was interrupted; `error` is the line with which it failed, or says that it lacks the sweep's metric.
    """

    point: dict[str, Any]
    words: list[str]
    key: str
    own_folder: bool
    metrics: dict[str, float] | None = None
    seconds: float | None = None
    error: str | None = None


def sweep(args: list[str]) -> dict[str, Any]:
    """Runs `unimim sweep ARGS` and returns what it writes to results.json."""
    return in_one_line(lambda: run_sweep(args))


class Words(argparse.ArgumentParser):
    """The options of a sweep, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"unimim: error: {message}")


def run_sweep(args: list[str]) -> dict[str, Any]:
    """Runs what is not finished of a sweep; writes results.json, figure.png and a table.

    Raises:
        ValueError: the sweep file or an option is none that can be run; no finished trial has logged the sweep's metric.
        FileNotFoundError: there is no such file.
    """
    parser = Words(
        prog="unimim sweep",
        allow_abbrev=False,
        description="Runs the trials of a W&B sweep file one after the other, without an account. Trials that are finished are "
        "not repeated. All other options are those of unimim pretrain fit, for every trial.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="such as conf/sweeps/mask_ratio.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", help=f"every point of the sweep with each of them ({SEED})")
    options, overrides = parser.parse_known_args(args)
    content = read_sweep(options.file)
    folder, metric = OUTPUT / options.file.stem, content["metric"]["name"]
    trials = trials_of(content, options.seeds, overrides)
    remove_dead([*folder.glob("*.part"), *folder.glob("trials/*.part")])
    kept = number_finished(trials, folder)
    print(f"{options.file}: {len(trials)} trials, {kept} of them finished before", flush=True)
    for trial in trials:
        if file_of(trial, folder).is_file():
            trial.metrics, trial.seconds = finished_before(file_of(trial, folder))
    for number, trial in enumerate(trials, 1):
        if trial.metrics is None:
            print(f"\ntrial {number} of {len(trials)}: {told(trial.point)}", flush=True)
            print(shlex.join(["unimim", "pretrain", *trial.words]), flush=True)
            try:
                run(trial, folder)
            except (SystemExit, KeyboardInterrupt) as end:  # a signal or Ctrl-C, which a training has heeded
                kept = number_finished(trials, folder)
                print(f"the sweep ends here, {kept} of {len(trials)} trials are finished; the same command goes on", flush=True)
                sys.exit(end.code if isinstance(end, SystemExit) else INTERRUPTED)
        check_metric(trial, trials, metric)
        if trial.metrics is not None and trial.error is None:
            print(f"trial {number} of {len(trials)}: {metric} {shown(trial.metrics[metric])}", flush=True)
    results = summarize(options.file.stem, content["metric"], trials)
    write(folder / "results.json", results)
    draw(results, folder / "figure.png")
    print(f"\n{table(results)}\n\n{folder / 'results.json'}\n{folder / 'figure.png'}", flush=True)
    if failed := sum(trial.error is not None for trial in trials):
        sys.exit(
            f"unimim: error: {failed} of {len(trials)} trials failed, see the table; the same command runs the unfinished again"
        )
    return results


# The file


def read_sweep(path: Path) -> dict[str, Any]:
    """A sweep file, looked through.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no sweep, or none that can be run here.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no sweep file {path}; conf/sweeps/mask_ratio.yaml is one")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    keys = content if isinstance(content, dict) else {}
    if missing := [key for key in ("method", "metric", "parameters") if key not in keys]:
        raise UserError(f"{path} is no sweep: it has no {missing[0]}; a sweep has method, metric and parameters")
    for key in keys:
        if key not in KEYS:
            near, known = closest(str(key), list(KEYS)), ", ".join(KEYS)
            raise UserError(f"{path}: unimim sweep does not know {key!r}.{near} Known: {known}")
    method, metric, parameters = (content[key] for key in ("method", "metric", "parameters"))
    if method not in METHODS:
        raise UserError(
            f"{path}: method is {method!r}.{closest(str(method), list(METHODS))} unimim sweep runs grid and random; bayes "
            f"needs W&B's server (wandb sweep {path})"
        )
    named = isinstance(metric, dict) and isinstance(metric.get("name"), str)
    if not named or not set(metric) <= {"name", "goal"} or metric.get("goal", GOALS[0]) not in GOALS:
        raise UserError(f"{path}: metric is {metric!r}, but it has a name, such as val/knn, and a goal, minimize or maximize")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path}: parameters is {parameters!r}: an empty {method}; give {RATIO}: {{values: [0.4, 0.6]}}")
    for name, spec in parameters.items():
        check_parameter(f"{path}: {name}", spec, "grid" if name == SEED else method)
    cap = content.get("run_cap")
    if not (isinstance(cap, int) and cap > 0) and (method == "random" or cap is not None):
        raise UserError(f"{path}: run_cap is {cap!r}, but it is the number of points, at least 1; method random needs it")
    if (program := content.get("program", PROGRAM)) != PROGRAM:
        raise UserError(f"{path}: program is {program!r}, but unimim sweep runs {PROGRAM} pretrain fit: use wandb agent")
    for word in content.get("command") or []:
        if word not in COMMAND and not str(word).startswith("--trainer.logger"):
            raise UserError(
                f"{path}: command has {word!r}, which unimim sweep would run the trials without: give it as a parameter with "
                f"one value"
            )
    return content


def check_parameter(where: str, spec: Any, method: str) -> None:
    """
    Raises:
        ValueError: a parameter has neither value, values, nor (for random) min and max that can be drawn from; or it has null.
    """
    keys = set(spec) - {"distribution"} if isinstance(spec, dict) else set()
    if keys not in ({"value"}, {"values"}, {"min", "max"}):
        raise UserError(f"{where} is {spec!r}, but a parameter has a value, values, or min and max ({RATIO} is one word)")
    if keys == {"values"} and not (isinstance(spec["values"], list) and spec["values"]):
        raise UserError(f"{where} has values {spec['values']!r}: an empty {method}; give a list such as [0.4, 0.6]")
    if None in spec.get("values", [spec.get("value", "")]):
        raise UserError(f'{where} has null, which W&B and unimim sweep write as None in the command: write "null", in quotes')
    if keys == {"min", "max"}:
        check_range(where, spec, method)
    elif (kind := distribution(spec)) not in (None, "constant" if "value" in spec else "categorical"):
        raise UserError(f"{where}: distribution is {kind!r}, which is for min and max: leave it out")


def check_range(where: str, spec: dict[str, Any], method: str) -> None:
    """
    Raises:
        ValueError: there is no drawing between min and max; or W&B would draw otherwise.
    """
    low, high, kind = spec["min"], spec["max"], distribution(spec)
    if method == "grid":
        raise UserError(f"{where} has min and max, which no grid goes through: give values, or method random and a run_cap")
    if {type(low), type(high)} - {int, float} or low > high:
        raise UserError(f"{where} has min {low!r} and max {high!r}, but they are numbers, the lower one first")
    if kind is None:
        raise UserError(f"{where} has min {low} and max {high}: write both as whole numbers, or both with a point")
    if kind not in DISTRIBUTIONS:
        raise UserError(f"{where}: distribution is {kind!r}, and unimim sweep draws from {', '.join(DISTRIBUTIONS)}")
    if kind == "int_uniform" and {type(low), type(high)} != {int}:
        raise UserError(f"{where} has min {low} and max {high}, but int_uniform draws whole numbers between whole numbers")
    if kind == "log_uniform_values" and low <= 0:
        raise UserError(f"{where} has min {low!r}, but log_uniform_values starts above 0")


def distribution(spec: dict[str, Any]) -> Any:
    """As given; else W&B draws whole numbers between two whole ones and any between two others, and None of a mixture."""
    kinds = {type(spec.get("min")), type(spec.get("max"))}
    return spec.get("distribution", "int_uniform" if kinds == {int} else "uniform" if kinds == {float} else None)


# Its trials


def trials_of(content: dict[str, Any], seeds: list[int] | None, overrides: list[str]) -> list[Trial]:
    """Every trial once, its command parsed.

    Args:
        content: of the sweep file.
        seeds: each point is tried with each; None for what the file or the config says.
        overrides: words for every trial, over what the file says; none of them names what the sweep varies.

    Raises:
        ValueError: as said of `overrides`; a trial needs several devices, has no seed of its own, or goes on from a checkpoint;
            two are one command.
        SystemExit: a command is none that can be parsed, in one line.
    """
    parameters = {**content["parameters"], **({SEED: {"values": seeds}} if seeds else {})}
    varied = [name for name, spec in parameters.items() if "value" not in spec]
    named = [word.removeprefix("--").partition("=")[0] for word in overrides if word.startswith("--")]
    if both := [name for name in varied if name in named and name != "config"]:
        raise UserError(f"--{both[0]} is what the sweep varies: leave it out, or take it out of the sweep's parameters")
    trials: dict[str, Trial] = {}
    for point in points(content, parameters):
        # as W&B's agent writes them; one device, because further processes would each run the whole sweep
        words = [*FIRST, *(f"--{name}={value}" for name, value in point.items()), *overrides]
        configuration = parsed(words)
        devices = configuration["trainer"]["devices"]
        if devices not in (1, "1") and not (isinstance(devices, list) and len(devices) == 1):
            raise UserError(f"trainer.devices is {devices}, but a sweep runs in one process: leave it out, or use wandb agent")
        if isinstance(seed := configuration[SEED], bool):  # Lightning leaves that of the trial before, in PL_GLOBAL_SEED
            raise UserError(f"{SEED} is {str(seed).lower()}, but a trial has a seed of its own: give a number (--seeds 0 1)")
        if configuration["ckpt_path"] is not None:
            raise UserError("--ckpt_path is for one run: leave it out, a trial that was interrupted goes on by itself")
        if configuration["cache"] is not None:
            configuration["cache"] = cache_of(configuration)
            words.append(f"--cache={configuration['cache']}")
        chosen = {name: value for name, value in point.items() if name in varied}
        logger = configuration["trainer"]["logger"]
        own_folder = isinstance(logger, dict) and logger["class_path"].rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger")
        trial = Trial(chosen, words, digest(configuration), own_folder)
        if (same := trials.setdefault(trial.key, trial)).point != chosen:
            raise UserError(
                f"({told(same.point)}) and ({told(chosen)}) are the same command in the end: an option decides what the sweep "
                f"varies, or two of its values are one"
            )
    return list(trials.values())


def digest(configuration: dict[str, Any]) -> str:
    """Sixteen digits that stand for plain data."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def cache_of(configuration: dict[str, Any]) -> str:
    """A folder in that of `--cache` for each teacher, student and data: trials that differ in none share the targets.

    Of the student only its grid and image size count, but which of its arguments they come from is its own affair.
    """
    model, data = configuration["model"], configuration["data"]
    of_images = {name: value for name, value in data.get("init_args", {}).items() if name not in FREE["data"]}
    made_with = digest({"teacher": model["teacher"], "student": model["student"], "data": [data["class_path"], of_images]})
    return f"{configuration['cache']}/{model['teacher']['class_path'].rpartition('.')[2]}-{made_with}"


def points(content: dict[str, Any], parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """What the parameters are in each trial. `run_cap` counts points; each is there with every seed.

    The draws of method random depend on their number and the parameter's name alone: the same on every call, and with a higher
    `run_cap` the first are as before.
    """
    listed = {name: [spec["value"]] if "value" in spec else spec.get("values") for name, spec in parameters.items()}
    seeds = listed.pop(SEED, None)
    cap: Any = content.get("run_cap")
    if content["method"] == "grid":
        chosen = [dict(zip(listed, values, strict=True)) for values in itertools.product(*listed.values())][:cap]
    else:
        chosen = [
            {name: draw_from(parameters[name], values, random.Random(derived_seed(name, number, seed=0)))
             for name, values in listed.items()}
            for number in range(cap)
        ]  # fmt: skip
    return [{**point, **({} if seed is None else {SEED: seed})} for point in chosen for seed in seeds or [None]]


def draw_from(spec: dict[str, Any], values: list[Any] | None, generator: random.Random) -> Any:
    """One of the values, or a number between min and max."""
    if values is not None:
        return generator.choice(values)
    low, high, kind = spec["min"], spec["max"], distribution(spec)
    if kind == "int_uniform":
        return generator.randint(low, high)
    if kind == "uniform":
        return generator.uniform(low, high)
    return math.exp(generator.uniform(math.log(low), math.log(high)))


class Configuration(PretrainCLI):
    """`unimim pretrain ARGS`, parsed and not run."""

    def _set_seed(self) -> None:
        """Nothing is drawn."""

    def before_instantiate_classes(self) -> None:
        """Nothing is made."""

    def instantiate_classes(self) -> None:
        """Nothing is made."""

    def run_subcommand(self, run: Callable[[], None]) -> None:
        """Nothing is run."""


def parsed(words: list[str]) -> dict[str, Any]:
    """The whole configuration of `unimim pretrain WORDS`, as plain data.

    Raises:
        SystemExit: it is none, in one line.
    """
    cli = in_one_line(lambda: Configuration(MaskedImageModeling, **settings("pretrain"), args=words))
    return yaml.safe_load(parser_of(cli, "fit").dump(cli.config.fit, skip_none=False))


def told(point: dict[str, Any]) -> str:
    """As a person reads it."""
    return ", ".join(f"{name} {shown(value)}" for name, value in point.items())


def shown(value: Any) -> str:
    """A value in a table: of a yaml its name, of a number four digits."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).stem if isinstance(value, str) and value.endswith((".yaml", ".yml")) else str(value)


# Running them


def file_of(trial: Trial, folder: Path) -> Path:
    """Where a finished trial is kept."""
    return folder / "trials" / f"{trial.key}.json"


def finished_before(path: Path) -> tuple[dict[str, float], float | None]:
    """The metrics and seconds of a trial that was finished.

    Raises:
        ValueError: its file is damaged.
    """
    try:
        content = json.loads(path.read_text())
        return {str(name): float(value) for name, value in content["metrics"].items()}, content["seconds"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete it, and the same command runs this trial again") from error


def number_finished(trials: list[Trial], folder: Path) -> int:
    """How many trials are kept."""
    return sum(file_of(trial, folder).is_file() for trial in trials)


def run(trial: Trial, folder: Path) -> None:
    """Runs a trial, and writes its file if it comes to its end; one that was interrupted goes on from its checkpoint.

    By a mistake or a bug it fails, and `error` says of what.

    Raises:
        SystemExit: a signal or Ctrl-C ends the sweep.
    """
    gc.collect()  # the networks of the trial before
    runs = folder / "runs"
    resumed = trial.own_folder and (runs / trial.key).is_dir()
    placed = [f"--trainer.logger.save_dir={runs}", f"--trainer.logger.name={trial.key}"] if trial.own_folder else []
    start, finished = time.perf_counter(), False
    try:
        cli = pretrain([*trial.words, *placed, *(["--resume=auto"] if resumed else [])])
        finished = True
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        trial.error = end.code.removeprefix("unimim: error: ")
        print(f"this trial failed: {trial.error}", flush=True)
        return
    except Exception as error:
        traceback.print_exc()
        trial.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return
    finally:
        if (wandb := sys.modules.get("wandb")) and wandb.run:  # else the next trial's logger would go on with this run
            wandb.finish(exit_code=int(not finished))
    trial.seconds = None if resumed else round(time.perf_counter() - start, 1)
    trainer: Any = cli.trainer
    trial.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if resumed and (path := cli.config.fit.ckpt_path):  # one that was killed behind its last step measures nothing more
        trial.metrics = {**read_file(path)["metrics"], **trial.metrics}
    write(file_of(trial, folder), asdict(trial))
    for callback in trainer.callbacks:
        if isinstance(callback, StopOnSignal) and callback.received:  # by a signal that came behind the last step
            sys.exit(*(status_after(callback.received) or [0]))


def check_metric(trial: Trial, trials: list[Trial], name: str) -> None:
    """Of a finished trial that has no such metric, `error` says so.

    Raises:
        ValueError: no finished trial has it, so that it may be a typo.
    """
    if trial.metrics is None or name in trial.metrics:
        return
    known = list(trial.metrics)
    if not any(name in other.metrics for other in trials if other.metrics is not None):
        raise UserError(
            f"metric.name is {name!r}, which no trial has logged.{closest(name, known)} Known: {', '.join(known)} (val/knn "
            f"needs the parameter trainer.callbacks: {{value: unimim.KNNCallback}})"
        )
    trial.error = f"it has not logged {name}, but {', '.join(known)}"
    print(f"this trial failed: {trial.error}", flush=True)


def write(path: Path, content: Any) -> None:
    """JSON, whole or not at all; of several writers each leaves a whole file.

    Raises:
        OSError: the disk is full, or cannot be written.
    """
    with naming(path, NO_ROOM), whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


# What came out


def summarize(name: str, metric: dict[str, Any], trials: list[Trial]) -> dict[str, Any]:
    """The trials, and as points the means over their seeds, with half the distance between lowest and highest as spread."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        point = {key: value for key, value in trial.point.items() if key != SEED}
        groups.setdefault(json.dumps(point), []).append(trial)
    rows = []
    for point_text, group in groups.items():
        finished = [trial for trial in group if trial.metrics is not None]
        values = [trial.metrics[metric["name"]] for trial in finished if trial.metrics and metric["name"] in trial.metrics]
        seconds = [trial.seconds for trial in finished if trial.seconds is not None]
        rows.append(
            {
                "point": json.loads(point_text),
                "mean": statistics.mean(values) if values else None,
                "spread": (max(values) - min(values)) / 2 if values else None,
                "values": values,
                "seconds": statistics.mean(seconds) if seconds else None,
                "errors": list(dict.fromkeys(trial.error for trial in group if trial.error)),
                "failed": sum(trial.error is not None for trial in group),
            }
        )
    return {"name": name, "metric": metric, "points": rows, "trials": [asdict(trial) for trial in trials]}


def table(results: dict[str, Any]) -> str:
    """In Markdown: a row a point, the best mean in bold."""
    metric, rows = results["metric"], results["points"]
    names = list(rows[0]["point"])
    better = max if metric.get("goal", GOALS[0]) == "maximize" else min
    best = better((row["mean"] for row in rows if row["mean"] is not None), default=None)
    lines = [f"| {' | '.join([*names, metric['name'], 'seeds', 'seconds'])} |", "|---" * (len(names) + 3) + "|"]
    for row in rows:
        cells = [shown(row["point"][name]) for name in names]
        reached = ""
        if row["mean"] is not None:
            reached = f"**{row['mean']:.4f}**" if row["mean"] == best else f"{row['mean']:.4f}"
            reached += f" ± {row['spread']:.4f}" if len(row["values"]) > 1 else ""
        if row["failed"]:
            of = len(row["values"]) + row["failed"]
            reached = f"{reached} {row['failed']} of {of} failed: {'; '.join(row['errors'])}".strip().replace("|", "\\|")
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append(f"| {' | '.join([*cells, reached, str(len(row['values'])), seconds])} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """The metric against the ratio, or else the first number that varies: a line for each choice of the rest.

    A dot is a trial, a bar goes from the lowest to the highest seed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in results["points"] if row["values"]]
    names = list(results["points"][0]["point"])
    numeric = [name for name in names if all(isinstance(row["point"][name], (int, float)) for row in rows)]
    x = RATIO if RATIO in numeric else next(iter(numeric or names), "")
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault(told({name: value for name, value in row["point"].items() if name != x}), []).append(row)
    for label, line in lines.items():
        ordered = sorted(line, key=lambda row: row["point"][x]) if x in numeric else line
        places = [row["point"][x] if x in numeric else shown(row["point"].get(x, "")) for row in ordered]
        bars = axes.errorbar(
            places,
            [row["mean"] for row in ordered],
            ([row["mean"] - min(row["values"]) for row in ordered], [max(row["values"]) - row["mean"] for row in ordered]),
            marker="o",
            capsize=3,
            label=label,
        )
        dots = [(place, value) for place, row in zip(places, ordered, strict=True) for value in row["values"]]
        across, up = [place for place, _ in dots], [value for _, value in dots]
        axes.scatter(across, up, s=12, color=bars[0].get_color(), alpha=0.5, linewidths=0)
    axes.set(xlabel=x, ylabel=results["metric"]["name"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(frameon=False)
    with naming(path, NO_ROOM):
        path.with_name(".nomedia").touch()  # so that a folder of photos may have runs in it, whose figures no one trains on
        with whole(path) as part, part.open("wb") as file:
            figure.savefig(file, dpi=110, format="png")
