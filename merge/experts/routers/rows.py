"""The rows of routers before any training: even, fixed, random, read off adapters, or off what the base
makes of texts.

A router scores a token's vector x by R x, a row of R for each expert. Rows have length 1, so that no expert
is ahead for its size alone; they are float64 until the end and computed as they are read.

uniform                  0: all experts get the same
weights                  0, and a bias that gives the shares whatever the token
random, uniform_random   drawn, normal or from -1 to 1, by a hash of seed, router, expert and column
arrow                    the direction that an adapter answers to most (arrow.py)
hidden, hidden_last      the vector of a prompt's last token: its mean over positive prompts less that over
                         negative ones
hidden_avg               the same of the mean over all tokens of a prompt
cheap_embed              the same of the mean of the tokens' rows in the embedding: nothing is run
centroids                the mean vector over all tokens of example texts, less its mean over experts: task
                         centroids (arXiv:2601.21795) of what the router will read

Vectors are those that the router will read: the inputs of its module in the base. mergekit-moe, whose modes
these are (hidden, hidden_avg, cheap_embed, random, uniform_random), takes the inputs of the layer, before
its norms and its attention, and means over padding as well; it leaves random rows as long as they come.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from merge.adapters.run import BLAS
from merge.anatomy import layer_of, vocabulary_tensors
from merge.blas import Matrix
from merge.errors import PlanError
from merge.experts.assembling import Ground
from merge.experts.assembly import Expert, Factors, Routing, Site
from merge.experts.routers.arrow import direction_bytes, input_direction
from merge.experts.routers.reading import Asked, Inputs
from merge.experts.routing import example_files
from merge.experts.sections import FROM_PROMPTS, FROM_TEXTS
from merge.numerics import Counter, normal, random_key
from merge.plan import Step
from merge.sources import Source, TensorInfo
from merge.tokens.vocabulary import SLOW, TOKENIZER

Row = Callable[[int], Matrix]  # an expert's number -> its row [cols] float64, of any length
Adapted = Mapping[str, Mapping[int, Factors]]  # by tensor of a site and number of an expert

NEVER = -1e4  # score of an expert whose share is 0, at temperature 1: e**NEVER is 0
ROW_BYTES = 8 * 8  # of one column while a row is made
STATISTICS = {
    "hidden": "last",
    "hidden_last": "last",
    "hidden_avg": "mean",
    "cheap_embed": "embedding",
    "centroids": "tokens",
}


def router_source(ground: Ground, sites: Sequence[Site], adapted: Adapted) -> Source:
    """F32 tensors: `tensor` [experts, cols] of every site; with fixed weights also its bias [experts, 1].

    adapted: for arrow, what the experts add to the layers that read what a site reads; 0 for those that are
    not there. Where the model knows no temperature (dense), rows are divided by it. Raises PlanError for
    what cannot be; what is to be run is run as the first row is read, and raises RunError.
    """
    routing, count = ground.routing, len(ground.experts)
    rows_of = _rows_of(ground, sites, adapted)
    divisor = routing.temperature if ground.format == "dense" else 1.0
    tallest = _most_rows(ground) if routing.mode == "arrow" else 0
    by_name = {site.tensor: site for site in sites}
    biases = {bias_of(site): TensorInfo("F32", (count, 1)) for site in sites if routing.weights}
    tensors = {site.tensor: TensorInfo("F32", (count, site.cols)) for site in sites} | biases

    def read(name: str, first: int, end: int, out: memoryview) -> None:
        values = np.frombuffer(out, "<f4").reshape(end - first, tensors[name].cols)
        row = rows_of(by_name[name]) if name in by_name else partial(_bias, routing)
        for expert in range(first, end):
            found = row(expert)
            values[expert - first] = _unit(found) / divisor if name in by_name else found

    def scratch(name: str, rows: int) -> int:
        cols = tensors[name].cols
        several = adapted.get(name, {}).values() if routing.mode == "arrow" else ()
        widest = max((direction_bytes(tallest, cols, f.rank) for f in several), default=0)
        return ROW_BYTES * cols + widest

    return Source(tensors, read, scratch, BLAS if routing.mode == "arrow" else 0)


def bias_of(site: Site) -> str:
    """The name of the bias of a site's router."""
    return f"{site.tensor.removesuffix('.weight')}.bias"


def _unit(row: Matrix) -> Matrix:
    """The row at length 1; zeros stay."""
    length = np.sqrt(np.square(row).sum())
    return row / length if length else row


def _most_rows(ground: Ground) -> int:
    """Of any matrix of a layer; of all of a layer, where a router stands before the whole of it."""
    shapes = {name: step.shape for name, step in ground.steps.items() if len(step.shape) > 1}
    of_tokens = vocabulary_tensors(ground.base.config, shapes)
    rows: dict[tuple[str, int] | str | None, int] = {}
    for name in shapes.keys() - of_tokens.keys():
        group = name if ground.routing.per == "module" else layer_of(name)
        rows[group] = rows.get(group, 0) + shapes[name][0]
    return max(rows.values(), default=1)


# -- rows by mode ----------------------------------------------------------------------------------


def _rows_of(ground: Ground, sites: Sequence[Site], adapted: Adapted) -> Callable[[Site], Row]:
    """Site -> the rows of its experts; raises PlanError."""
    routing = ground.routing
    if routing.mode in ("uniform", "weights"):
        return lambda site: lambda expert: np.zeros(site.cols)
    if routing.mode in ("random", "uniform_random"):
        return lambda site: partial(_drawn, routing, site)
    if routing.mode == "arrow":
        _check_arrow(ground)
        return lambda site: partial(_pointed, site, adapted.get(site.tensor, {}))
    _check_base(ground)
    _check_modules(ground, sites)
    asked = _asked(ground, sites)
    return partial(_heard, ground, asked, Inputs(asked))


def _bias(routing: Routing, expert: int) -> Matrix:
    """[1]: with the model's softmax of scores by temperature, all biases give the shares."""
    assert routing.weights
    return np.array([shares_as_scores(routing.weights, routing.temperature)[expert]])


def shares_as_scores(weights: Sequence[float], temperature: float) -> list[float]:
    """Scores whose softmax, each divided by the temperature, has the proportions of `weights`."""
    shares = [weight / sum(weights) for weight in weights]
    return [temperature * (float(np.log(share)) if share else NEVER) for share in shares]


def _drawn(routing: Routing, site: Site, expert: int) -> Matrix:
    """Normal numbers, or even ones from -1 to 1."""
    key = random_key(routing.seed, site.tensor, expert)
    drawn = Counter.of(0, (1, site.cols)).random(key)[0]
    even: Matrix = (drawn + 0.5) / 2.0**31 - 1.0
    return normal(drawn) if routing.mode == "random" else even


def _pointed(site: Site, adapted: Mapping[int, Factors], expert: int) -> Matrix:
    """Arrow; zeros of an expert that does not adapt what the router stands before."""
    if expert not in adapted:
        return np.zeros(site.cols)
    return input_direction(*adapted[expert].load())


def _heard(ground: Ground, asked: Asked, inputs: Inputs, site: Site) -> Row:
    """Rows made of what the base makes of prompts or texts."""
    module = "" if asked.embedding else site.module
    found = partial(inputs.vector, module=module)
    if ground.routing.mode in FROM_PROMPTS:
        negative = [bool(expert.entry.negative_prompts) for expert in ground.experts]
        return lambda i: found(_positive(i)) - (found(_negative(i)) if negative[i] else 0.0)
    middle = np.zeros(site.cols)
    for i in range(len(ground.experts)):
        middle += found(_positive(i)) / len(ground.experts)
    return lambda i: found(_positive(i)) - middle


def _positive(expert: int) -> str:
    return f"{expert}+"


def _negative(expert: int) -> str:
    return f"{expert}-"


# -- what the base is asked, checked ---------------------------------------------------------------


def _check_arrow(ground: Ground) -> None:
    if ground.format == "dense":
        raise PlanError(
            f"{ground.routing.where}: mode arrow counts the size of a score, and the routers of this format "
            "count its sign; choose another mode (hidden with positive_prompts, centroids with texts, random)"
        )


def _check_base(ground: Ground) -> None:
    """Raises PlanError unless the base is a folder that transformers can run as it stands."""
    base, where = ground.base, f"{ground.routing.where}: router mode {ground.routing.mode}"
    stored = all(_is_stored(ground, step) for step in ground.steps.values())
    if base.computed or base.adapters or not stored:
        raise PlanError(
            f"{where} runs the base, and {base.label} is itself made by this recipe; write it to a folder "
            "first"
        )
    if not any((base.folder / name).is_file() for name in (TOKENIZER, *SLOW)):
        raise PlanError(
            f"{where} reads texts, and {base.label} has no tokenizer; put its files there"
        )


def _is_stored(ground: Ground, step: Step) -> bool:
    """Whether a step takes over what is stored; rows of tokens may be sorted anew, the base is run with its
    own."""
    first = step.operands[0]
    same = (first.model, first.tensor) == (ground.plan.donor, step.name)
    return first.step is not None or (same and step.parameters.get("scale", [1.0]) == [1.0])


def _check_modules(ground: Ground, sites: Sequence[Site]) -> None:
    """Raises PlanError for a module of a layer of which the base holds no tensor, by the part of its name
    from the first number on: models are stored with other first parts than transformers gives them."""
    names = [f".{name}" for name in ground.base.source.tensors]
    for site in sites:
        parts = site.module.split(".")
        start = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
        inside = "" if start is None else ".".join(parts[start:])
        if inside and not any(f".{inside}." in name for name in names):
            raise PlanError(
                f"{ground.routing.where}: {ground.base.label} holds no tensor of {site.module!r}, whose "
                "input a router is to read"
            )


def _asked(ground: Ground, sites: Sequence[Site]) -> Asked:
    """What the base is asked to read; raises PlanError."""
    modules = {site.module: site.cols for site in sites}
    texts: dict[str, list[str]] = {}
    files: dict[str, list[str]] = {}
    for i, expert in enumerate(ground.experts):
        if ground.routing.mode in FROM_TEXTS:
            files[_positive(i)] = [str(f) for f in example_files(ground.recipe, expert.entry.texts)]
            continue
        _check_prompts(expert)
        texts[_positive(i)] = expert.entry.positive_prompts
        if expert.entry.negative_prompts:
            texts[_negative(i)] = expert.entry.negative_prompts
    embedding = ""
    if ground.routing.mode == "cheap_embed":
        embedding, modules = _embedding(ground, sites)
    statistic = STATISTICS[ground.routing.mode]
    digests = {str(file): digest for file, digest in ground.texts.items()} if files else {}
    return Asked.of(
        ground.base, modules=modules, statistic=statistic, texts=texts, files=files,
        digests=digests, embedding=embedding,
    )  # fmt: skip


def _check_prompts(expert: Expert) -> None:
    positive, negative = expert.entry.positive_prompts, expert.entry.negative_prompts
    if not all(prompt.strip() for prompt in (*positive, *negative)):
        raise PlanError(f"{expert.place}: a prompt is empty; write one or leave it out")
    if positive == negative:
        raise PlanError(
            f"{expert.place}: its positive and negative prompts are the same, and tell its router nothing"
        )


def _embedding(ground: Ground, sites: Sequence[Site]) -> tuple[str, dict[str, int]]:
    """The base's embedding, and what is asked for in the place of modules."""
    tensors = {name: info.shape for name, info in ground.base.source.tensors.items()}
    kinds = vocabulary_tensors(ground.base.config, tensors)
    found = [name for name, kind in kinds.items() if kind == "embed"]
    where = f"{ground.routing.where}: cheap_embed"
    if not found:
        raise PlanError(
            f"{where} needs an embedding, and {ground.base.label} has none that is known"
        )
    name = min(found, key=len)
    for site in sites:
        if site.cols != tensors[name][-1]:
            raise PlanError(
                f"{where} gives rows of {tensors[name][-1]} numbers, and the router before {site.module!r} "
                f"reads vectors of {site.cols}; choose hidden, or per: layer"
            )
    return name, {"": tensors[name][-1]}
