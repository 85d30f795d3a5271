"""A file of mergekit-evolve is a search of ours: the same may vary, for the same layers and filters."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_suite import tiny_suite

from merge.errors import RecipeError, RequestError
from merge.lines import load_documents
from merge.recipe import parse_recipe
from merge.search.front import values_of
from merge.search.genome import converted
from merge.search.ledger import DONE
from merge.search.opening import open_study, read_space
from merge.search.space import Dimension, Real, Space

TASKS: dict[str, Any] = {"tasks": [{"name": "arc_easy"}]}
LAYERS = 12


def space_of(genome: dict[str, Any], **rest: Any) -> Space:
    text = yaml.safe_dump({"genome": genome, **(TASKS | rest)})
    ((data, lines),) = load_documents(text, "genome.yaml")
    found = converted(data, lines, lambda model: LAYERS)
    del found["study"]
    return Space(found, lines)


def middle(dimension: Dimension) -> float:
    assert isinstance(dimension, Real)
    return (dimension.low + dimension.high) / 2


@pytest.mark.parametrize("filters", [None, ["self_attn", "mlp"]])
@pytest.mark.parametrize("granularity", [0, 4, 5])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties", "slerp"])
def test_there_is_a_value_for_every_group_model_filter_and_parameter(
    method: str, granularity: int, filters: list[str] | None
) -> None:
    models = ["a", "b"] if method == "slerp" else ["a", "b", "c"]
    genome = {"models": models, "merge_method": method, "layer_granularity": granularity}
    genome |= {"base_model": "base"} if method not in ("linear", "slerp") else {}
    space = space_of(genome | ({"filters": filters} if filters else {}))
    groups = {0: 1, 4: 3, 5: 3}[granularity]
    parameters = 2 if method in ("ties", "dare_ties") else 1
    owners = 1 if method == "slerp" else 3
    expected = groups * owners * parameters * (3 if filters else 1)
    assert len(space.dimensions()) == expected
    filled = space.filled(middle)
    parse_recipe(yaml.safe_dump(filled))
    assert ("slices" in filled) == (groups > 1)
    if groups > 1:
        spans = [piece["sources"][0]["layer_range"] for piece in filled["slices"]]
        step = granularity
        assert spans == [[i, min(i + step, LAYERS)] for i in range(0, LAYERS, step)]


def test_smooth_values_are_gradients() -> None:
    genome = {"models": ["a", "b"], "merge_method": "linear", "layer_granularity": 4}
    filled = space_of(genome | {"smooth": True, "normalize": False}).filled(middle)
    assert [len(entry["parameters"]["weight"]) for entry in filled["models"]] == [3, 3]
    assert filled["parameters"] == {"normalize": False}


def test_weights_below_0_are_tried_where_they_may_be() -> None:
    genome = {"models": ["a", "b"], "merge_method": "ties", "base_model": "base"}
    for negative in (False, True):
        space = space_of(genome | {"allow_negative_weights": negative})
        lows = {d.name.rpartition(".")[2]: d.low for d in space.dimensions() if isinstance(d, Real)}
        assert (lows["weight"] < 0) == negative
        assert lows["density"] > 0


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_suite(tmp_path_factory.mktemp("suites") / "tiny", searched=30, kept=6)


def written(folder: Path, suite: Path) -> Path:
    """As people have them, on tasks of their own."""
    genome = {
        "models": ["zoo:reverser", "zoo:sorter"],
        "base_model": "zoo:base",
        "merge_method": "dare_ties",
        "layer_granularity": 2,
        "filters": ["self_attn", "mlp"],
        "normalize": False,
        "allow_negative_weights": False,
        "tokenizer_source": None,
    }
    tasks = [
        {"name": "quickstart_search_reverse", "weight": 1.0, "metric": "exact_match,none"},
        {"name": "quickstart_search_sort", "weight": 0.5, "metric": "exact_match,none"},
    ]
    study = {"include": str(suite), "trials": 3, "seed": 4}
    file = folder / "evolve.yml"
    text = yaml.safe_dump({"genome": genome, "tasks": tasks, "limit": 8, "study": study})
    file.write_text(text)
    return file


def test_a_file_of_mergekit_evolve_is_searched(tmp_path: Path, suite: Path) -> None:
    with open_study(written(tmp_path, suite), tmp_path / "study") as study:
        outcome = study.run()
        assert study.section.sampler == "cma-es"
        candidates = study.ledger.all()
    assert [c.state for c in candidates] == [DONE] * 6
    assert [len(c.asked) for c in candidates[3:]] == [2 * 2 * 3 * 2] * 3
    for candidate in candidates:
        assert candidate.scores is not None
        one, half = (
            candidate.scores["tasks"][f"quickstart_search_{n}"] for n in ("reverse", "sort")
        )
        (value,) = values_of(study.section, candidate.scores)
        assert value == pytest.approx((one + 0.5 * half) / 1.5)
        assert candidate.scores["mean"] == pytest.approx(value)
    best = max(candidates[3:], key=lambda c: values_of(study.section, c.scores or {}))
    assert outcome.top[0].scores == best.scores
    assert set(outcome.test[outcome.winner.number]["tasks"]) == set(outcome.winner.scores["tasks"])  # type: ignore[index]

    def weighted(number: int) -> float:
        (value,) = values_of(study.section, {"tasks": outcome.test[number]["tasks"]})
        return value

    verdict = outcome.verdict
    assert verdict is not None
    (rival,) = [c.number for c in outcome.rivals if c.origin == f"parent {verdict.rival}"]
    (average,) = [c.number for c in outcome.rivals if c.origin == "average"]
    winner = weighted(outcome.winner.number)
    assert verdict.difference == pytest.approx(winner - weighted(rival))
    assert outcome.average_is_as_good == (weighted(average) >= winner)


def test_less_is_better_where_a_weight_is_below_0(tmp_path: Path) -> None:
    text = """
genome: {models: ["zoo:sorter", "zoo:scribe"], merge_method: linear, layer_granularity: 2}
tasks: [{name: wikitext, weight: -1, metric: "word_perplexity,none"}, {name: arc_easy, weight: 2}]
"""
    (tmp_path / "g.yml").write_text(text)
    space, section = read_space(tmp_path / "g.yml", {}, None)
    assert len(space.dimensions()) == 2 * 2, "the zoo's models have four layers"
    assert section.tasks is not None
    assert [task.higher_is_better for task in section.tasks] == [False, True]
    scores = {"mean": 0, "tasks": {"wikitext": -9.0, "arc_easy": 0.5}}
    assert values_of(section, scores) == pytest.approx(((-9 + 2 * 0.5) / 3,))


GENOME = {"models": ["a", "b"], "merge_method": "linear"}


@pytest.mark.parametrize(
    ("data", "told"),
    [
        ({"genome": GENOME | {"layers": 3}} | TASKS, "unknown key 'layers'"),
        ({"genome": GENOME | {"merge_method": "karcher"}} | TASKS, "genome.merge_method is 'karcher'"),
        ({"genome": GENOME | {"merge_method": "ties"}} | TASKS, "ties needs base_model"),
        ({"genome": {"models": ["a"], "merge_method": "slerp"}} | TASKS, "slerp merges 2"),
        ({"genome": 3} | TASKS, "genome must be a table"),
        ({"genome": GENOME}, "tasks must be a list"),
        ({"genome": GENOME, "tasks": [{"name": "a", "weight": 0}]}, "other than 0"),
        ({"genome": GENOME, "tasks": [{"name": "a", "wait": 1}]}, "tasks.0: unknown key 'wait' .*weight"),
        ({"genome": GENOME, "models": []} | TASKS, "unknown key 'models' beside a genome"),
        ({"genome": GENOME, "num_fewshot": 5} | TASKS, "num_fewshot is not taken over"),
        ({"genome": GENOME, "tasks": [{"name": "a"}, {"name": "b"}, {"name": "a"}]}, "a is there twice"),
        ({"genome": GENOME, "study": ["trials"]} | TASKS, "study must be a table of keys"),
        ({"genome": GENOME, "num_fewshot": None, "shuffle": True} | TASKS, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused_with_its_line(data: dict[str, Any], told: str) -> None:
    ((read, lines),) = load_documents(yaml.safe_dump(data, sort_keys=False), "genome.yaml")
    if not told:
        assert converted(read, lines, lambda model: LAYERS)
        return
    with pytest.raises(RecipeError, match=rf"genome.yaml:\d+: .*{told}"):
        converted(read, lines, lambda model: LAYERS)


def test_tasks_and_a_suite_are_not_both_given(tmp_path: Path) -> None:
    data = {"genome": GENOME, **TASKS, "study": {"suite": "quickstart"}}
    (tmp_path / "g.yml").write_text(yaml.safe_dump(data))
    with pytest.raises(RequestError, match="has both suite and tasks"):
        read_space(tmp_path / "g.yml", {}, None)
