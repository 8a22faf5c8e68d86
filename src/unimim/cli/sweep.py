"""`unimim sweep FILE`: every trial of a W&B sweep file, one after the other in this process, without an account."""

import argparse
import gc
import hashlib
import itertools
import json
import math
import shlex
import statistics
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import yaml  # type: ignore[import-untyped]

from unimim.cli.tasks import FREE, PretrainCLI, in_one_line, pretrain, settings
from unimim.data.sampling import derived_seed
from unimim.errors import UserError
from unimim.lightning import parser_of
from unimim.tasks.pretraining import MaskedImageModeling
from unimim.training.faults import StopOnSignal, status_after
from unimim.weights.files import read_file
from unimim.weights.written import naming, remove_dead, whole

OUTPUT = Path("outputs/sweeps")
NO_ROOM = "make room, or run it from another folder; the same command goes on"
SEED = "seed_everything"
KNOWN = ("method", "metric", "parameters", "run_cap", "name", "description", "entity", "project", "program", "command")
"""The keys that a sweep file may have. W&B has more, which need its server; those after run_cap are for W&B alone."""
DRAWS = {
    "uniform": Random.uniform,
    "int_uniform": Random.randint,
    "log_uniform_values": lambda generator, low, high: math.exp(generator.uniform(math.log(low), math.log(high))),
}
"""W&B's distributions between `min` and `max`."""


@dataclass
class Trial:
    """One command `unimim pretrain fit` of a sweep.

    `point` is what the sweep varies, `key` the hash of the whole configuration. With `own_folder` the run is placed in a folder
    of the sweep, from which it can go on. `metrics` are all that a finished trial logged, as last measured; `seconds` are None
    if it was interrupted; `error` is why it failed, in one line.
    """

    point: dict[str, Any]
    words: list[str]
    key: str
    own_folder: bool
    metrics: dict[str, float] | None = None
    seconds: float | None = None
    error: str | None = None


class Words(argparse.ArgumentParser):
    """Parses the options of a sweep, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        sys.exit(f"unimim: error: {message}")


def sweep(args: list[str]) -> dict[str, Any]:
    """Runs `unimim sweep ARGS` and returns what it writes to results.json."""
    return in_one_line(lambda: run_sweep(args))


def run_sweep(args: list[str]) -> dict[str, Any]:
    """Runs the unfinished trials of a sweep; writes results.json and figure.png, and prints a table.

    Raises:
        ValueError: the sweep file or an option is wrong, or trials have failed.
    """
    parser = Words(
        prog="unimim sweep",
        allow_abbrev=False,
        description="Runs the unfinished trials of a W&B sweep file. All other options are those of unimim pretrain fit.",
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="such as conf/sweeps/mask_ratio.yaml")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help=f"run every point with each of them ({SEED})")
    options, overrides = parser.parse_known_args(args)
    content = read_sweep(options.file)
    trials = trials_of(content, options.seeds, overrides)
    folder, metric = OUTPUT / options.file.stem, content["metric"]["name"]
    remove_dead([*folder.glob("*.part"), *folder.glob("trials/*.part")])
    finished = sum((folder / "trials" / f"{trial.key}.json").is_file() for trial in trials)
    print(f"{options.file}: {len(trials)} trials, {finished} of them finished before", flush=True)
    for number, trial in enumerate(trials, 1):
        print(f"\ntrial {number} of {len(trials)}: {in_words(trial.point)}", flush=True)
        try:
            run(trial, folder)
        except (SystemExit, KeyboardInterrupt):  # a signal or Ctrl-C
            print("the sweep ends here; the same command goes on", flush=True)
            raise
        if trial.metrics is not None and metric not in trial.metrics:
            trial.error = f"it has not logged {metric}, but {', '.join(trial.metrics)}"
        print(f"this trial {f'failed: {trial.error}' if trial.error else 'is finished'}", flush=True)
    results = summarize(options.file.stem, content["metric"], trials)
    write(folder / "results.json", results)
    draw(results, folder / "figure.png")
    print(f"\n{table(results)}\n\n{folder / 'results.json'}\n{folder / 'figure.png'}", flush=True)
    if failed := [f"{in_words(trial.point)}: {trial.error}" for trial in trials if trial.error]:
        print("\nfailed:", *failed, sep="\n", flush=True)
        raise UserError(f"{len(failed)} of {len(trials)} trials failed, see above; the same command runs the unfinished again")
    return results


def read_sweep(path: Path) -> dict[str, Any]:
    """Reads a sweep file and checks what no later step does.

    Raises:
        ValueError: it is not a sweep file, or it needs W&B's server.
    """
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML of a sweep: {' '.join(str(error).split())}") from error
    content = content if isinstance(content, dict) else {}
    if unknown := [key for key in content if key not in KNOWN]:
        raise UserError(f"{path}: unimim sweep does not know {unknown[0]!r}. Known: {', '.join(KNOWN)}")
    method, metric, parameters, cap = (content.get(key) for key in KNOWN[:4])
    if method not in ("grid", "random"):
        raise UserError(f"{path}: method is {method!r}, but it is grid or random (bayes needs W&B's server)")
    goals = ("minimize", "maximize")
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str) or metric.get("goal", goals[0]) not in goals:
        raise UserError(f"{path}: metric is {metric!r}, but it has a name, such as val/knn, and a goal, minimize or maximize")
    if not isinstance(parameters, dict) or not parameters:
        raise UserError(f"{path}: parameters is {parameters!r}, but it is such as model.masking.ratio: {{values: [0.4, 0.6]}}")
    if not (isinstance(cap, int) and cap > 0) and (method == "random" or cap is not None):
        raise UserError(f"{path}: run_cap is {cap!r}, but it is the number of points, at least 1; method random needs it")
    for word in content.get("command") or []:
        if str(word).startswith("--") and not str(word).startswith("--trainer.logger"):
            raise UserError(
                f"{path}: command has {word!r}, which unimim sweep does not read: make it a parameter with one value"
            )
    return content


def points(method: str, parameters: dict[str, Any], cap: int | None) -> list[dict[str, Any]]:
    """Returns what the parameters are at each point of the sweep, at most `cap` points.

    Raises:
        ValueError: a parameter has nothing to choose from.
    """
    columns = []
    for name, spec in parameters.items():
        try:
            column = choices(name, spec, cap if method == "random" else None)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            column = []
        if not isinstance(column, list) or not column:
            raise UserError(
                f"{name} is {spec!r}, but a parameter has a value or a list of values, or, for method random, numbers min and "
                f"max (distribution {', '.join(DRAWS)}); model.masking.ratio is one word"
            )
        columns.append(column)
    rows = itertools.product(*columns) if method == "grid" else zip(*columns, strict=True)
    return [dict(zip(parameters, row, strict=True)) for row in itertools.islice(rows, cap)]


def choices(name: str, spec: dict[str, Any], draws: int | None) -> list[Any]:
    """Returns all values of a parameter, or as many draws from them, or from between its min and max.

    A draw depends only on its number and the parameter's name: it is the same on every call, whatever else the sweep has.
    """
    values: Any = [spec["value"]] if "value" in spec else spec.get("values")
    if draws is None:
        return values
    generators = [Random(derived_seed(name, number, seed=0)) for number in range(draws)]
    if values is not None:
        return [generator.choice(values) for generator in generators]
    low, high = spec["min"], spec["max"]
    default = "int_uniform" if isinstance(low, int) and isinstance(high, int) else "uniform"
    return [DRAWS[spec.get("distribution", default)](generator, low, high) for generator in generators]


def trials_of(content: dict[str, Any], seeds: list[int], overrides: list[str]) -> list[Trial]:
    """Returns every trial once, its command parsed.

    Args:
        content: the sweep file.
        seeds: each point is tried with each of them; none leaves the seed to the file or the config.
        overrides: words for every trial, which count over what the file says.

    Raises:
        ValueError: a trial needs several devices, or two are the same command.
        SystemExit: a command cannot be parsed, in one line.
    """
    parameters = {name: spec for name, spec in content["parameters"].items() if name != SEED or not seeds}
    chosen = points(content["method"], parameters, content.get("run_cap"))
    trials: dict[str, Trial] = {}
    for point, seed in itertools.product(chosen, [{SEED: seed} for seed in seeds] or [{}]):
        options = [f"--{name}={value}" for name, value in {**point, **seed}.items()]  # as W&B's agent writes them
        words = ["fit", "--trainer.devices=1", "--pictures=false", *options, *overrides]
        configuration = parsed(words)
        devices, logger = configuration["trainer"]["devices"], configuration["trainer"]["logger"]
        one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)  # each process would run the sweep
        if not one or configuration["ckpt_path"] is not None:
            raise UserError("a sweep runs each trial from its start and on one device: leave trainer.devices and ckpt_path out")
        if configuration["cache"] is not None:
            configuration["cache"] = cache_of(configuration)
            words.append(f"--cache={configuration['cache']}")
        own_folder = isinstance(logger, dict) and logger["class_path"].rpartition(".")[2] in ("CSVLogger", "TensorBoardLogger")
        varied = {name: value for name, value in point.items() if "value" not in parameters[name]} | seed
        trial = Trial(varied, words, digest(configuration), own_folder)
        if (same := trials.setdefault(trial.key, trial)).point != varied:
            raise UserError(
                f"({in_words(same.point)}) and ({in_words(varied)}) are the same command in the end: an option decides what "
                f"the sweep varies, or two of its values are one"
            )
    return list(trials.values())


class Configuration(PretrainCLI):
    """Parses `unimim pretrain ARGS`, and neither makes nor runs anything."""

    def nothing(self, *args: Any, **kwargs: Any) -> None:
        """Replaces what Lightning's CLI does once it has parsed."""

    _set_seed = before_instantiate_classes = instantiate_classes = _run_subcommand = nothing


def parsed(words: list[str]) -> dict[str, Any]:
    """Returns the whole configuration of `unimim pretrain WORDS`, as plain data; ends in one line if there is none."""
    cli = in_one_line(lambda: Configuration(MaskedImageModeling, **settings("pretrain"), args=words))
    return yaml.safe_load(parser_of(cli, "fit").dump(cli.config.fit, skip_none=False))


def digest(configuration: dict[str, Any]) -> str:
    """Returns sixteen digits that stand for plain data."""
    return hashlib.sha256(json.dumps(configuration, sort_keys=True).encode()).hexdigest()[:16]


def cache_of(configuration: dict[str, Any]) -> str:
    """Returns a folder in that of `--cache` for each teacher, student and data: trials that differ in none share the targets.

    The student counts because its grid and image size do, and only its class knows from which arguments they come.
    """
    model, data = configuration["model"], configuration["data"]
    of_images = {name: value for name, value in data.get("init_args", {}).items() if name not in FREE["data"]}
    made_with = digest({"teacher": model["teacher"], "student": model["student"], "data": [data["class_path"], of_images]})
    return f"{configuration['cache']}/{model['teacher']['class_path'].rpartition('.')[2]}-{made_with}"


def in_words(point: dict[str, Any]) -> str:
    """Returns a point for a person to read."""
    return ", ".join(f"{name} {short(value)}" for name, value in point.items())


def short(value: Any) -> str:
    """Returns a value for a table: four digits of a number, the name of a yaml."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).stem if isinstance(value, str) and value.endswith((".yaml", ".yml")) else str(value)


def run(trial: Trial, folder: Path) -> None:
    """Runs a trial that has no file yet, and writes the file; an interrupted one goes on from its newest checkpoint.

    A mistake or a bug becomes the trial's `error`; a signal or Ctrl-C raises SystemExit.
    """
    file, runs = folder / "trials" / f"{trial.key}.json", folder / "runs"
    if file.is_file():
        finished = json.loads(file.read_text())
        trial.metrics, trial.seconds = finished["metrics"], finished["seconds"]
        return
    print(shlex.join(["unimim", "pretrain", *trial.words]), flush=True)
    gc.collect()  # the networks of the trial before
    words = list(trial.words)
    if trial.own_folder:
        words += [f"--trainer.logger.save_dir={runs}", f"--trainer.logger.name={trial.key}"]
        words += ["--resume=auto"] if (runs / trial.key).is_dir() else []
    start = time.perf_counter()
    try:
        cli = pretrain(words)
    except SystemExit as end:
        if not isinstance(end.code, str):
            raise
        trial.error = end.code.removeprefix("unimim: error: ")
    except Exception as error:
        traceback.print_exc()
        trial.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if (wandb := sys.modules.get("wandb")) and wandb.run:  # else the next trial's logger would go on with this run
        wandb.finish(exit_code=int(trial.error is not None))
    if trial.error is not None:
        return
    trainer: Any = cli.trainer
    trial.metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    if checkpoint := cli.config.fit.ckpt_path:  # a trial that was killed after its last step measures nothing more
        trial.metrics = {**read_file(checkpoint)["metrics"], **trial.metrics}
    else:
        trial.seconds = round(time.perf_counter() - start, 1)
    write(file, asdict(trial))
    for callback in trainer.callbacks:
        if isinstance(callback, StopOnSignal) and callback.received:  # a signal that came after the last step
            sys.exit(*status_after(callback.received))


def write(path: Path, content: Any) -> None:
    """Writes JSON, whole or not at all: of several writers each leaves a whole file."""
    with naming(path, NO_ROOM), whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def summarize(name: str, metric: dict[str, Any], trials: list[Trial]) -> dict[str, Any]:
    """Returns the trials, and for each point the mean over its seeds and half the distance between lowest and highest."""
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        point = {name: value for name, value in trial.point.items() if name != SEED}
        groups.setdefault(json.dumps(point), []).append(trial)
    rows = []
    for text, group in groups.items():
        values = [trial.metrics[metric["name"]] for trial in group if trial.metrics and metric["name"] in trial.metrics]
        seconds = [trial.seconds for trial in group if trial.seconds is not None]
        rows.append(
            {
                "point": json.loads(text),
                "mean": statistics.mean(values) if values else None,
                "spread": (max(values) - min(values)) / 2 if values else None,
                "values": values,
                "seconds": statistics.mean(seconds) if seconds else None,
            }
        )
    return {"name": name, "metric": metric, "points": rows, "trials": [asdict(trial) for trial in trials]}


def table(results: dict[str, Any]) -> str:
    """Returns a table in Markdown: a row for each point, the best mean in bold."""
    metric, rows = results["metric"], results["points"]
    better = max if metric.get("goal") == "maximize" else min
    best = better((row["mean"] for row in rows if row["values"]), default=None)
    names = [*rows[0]["point"], metric["name"], "seeds", "seconds"]
    lines = [names, ["---"] * len(names)]
    for row in rows:
        bold = "**" if row["mean"] == best else ""
        reached = f"{bold}{row['mean']:.4f}{bold}" if row["values"] else ""
        spread = f" ± {row['spread']:.4f}" if len(row["values"]) > 1 else ""
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lines.append([*map(short, row["point"].values()), reached + spread, str(len(row["values"])), seconds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the metric against the first parameter that is a number, a line for each choice of the others."""
    from matplotlib.figure import Figure

    rows = [row for row in results["points"] if row["values"]]
    names = list(results["points"][0]["point"])
    numeric = [name for name in names if all(isinstance(row["point"][name], (int, float)) for row in rows)]
    x = next(iter(numeric or names), "")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["point"][x]) if numeric else rows:
        lines.setdefault(in_words({name: value for name, value in row["point"].items() if name != x}), []).append(row)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for label, line in lines.items():
        places = [row["point"][x] if numeric else short(row["point"].get(x, "")) for row in line]
        means, spreads = [row["mean"] for row in line], [row["spread"] for row in line]
        axes.errorbar(places, means, spreads, marker="o", capsize=3, label=label)
    axes.set(xlabel=x, ylabel=results["metric"]["name"])
    axes.grid(alpha=0.3)
    if any(lines):
        axes.legend(frameon=False)
    with naming(path, NO_ROOM):
        path.with_name(".nomedia").touch()  # so that a folder of photos may have runs in it, whose figures no one trains on
        with whole(path) as part, part.open("wb") as file:
            figure.savefig(file, dpi=110, format="png")
