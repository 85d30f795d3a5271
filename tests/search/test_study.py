"""A search tries what it was asked to, whatever happens to it, and what it tells of a candidate is true."""

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import die, is_killed
from safetensors.torch import load_file, save_file
from tiny_search import BASELINES, SPECIALISTS, facts, searched, written
from tiny_suite import tiny_suite
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge.budget import make_budget
from merge.errors import NonFiniteError, OutputError, RequestError, RunError
from merge.pipeline import plan_parsed, run_recipe
from merge.recipe import parse_recipe
from merge.score import lm_of
from merge.search.asking import Asker
from merge.search.ledger import DONE, FAILED, Candidate, Ledger
from merge.search.live import LiveModel, Shells
from merge.search.opening import open_study
from merge.search.outcome import Outcome
from merge.search.panel import Panel
from merge.search.study import Study
from merge.search.tried import digest_of
from merge.shipped import shipped

ZOO = shipped("evals/zoo")
CONFLICT = ["quickstart_search_reverse", "quickstart_search_sort"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_suite(tmp_path_factory.mktemp("suites") / "tiny")


# -- going on ----------------------------------------------------------------------------------------


def killed(file: Path, folder: Path, after: int, between: bool) -> None:
    """Runs a search in a process that is killed after so many candidates, or while the next is tried."""

    def doomed() -> None:
        if after == 0:
            _die_while_trying(0)
        searched(file, folder, lambda c, s: _die(c.number + 1, after, between))

    assert is_killed(doomed)


def _die(ended: int, after: int, between: bool) -> None:
    if ended == after and between:
        die()
    elif ended == after:
        _die_while_trying(after)


def _die_while_trying(number: int) -> None:
    """The process is killed when the model of the next candidate is half written."""

    whole, count = LiveModel.write, iter(range(1000))

    def half(self: LiveModel, *rows: Any) -> None:
        if next(count) == 5:
            die()
        whole(self, *rows)

    LiveModel.write = half  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, suite: Path) -> tuple[list[Candidate], Outcome]:
    folder = tmp_path_factory.mktemp("whole")
    return searched(written(folder, suite), folder / "study")


@pytest.mark.parametrize(("cuts", "between"), [([1, 3, 4, 6], True), ([0, 5], False)])
def test_a_search_that_was_killed_comes_to_the_same_end(
    tmp_path: Path,
    suite: Path,
    whole: tuple[list[Candidate], Outcome],
    cuts: list[int],
    between: bool,
) -> None:
    file = written(tmp_path, suite)
    for cut in cuts:
        killed(file, tmp_path / "study", cut, between)
    candidates, outcome = searched(file, tmp_path / "study")
    assert facts(candidates) == facts(whole[0])
    assert outcome.as_json() == whole[1].as_json()


def test_exactly_as_many_candidates_as_asked_for_and_none_twice(
    whole: tuple[list[Candidate], Outcome],
) -> None:
    candidates, outcome = whole
    assert len(candidates) == BASELINES + 4
    assert len({candidate.digest for candidate in candidates}) == len(candidates)
    assert [c.number for c in candidates] == [c.ended for c in candidates] == list(range(7))
    assert [c.origin for c in candidates[:3]] == [*(f"parent {m}" for m in SPECIALISTS), "average"]
    assert {c.state for c in candidates} == {DONE}
    assert outcome.winner in outcome.top
    assert outcome.verdict is not None
    assert outcome.verdict.documents == 4 * 6


def test_a_longer_search_goes_on_from_a_shorter_one(
    tmp_path: Path, suite: Path, whole: tuple[list[Candidate], Outcome]
) -> None:
    shorter, _ = searched(written(tmp_path, suite, trials=2), tmp_path / "study")
    assert facts(shorter) == facts(whole[0][: BASELINES + 2])
    longer, outcome = searched(written(tmp_path, suite, trials=4), tmp_path / "study")
    assert facts(longer) == facts(whole[0])
    assert replace(outcome, winners=1).as_json() == whole[1].as_json()
    with open_study(written(tmp_path, suite, trials=1), tmp_path / "study") as study:
        assert study.run().as_json() == outcome.as_json()
        assert facts(study.ledger.all()) == facts(longer)
        (note,) = study.notes
    assert note.startswith("4 candidates were tried before, and trials is 1: none is added")


def test_test_is_looked_at_once_for_each_winner_and_told_how_often(
    tmp_path: Path, suite: Path, noted: Callable[..., list[str]]
) -> None:
    looked = noted(Panel, "marks", lambda panel: panel.split.name)
    better = {"parameters": {"weight": {"choice": [0.0, 0.5]}}}
    models = [{"model": model, **better} for model in SPECIALISTS]
    space = {"base_model": "zoo:base", "merge_method": "task_arithmetic", "models": models}
    winners = set()
    for trials, new in ((1, BASELINES + 1), (4, 3), (9, 0)):
        looked.clear()
        file = written(tmp_path, suite, trials, **space)
        file.write_text(file.read_text().replace("seed: 5", "sampler: grid"))
        with open_study(file, tmp_path / "study") as study:
            outcome = study.run()
            told = ["after 4 of 9 candidates nothing new is left"] if trials == 9 else []
            assert [note[: len(told[0])] for note in study.notes] == told
        assert outcome.as_json()["used_up"] == (trials == 9)
        first = outcome.winner.number not in winners
        winners.add(outcome.winner.number)
        assert looked.count("dev") == new
        assert looked.count("test") == (BASELINES if trials == 1 else 0) + first
        assert outcome.winners == outcome.as_json()["winners_tested"] == len(winners)
    assert len(winners) == 2
    assert looked == []


def test_parents_that_are_others_now_are_refused(tmp_path: Path, suite: Path) -> None:
    """Their bytes count, not when they were written."""
    parent = _copy("sorter", tmp_path / "parent")
    models = [{"model": str(parent), "parameters": {"weight": {"search": [0.1, 0.9]}}}]
    models.append({"model": "zoo:reverser"})
    study = {"merge_method": "linear", "parameters": {"weight": 1.0}, "models": models}
    before, _ = searched(written(tmp_path, suite, 1, **study), tmp_path / "study")
    (weights,) = parent.glob("*.safetensors")
    os.utime(weights, ns=(0, 0))
    file = written(tmp_path, suite, 2, **study)
    longer, _ = searched(file, tmp_path / "study")
    assert longer[: len(before)] == before
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    told = f"{parent}: its files are not those that study 'study' was begun with"
    with pytest.raises(RequestError, match=re.escape(told)), open_study(file, tmp_path / "study"):
        pass
    shutil.rmtree(parent)
    with pytest.raises(RequestError), open_study(file, tmp_path / "study"):
        pass


def test_another_search_in_the_same_folder_is_refused(tmp_path: Path, suite: Path) -> None:
    file = written(tmp_path, suite, trials=1)
    with open_study(file, tmp_path / "study"):  # noqa: SIM117
        with (
            pytest.raises(OutputError, match="another run searches there"),
            open_study(file, tmp_path / "study"),
        ):
            pass
    file.write_text(file.read_text().replace("0.9", "0.8"))
    with (
        pytest.raises(
            RequestError,
            match=r"is another search than this one, by its recipe .parameters.; .* another --output",
        ),
        open_study(file, tmp_path / "study"),
    ):
        pass
    data = yaml.safe_load(file.read_text().replace("0.8", "0.9"))
    data["study"]["seed"] = 6
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    told = r"by its study .seed was 5, is 6."
    with pytest.raises(RequestError, match=told), open_study(file, tmp_path / "study"):
        pass


def test_the_folder_of_a_model_is_left_alone(tmp_path: Path, suite: Path) -> None:
    shutil.copytree(shipped("evals/zoo/sorter"), tmp_path / "model")
    before = sorted((tmp_path / "model").iterdir())
    file = written(tmp_path, suite, trials=1)
    with pytest.raises(OutputError, match="holds a model"), open_study(file, tmp_path / "model"):
        pass
    assert sorted((tmp_path / "model").iterdir()) == before


def test_the_folder_of_a_search_is_no_place_for_a_model(tmp_path: Path, suite: Path) -> None:
    with open_study(written(tmp_path, suite, trials=1), tmp_path / "study"):
        pass
    before = sorted((tmp_path / "study").iterdir())
    (tmp_path / "merge.yaml").write_text("model: zoo:sorter\n")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"study: holds a search .*mergetool report"):
            run_recipe(tmp_path / "merge.yaml", tmp_path / "study", overwrite=overwrite)
    assert sorted((tmp_path / "study").iterdir()) == before


def test_nothing_is_written_for_a_candidate_beside_the_database(
    tmp_path: Path, suite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig  # noqa: F401 - torch makes a folder when it is first imported

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    seen = set()

    def look(candidate: Candidate, study: Study) -> None:
        seen.update(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*"))

    searched(written(tmp_path, suite, trials=2), tmp_path / "study", look)
    seen -= {"search.yaml", "study", "temporary"}
    assert seen <= {f"study/study.{end}" for end in ("lock", "db", "db-wal", "db-shm")}


def test_who_loses_its_turn_to_ask_goes_on_with_what_another_asked_for(
    tmp_path: Path,
    suite: Path,
    whole: tuple[list[Candidate], Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As who was stopped for longer than others wait."""
    ask, robbed = Asker.ask, list[int]()

    def slow(asker: Asker, number: int) -> Any:
        found = ask(asker, number)
        if found and number == BASELINES + 1 and not robbed:
            robbed.append(number)
            ledger = Ledger.existing(f"sqlite:///{tmp_path}/study/study.db", "study")
            with monkeypatch.context() as patch:
                patch.setattr("merge.search.ledger.STALE", -1.0)
                assert ledger.begin_asking(number, "other")
            other = Candidate(number, digest_of(found[0]), "search", *found, after=asker.told)
            assert ledger.end_asking(number, "other", other)
            ledger.release("other")
        return found

    monkeypatch.setattr(Asker, "ask", slow)
    candidates, _ = searched(written(tmp_path, suite), tmp_path / "study")
    assert robbed
    assert facts(candidates) == facts(whole[0])


# -- what a candidate is -----------------------------------------------------------------------------

METHODS: dict[str, dict[str, Any]] = {
    "linear": {"parameters": {"weight": 0.7}},
    "ties": {"base_model": "zoo:base", "parameters": {"weight": 0.8, "density": 0.4}},
    "dare_ties": {
        "base_model": "zoo:base",
        "parameters": {"weight": 0.8, "density": 0.6, "seed": 3},
    },
    "slerp": {"base_model": SPECIALISTS[0], "parameters": {"t": [0.2, 0.7]}},
}


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
def test_a_candidate_answers_as_its_recipe_does_when_it_is_run(
    tmp_path: Path, suite: Path, out_dtype: str
) -> None:
    """One live model after another, each what the folder would be: answers and values are equal."""
    models = [{"model": model} for model in SPECIALISTS]
    variants = [{"merge_method": method, **rest} for method, rest in METHODS.items()]
    space = {"out_dtype": out_dtype, "models": models, "variants": variants}
    file = written(tmp_path, suite, trials=4, **space)
    with open_study(file, tmp_path / "study") as study:
        study.run().save(tmp_path / "study")
        tried = [c for c in study.ledger.all() if c.origin == "search"]
        assert {c.recipe["merge_method"] for c in tried} == set(METHODS)
        for candidate in tried:
            recipe = tmp_path / f"{candidate.number}.yaml"
            recipe.write_text(yaml.safe_dump(candidate.recipe))
            folder = run_recipe(recipe, tmp_path / f"model-{candidate.number}").folder
            marks = study.scorer.panels["dev"].marks(_loaded(folder))
            assert marks.as_json()["answers"] == study.ledger.answers(candidate.number)
            assert marks.as_json()["values"] == candidate.scores["values"]  # type: ignore[index]


PATHS: dict[str, dict[str, Any]] = {
    "layers of two models": {"models": list(SPECIALISTS), "layers": 4, "repeats": 2},
    "any at each place": {"models": list(SPECIALISTS), "layers": 4, "places": 5},
}


@pytest.mark.parametrize("name", PATHS)
def test_a_path_through_layers_answers_as_its_recipe_does_when_it_is_run(
    tmp_path: Path, suite: Path, name: str
) -> None:
    """Live models of different depth one after another."""
    space = {"merge_method": "passthrough", "slices": {"path": PATHS[name]}}
    with open_study(written(tmp_path, suite, trials=4, **space), tmp_path / "study") as study:
        study.run()
        tried = [c for c in study.ledger.all() if c.origin == "search"]
        depths = set()
        for candidate in tried:
            recipe = tmp_path / f"{candidate.number}.yaml"
            recipe.write_text(yaml.safe_dump(candidate.recipe))
            folder = run_recipe(recipe, tmp_path / f"model-{candidate.number}").folder
            loaded = _loaded(folder)
            depths.add(loaded.model.config.num_hidden_layers)
            spans = [s["sources"][0]["layer_range"] for s in candidate.recipe["slices"]]
            assert loaded.model.config.num_hidden_layers == sum(end - a for a, end in spans)
            marks = study.scorer.panels["dev"].marks(loaded)
            assert marks.as_json()["answers"] == study.ledger.answers(candidate.number)
        assert len(depths) > 1


@pytest.mark.parametrize(
    ("merge_method", "slices", "told"),
    [
        (
            "passthrough",
            {"path": PATHS["any at each place"] | {"layers": [4, 6]}},
            "path.layers is [4, 6]; zoo:sorter",
        ),
        (
            "passthrough",
            {"path": PATHS["layers of two models"] | {"layers": 6}},
            "path.layers is 6; zoo:reverser",
        ),
        (
            "linear",
            {
                "groups": {
                    "layers": 6,
                    "models": [{"model": {"choice": [*SPECIALISTS]}}],
                    "parameters": {"weight": {"search": [0, 1]}},
                }
            },
            "groups.layers is 6; zoo:reverser",
        ),
    ],
)
def test_layers_that_a_model_has_not_are_told_before_anything_is_written(
    tmp_path: Path, suite: Path, merge_method: str, slices: dict[str, Any], told: str
) -> None:
    file = written(tmp_path, suite, merge_method=merge_method, slices=slices)
    line = 1 + next(i for i, text in enumerate(file.read_text().splitlines()) if "layers:" in text)
    whole = f"{file}:{line}: slices.{told} has no layer 4: it has 4 layers"
    with pytest.raises(RequestError, match=re.escape(whole)), open_study(file, tmp_path / "study"):
        pass
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("live", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_a_live_model_is_the_written_one_to_the_bit(
    tmp_path: Path, out_dtype: str, live: str, compiled: bool
) -> None:
    """Also after another candidate was in its place, and where embeddings are tied."""
    recipes = [
        {
            "out_dtype": out_dtype,
            "merge_method": method,
            "models": [{"model": model} for model in SPECIALISTS],
            **METHODS[method],
        }
        for method in ("ties", "slerp")
    ]
    shells, opened = Shells(getattr(torch, live), "cpu"), {}  # type: ignore[var-annotated]
    for number, recipe in enumerate(recipes):
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        folder = run_recipe(file, tmp_path / f"model-{number}").folder
        plan = plan_parsed(parse_recipe(file.read_text(), str(file)), opened=opened)
        shell = shells.of(plan)
        shell.become(plan, make_budget(plan, fuse=compiled))
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, live))
        assert loaded.config.tie_word_embeddings
        assert_same_values(shell.model, loaded)


def assert_same_values(live: Any, loaded: Any) -> None:
    found, expected = live.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_only_tensors_that_differ_from_the_candidate_before_are_made(tmp_path: Path) -> None:
    """After a failure, all are."""

    def becomes(shells: Shells, model: str, weight: float) -> Any:
        weights = [{"filter": "self_attn", "value": weight}, {"value": 1.0}]
        models = [{"model": "zoo:reverser", "parameters": {"weight": weights}}, {"model": model}]
        parameters = {"weight": 1.0, "normalize": False}
        recipe = {"merge_method": "linear", "models": models, "parameters": parameters}
        parsed = parse_recipe(yaml.safe_dump(recipe), str(tmp_path / "recipe.yaml"))
        plan = plan_parsed(parsed, opened=opened)
        shell = shells.of(plan)
        shell.become(plan, make_budget(plan))
        return shell.model

    opened: dict[str, Any] = {}
    shells = Shells(torch.float32, "cpu")
    model = becomes(shells, "zoo:sorter", 0.5)
    mlp = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        mlp.fill_(7.0)
    becomes(shells, "zoo:sorter", 0.6)
    assert bool((mlp == 7.0).all())
    fresh = becomes(Shells(torch.float32, "cpu"), "zoo:sorter", 0.6)
    attention = [m.model.layers[0].self_attn.q_proj.weight for m in (model, fresh)]
    assert torch.equal(*attention)

    spoilt = _copy("sorter", tmp_path / "spoilt", lambda weight: weight.fill_(float("nan")))
    with pytest.raises(NonFiniteError):
        becomes(shells, str(spoilt), 0.5)
    again = becomes(shells, "zoo:sorter", 0.6)
    assert_same_values(again, fresh)


def _loaded(folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return lm_of(model, AutoTokenizer.from_pretrained(folder), 150)


# -- several objectives ------------------------------------------------------------------------------


def conflicting(folder: Path, suite: Path, trials: int, **study: Any) -> Path:
    """A search over what of two specialists is taken, for two skills at once."""
    models = [{"model": m, "parameters": {"weight": {"search": [0.0, 1.0]}}} for m in SPECIALISTS]
    file = written(folder, suite, trials, merge_method="linear", models=models)
    data = yaml.safe_load(file.read_text())
    data["study"] |= {"objectives": CONFLICT, "population": 4, **study}
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


def test_of_several_objectives_the_outcome_is_what_nothing_beats(
    tmp_path: Path, suite: Path
) -> None:
    file = conflicting(tmp_path, suite, 9)
    candidates, outcome = searched(file, tmp_path / "study")
    values = {
        c.number: [c.scores["tasks"][t] for t in CONFLICT]
        for c in candidates
        if c.scores and c.origin == "search"
    }
    every = [[c.scores["tasks"][t] for t in CONFLICT] for c in candidates if c.scores]
    front = {
        number
        for number, own in values.items()
        if not any(
            all(a >= b for a, b in zip(other, own, strict=True)) and other != own for other in every
        )
    }
    assert {c.number for c in outcome.top} == front
    assert front
    means = {n: sum(outcome.val[n]["tasks"][t] for t in CONFLICT) for n in front}
    assert means[outcome.winner.number] == max(means.values())
    assert outcome.as_json()["winner"]["dev"]["objectives"].keys() == set(CONFLICT)
    outcome.save(tmp_path / "study")
    files = {file.stem for file in (tmp_path / "study" / "recipes").iterdir()}
    assert files == {f"candidate-{c.number}" for c in outcome.top}
    again, same = searched(conflicting(tmp_path / "cut", suite, 5), tmp_path / "cut" / "study")
    assert facts(again) == facts(candidates)[: len(again)]
    longer, same = searched(conflicting(tmp_path / "cut", suite, 9), tmp_path / "cut" / "study")
    assert facts(longer) == facts(candidates)
    once = {"winners_tested": 1}  # the shorter search had a winner of its own
    assert same.as_json() | once == outcome.as_json()


# -- what fails --------------------------------------------------------------------------------------


def _copy(name: str, folder: Path, change: Callable[[torch.Tensor], object] = lambda t: t) -> Path:
    shutil.copytree(ZOO / name, folder)
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    change(next(t for name, t in tensors.items() if "mlp" in name))
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def test_a_candidate_that_fails_is_told_with_its_reason_and_the_search_goes_on(
    tmp_path: Path, suite: Path
) -> None:
    broken = _copy("sorter", tmp_path / "broken", lambda t: t.view(-1)[:1].fill_(float("nan")))
    space = {
        "merge_method": "linear",
        "models": [
            {"model": {"choice": ["zoo:reverser", "zoo:chemist", str(broken)]}},
            {"model": "zoo:scribe"},
        ],
        "parameters": {"weight": 1.0},
    }
    candidates, outcome = searched(written(tmp_path, suite, 3, **space), tmp_path / "study")
    failed = {c.number: c.reason for c in candidates if c.state == FAILED}
    assert {c.origin for c in candidates if c.number in failed} == {
        f"parent {broken}",
        "average",
        "search",
    }
    assert all("nan" in reason and str(broken) in reason for reason in failed.values())
    assert sum(c.origin == "search" and c.state == DONE for c in candidates) == 2
    assert outcome.failed == failed
    assert outcome.verdict is not None
    assert str(broken) not in outcome.verdict.words


def test_a_search_of_which_nothing_can_be_scored_says_why(tmp_path: Path, suite: Path) -> None:
    broken = _copy("sorter", tmp_path / "broken", lambda t: t.view(-1)[:1].fill_(float("inf")))
    models = [{"model": str(broken), "parameters": {"weight": {"search": [0.1, 0.9]}}}]
    file = written(tmp_path, suite, 1, merge_method="linear", models=models)
    with pytest.raises(RunError, match=r"search.yaml: no candidate could be scored: .*inf"):
        searched(file, tmp_path / "study")


def test_documents_that_the_baselines_use_up_are_refused(tmp_path: Path, suite: Path) -> None:
    used = BASELINES * 4 * 4  # of four tasks as many as `limit` says
    file = written(tmp_path, suite)
    data = yaml.safe_load(file.read_text())
    for documents in (used, used + 1):
        data["study"]["documents"] = documents
        file.write_text(yaml.safe_dump(data, sort_keys=False))
        told = rf"is {used}; it must be more than {used}, .* 3 baselines, 16 documents of dev .* 24 of test"
        refused = pytest.raises(RequestError, match=told) if documents == used else nullcontext()
        with refused, open_study(file, tmp_path / "study"):
            pass
        assert (tmp_path / "study").exists() == (documents > used)


def test_a_parent_to_start_from_is_no_candidate_for_documents(tmp_path: Path, suite: Path) -> None:
    file = written(tmp_path, suite)
    data = yaml.safe_load(file.read_text())
    data["study"] |= {"documents": BASELINES * 4 * 4, "start": [{"model": SPECIALISTS[0]}]}
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    with (
        pytest.raises(RequestError, match="it must be more than"),
        open_study(file, tmp_path / "s"),
    ):
        pass


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("metric", "accc", "no metric 'accc"), ("higher_is_better", False, "more is better")],
)
def test_what_a_suite_says_of_its_tasks_is_checked_first(
    key: str, value: object, told: str, tmp_path: Path, suite: Path
) -> None:
    changed = Path(shutil.copytree(suite, tmp_path / "changed"))
    data = yaml.safe_load((changed / "suite.yaml").read_text())
    data["tasks"][0][key] = value
    (changed / "suite.yaml").write_text(yaml.safe_dump(data))
    with (
        pytest.raises(RequestError, match=told),
        open_study(written(tmp_path / "search", changed), tmp_path / "study"),
    ):
        pass
    assert not (tmp_path / "study").exists()


def test_a_filter_that_fits_nothing_is_told(tmp_path: Path, suite: Path) -> None:
    nowhere = {"weight": [{"filter": "layers.99.", "value": {"search": [0.1, 1]}}, {"value": 0.5}]}
    models = [{"model": model, "parameters": nowhere} for model in SPECIALISTS]
    file = written(tmp_path, suite, 1, merge_method="linear", models=models)
    with open_study(file, tmp_path / "study") as study:
        study.run()
    assert "filter 'layers.99.' of weight fits no tensor" in study.notes[0]


def test_identical_parents_cannot_be_improved(tmp_path: Path, suite: Path) -> None:
    models = [
        {"model": str(model), "parameters": {"weight": {"search": [0.1, 0.9]}}}
        for model in ("zoo:sorter", _copy("sorter", tmp_path / "same"))
    ]
    space = {"merge_method": "linear", "models": models}
    candidates, outcome = searched(written(tmp_path, suite, 3, **space), tmp_path / "study")
    assert len({str(c.scores) for c in candidates}) == 1
    assert outcome.verdict is not None
    assert outcome.verdict.p == 1.0
    assert "no significant improvement" in outcome.verdict.words
    assert outcome.average_is_as_good


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"merge_method": "tise"}, "tise"),
        ({"base_model": "./absent"}, "absent"),
        ({"adapter": {"rank": 4}}, "adapter: is not searched over"),
        ({"studdy": {"trials": 3}}, "search.yaml:.*unknown key 'studdy' .did you mean 'study'"),
        ({"study": {"suite": "none"}}, "no suite 'none'"),
        ({"study": {"trial": 3}}, "search.yaml:.*unknown key 'trial'"),
        ({"study": {"start": [{"weight": 1.0}]}}, "nothing is called 'weight'"),
        (
            {"study": {"start": [{"merge_method": "linear", "models": ["zoo:sorter"]}]}},
            "study, start 1: models.0 is 'zoo:sorter'; it must be a table",
        ),
        ({"study": {"start": [{"parameters.density": 2.0}]}}, "must be from 0.1 to 0.9"),
        ({"parameters": {}, "models": [{"model": "zoo:sorter"}]}, "nothing in it may vary"),
        ({"study": {"tasks": [{"task": "a"}, {"task": "a", "metric": "f1"}]}}, "a is there twice"),
        (
            {"study": {"tasks": [{"task": "a"}, {"task": "b", "metrik": "f1"}]}},
            r"study.tasks.1: unknown key 'metrik' .did you mean 'metric'.*; allowed: task, metric,",
        ),
        ({"study": {"tasks": [{"metric": "f1"}]}}, "study.tasks.0.task is missing; .* tasks needs"),
        ({"study": {"objectives": ["quickstart_search_revers"]}}, "no task .* .did you mean"),
        (
            {"study": {"tasks": [{"task": "quickstart_srt"}]}},
            "study.tasks.0: no task, group or tag 'quickstart_srt' in lm-eval; ",
        ),
        ({"variants": [{"dtype": "float32"}, {"merge_method": "sler"}]}, "did you mean 'slerp'"),
        ({"variants": [{}, {"parameters": {"wait": {"search": [0, 1]}}}]}, "'wait'"),
        ({"variants": [{}, {"parameters": {"weight": {"choice": [1, "a"]}}}]}, "weight"),
        (
            {"study": {"objectives": CONFLICT, "sampler": "cma-es"}},
            r"sampler is cma-es, .* one of nsga-ii",
        ),
    ],
)
def test_what_is_wrong_with_every_candidate_is_told_before_anything_is_written(
    tmp_path: Path, suite: Path, change: dict[str, Any], told: str
) -> None:
    file = written(tmp_path, suite)
    data = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(data | change))
    with pytest.raises(RequestError, match=told), open_study(file, tmp_path / "study"):
        pass
    assert not (tmp_path / "study").exists()
