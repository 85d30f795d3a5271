"""Configuration files of mergekit-evolve as recipes whose values vary.

Each model has a value of each parameter of the method for every group of `layer_granularity` layers and for
every filter, and one more for what no filter fits. Its optimiser knows no bounds; ours has those below.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from merge.errors import RequestError
from merge.lines import Lines, first_twice
from merge.printing import counted
from merge.search.sections import GenomeSection, GenomeTask
from merge.sections import read_section
from merge.sources.model import read_json, text_config
from merge.sources.opening import locate

OWN = {  # of each model, by method
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
}
OF_ALL = {"slerp": ("t",)}  # of all models together
BOUNDS = {"weight": [0.0, 1.5], "density": [0.05, 1.0], "t": [0.0, 1.0]}
NEGATIVE = [-1.5, 1.5]  # of a weight that may be below 0
KEYS = ("genome", "tasks", "limit", "study", "shuffle")
REFUSED = ("num_fewshot", "random_init", "apply_chat_template", "fewshot_as_multiturn")
ALLOWED = (*KEYS, "dtype", "out_dtype", "name", "output", *REFUSED)


def converted(
    data: Mapping[str, Any], lines: Lines, layers: Callable[[str], int]
) -> dict[str, Any]:
    """The recipe, with its study, that a file with a genome means; raises RecipeError.

    layers(model): how many a model has.
    """
    for key in data:
        if key not in ALLOWED:
            what = f"unknown key {key!r} beside a genome; allowed: {', '.join(ALLOWED)}"
            raise lines.error((key,), what)
        if key in REFUSED and data[key]:
            what = "is not taken over; leave it out, or give the tasks files that say it"
            raise lines.error((key,), f"{key} {what}")
    genome = read_section(GenomeSection, _table(data["genome"], lines), lines, ("genome",))
    _check(genome, lines)
    kept = {key: data[key] for key in ("dtype", "out_dtype", "name", "output") if key in data}
    return _recipe(genome, layers) | kept | {"study": _study(data, lines)}


def _table(value: Any, lines: Lines) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise lines.error(("genome",), "genome must be a table of keys")
    return value


def _check(genome: GenomeSection, lines: Lines) -> None:
    method = genome.merge_method
    if method not in ("linear", "slerp") and genome.base_model is None:
        raise lines.error(("genome",), f"genome: {method} needs base_model")
    if method == "slerp" and len(genome.models) != 2:
        what = f"genome.models has {counted(len(genome.models), 'model')}; slerp merges 2"
        raise lines.error(("genome", "models"), what)
    if genome.normalize and method in ("slerp", "task_arithmetic"):
        what = f"genome.normalize is true; {method} has no weights that could sum to 1"
        raise lines.error(("genome", "normalize"), what)


def _recipe(genome: GenomeSection, layers: Callable[[str], int]) -> dict[str, Any]:
    method, size = genome.merge_method, genome.layer_granularity
    count = layers(genome.models[0]) if size else 0
    groups = -(-count // size) if size else 1
    points = groups if genome.smooth else 1
    entries: list[dict[str, Any]] = [
        {"model": model, **_parameters(OWN.get(method, ()), genome, points)}
        for model in genome.models
    ]
    shared = _parameters(OF_ALL.get(method, ()), genome, points)
    common: dict[str, Any] = {"merge_method": method}
    base = genome.base_model or (genome.models[0] if method == "slerp" else None)
    common |= {"base_model": base} if base else {}
    if genome.tokenizer_source:
        common["tokenizer_source"] = genome.tokenizer_source
    if genome.normalize is not None and method not in OF_ALL:
        common["parameters"] = {"normalize": genome.normalize}
    if groups == 1 or genome.smooth:
        whole = {"parameters": common.pop("parameters", {}) | shared.get("parameters", {})}
        return common | {"models": entries} | (whole if whole["parameters"] else {})
    return common | {
        "slices": {"groups": {"layers": count, "block": size, "models": entries} | shared}
    }


def _parameters(
    names: tuple[str, ...], genome: GenomeSection, points: int
) -> dict[str, dict[str, Any]]:
    """The table of what may vary, empty where nothing may."""
    found = {name: _by_filter(_numbers(name, genome, points), genome) for name in names}
    return {"parameters": found} if found else {}


def _by_filter(numbers: dict[str, Any], genome: GenomeSection) -> Any:
    if not genome.filters:
        return numbers
    rules = [{"filter": each, "value": numbers} for each in genome.filters]
    return [*rules, {"value": numbers}]


def _numbers(name: str, genome: GenomeSection, points: int) -> dict[str, Any]:
    negative = name == "weight" and genome.allow_negative_weights
    bounds = NEGATIVE if negative else BOUNDS[name]
    return {"search": bounds} | ({"points": points} if points > 1 else {})


def _study(data: Mapping[str, Any], lines: Lines) -> dict[str, Any]:
    """The section of that name, with the tasks of the file and their weights."""
    given = data.get("study")
    if given is not None and not isinstance(given, dict):
        raise lines.error(("study",), "study must be a table of keys")
    listed = data.get("tasks")
    if not isinstance(listed, list) or not listed:
        raise lines.error(("tasks",), "tasks must be a list of tasks of lm-eval, {name: ...} each")
    tasks = [
        read_section(GenomeTask, task if isinstance(task, dict) else {"name": task}, lines, ("tasks", i))
        for i, task in enumerate(listed)
    ]  # fmt: skip
    if (twice := first_twice([each.name for each in tasks])) is not None:
        raise lines.error(("tasks",), f"tasks must name each task once; {twice} is there twice")
    study: dict[str, Any] = {
        "tasks": [
            {"task": each.name, "metric": each.metric, "higher_is_better": each.weight > 0}
            for each in tasks
        ]
    }
    if len({abs(each.weight) for each in tasks}) > 1:
        weights = {each.name: abs(each.weight) for each in tasks}
        study["objectives"] = [{"name": "weighted", "tasks": weights}]
    if data.get("limit") is not None:
        study["limit"] = data["limit"]
    return study | (given or {})


def layers_of(model: str, *, beside: Path, offline: bool) -> int:
    """How many layers a model has, as its config.json tells; raises RequestError."""
    from merge.sources import hub

    folder, _ = locate(model, [beside], partial(hub.fetch, offline=offline))
    count = text_config(read_json(folder / "config.json")).get("num_hidden_layers")
    if type(count) is not int or count < 1:
        what = "config.json does not say num_hidden_layers; leave layer_granularity out"
        raise RequestError(f"{model}: {what}")
    return count
