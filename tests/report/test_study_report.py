"""A report of a search says what the search found, draws it, and lets nobody's text do anything."""

import csv
import io
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import yaml
from browser import browser, opened
from ran import Ran
from search.tiny_suite import tiny_suite
from studies import answered, ended, written

from merge.report import charts, front, importance, study_page
from merge.report.commands import _place
from merge.report.files import csv_text
from merge.report.importance import importance_of
from merge.report.outcome import read_outcome
from merge.report.page import prose
from merge.report.pictures import INK
from merge.report.reading import read_search
from merge.report.study import Search
from merge.report.study_page import report_on
from merge.report.varied import label_of
from merge.search.front import short_names, words_of_front
from merge.search.ledger import Ledger
from merge.search.opening import NAME

Command = Callable[..., Ran]
HOSTILE = (
    '<script>fetch("http://example.invalid/a")</script>',
    '"><img src=http://example.invalid/b onerror=document.title=1>',
    "$\\frac{$ & '`</title></style> \u202etxt\x07",
)
PICTURES = {"comparison", "progress", "front", "importance", "parallel", "answers"}


def conflicting(a: float, b: float) -> dict[str, float]:
    """What one task gains the other loses; weights that add up to more than 1 lose both."""
    lost = max(0.0, a + b - 1.0)
    return {"suite_left": round(a - lost, 4), "suite_right": round(b - lost, 4)}


def of_one_weight(a: float, b: float) -> dict[str, float]:
    return {"suite_one": round(a * a, 4)}


def _url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def search_of(folder: Path, ledger: Ledger) -> Search:
    return read_search(ledger, "study", folder)


# -- what it says -------------------------------------------------------------------------------------


class Told(HTMLParser):
    """What a page consists of. `tables`: rows of cells by name."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.tables: dict[str | None, list[list[str]]] = {}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "div":
            self.rows = self.tables.setdefault(dict(attrs).get("aria-label"), [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.lasttag in ("td", "button"):
            self.rows[-1][-1] += data.strip()


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a search for two objectives, made by the command; beside it terminal.txt, what that
    said."""
    from click.testing import CliRunner

    from merge.cli import main

    folder = tmp_path_factory.mktemp("real")
    suite = tiny_suite(folder / "suite")
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": "zoo:reverser", "parameters": {"weight": {"search": [0.0, 1.0]}}},
            {"model": "zoo:sorter", "parameters": {"weight": 0.5}},
        ],
        "parameters": {"normalize": True},
        "study": {
            "suite": str(suite),
            "trials": 5,  # as many points as the grid has
            "sampler": "grid",
            "objectives": ["quickstart_search_reverse", "quickstart_search_sort"],
        },
    }
    file = folder / "two.yaml"
    file.write_text(yaml.safe_dump(recipe))
    done = CliRunner().invoke(main, ["sweep", str(file), "--output", str(folder / "out")])
    assert done.exit_code == 0, done.output
    (folder / "terminal.txt").write_text(done.output)
    return folder / "out"


def test_a_real_search_is_told_as_it_ended(real: Path, command: Command) -> None:
    ran = command("report", real, "--output", "page", "--json")
    assert ran.code == 0, ran.err
    told, outcome = json.loads(ran.out), json.loads((real / "outcome.json").read_text())
    assert json.loads(Path("page/report.json").read_text()) == told
    page = Told(Path("page/index.html").read_text())
    assert told["section"]["sampler"] == "grid"
    assert not told["section"].keys() & {"trials", "top", "minutes", "documents"}, "a run's own"
    words = outcome["verdict"]["words"]
    assert words[1:] in page.text
    by_number = {each["number"]: each for each in told["candidates"]}
    for each in (outcome["winner"], *outcome["rivals"]):
        for split in ("dev", "val", "test"):
            assert by_number[each["number"]][split]["mean"] == each[split]["mean"]
            assert f"{100 * each[split]['mean']:.1f}" in page.text
    rows = list(csv.DictReader(io.StringIO(Path("page/candidates.csv").read_text())))
    assert [yaml.safe_load(row["recipe"]) for row in rows] == [
        each["recipe"] for each in told["candidates"]
    ]
    for each in outcome["top"]:
        kept = (real / "recipes" / f"candidate-{each['number']}.yaml").read_text()
        assert kept.strip() in page.text
    assert {"comparison.png", "progress.png", "front.png"} <= {
        file.name for file in Path("page/pictures").iterdir()
    }


def test_terminal_and_page_tell_the_same(real: Path) -> None:
    """Under the same headings the same figures of the same candidates, and the same sentences."""
    said = (real.parent / "terminal.txt").read_text().splitlines()
    search = search_of(real, Ledger.existing(_url(real), NAME))
    page = Told(report_on(search).page)
    (head, *rows), count = page.tables["Leaderboard"], len(search.top) + len(search.rivals)
    told = {row[0].removesuffix(" winner"): dict(zip(head, row, strict=True)) for row in rows}
    names, *table = (re.split(r" {2,}", line.strip()) for line in said[: count + 1])
    assert names == ["candidate", "val reverse", "val sort", "dev", "val", "test"]
    assert {row[0] for row in table} == told.keys()
    for first, *cells in table:
        for name, cell in zip(names[1:], cells, strict=True):
            mean, _, error = cell.removesuffix(" *").partition(" ± ")
            assert told[first][name] == mean.replace("-", "–")
            assert error == told[first][f"± {name}"] if error else True
    searched, baselines = search.on_front
    front = [
        row[0].removesuffix(" winner")
        for row in page.tables["Candidates and baselines of the front"]
    ]
    assert front == ["candidate", *(e.name for e in searched), *(e.origin for e in baselines)]
    who = words_of_front(len(searched), [e.name for e in baselines])
    assert f"no other one beats these in all objectives on dev: {who}" in said
    assert all(words in said and words[1:] in page.text for words in search.words)


def test_the_best_parent_is_one_and_the_same(real: Path, tmp_path: Path) -> None:
    """The one that the winner was compared with, which val chose; before the end the best on dev."""
    ended_one = search_of(real, Ledger.existing(_url(real), NAME))
    assert ended_one.outcome is not None
    assert ended_one.outcome.verdict is not None
    assert ended_one.best_parent is not None
    parent, split = ended_one.best_parent
    assert (parent.name, split) == (ended_one.outcome.verdict.rival, "val")
    assert f"{parent.name}, the best parent on val" in ended_one.words[-1]
    of_second = lambda a, b: {"suite_one": b}  # noqa: E731
    found = search_of(tmp_path / "s", written(tmp_path / "s", of_second, 2)).best_parent
    assert found is not None
    assert (found[0].name, found[1]) == ("hub/right", "dev")


def test_baselines_as_good_as_the_winner_are_told_first(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    data = ended(folder, written(folder, of_one_weight), "candidate 2 is better than hub/left")
    text = Told(report_on(search_of(folder, Ledger.existing(_url(folder), NAME))).page).text
    told = (
        "Candidate 2 is not better than what needed no search: on test it has 75.0 points; others: "
    )
    assert f"{told}hub/left 75.0, hub/right 75.0. Candidate 2 is better than hub/left." in text
    for rival, mean in zip(data["rivals"], (0.5, 0.8), strict=True):
        rival["test"] = {**rival["test"], "mean": mean}
    (folder / "outcome.json").write_text(json.dumps(data))
    text = Told(report_on(search_of(folder, Ledger.existing(_url(folder), NAME))).page).text
    assert f"{told}hub/right 80.0. Candidate" in text


def test_where_nothing_has_ended_it_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    ledger = written(folder, of_one_weight, waiting=2)
    search = search_of(folder, ledger)
    report = report_on(search)
    text = Told(report.page).text
    assert "is running or was cut off: 24 candidates tried beside 2 baselines, 2 open." in text
    assert "No winner is told here" in text
    assert search.top == search.searched[:5]
    assert "The best on dev so far, 5 of 24, and the baselines." in text
    assert "Winner" not in text
    ended(folder, ledger)
    assert "goes on after it had ended once" in Told(report_on(search_of(folder, ledger)).page).text


@pytest.mark.parametrize(("count", "told"), [(0, "1 candidate"), (1, "2 candidates")])
def test_a_study_of_next_to_nothing_is_a_page_too(tmp_path: Path, count: int, told: str) -> None:
    folder = tmp_path / "study"
    report = report_on(search_of(folder, written(folder, of_one_weight, count, reason="no memory")))
    assert f"{told} tried (1 not scored) beside 2 baselines, 0 open." in Told(report.page).text


def test_many_are_cut_off_and_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {charts: "MOST_COMPARED", front: "MOST_PANELS", study_page: "MOST_RECIPES"}
    for module, name in limits.items():
        monkeypatch.setattr(module, name, 1)
    monkeypatch.setattr(importance, "MOST", 9)
    three = lambda a, b: {"suite_a": a, "suite_b": b, "suite_c": 1 - a}  # noqa: E731
    search = search_of(tmp_path / "study", written(tmp_path / "study", three, 12))
    found = importance_of(search)
    assert (found.taken, found.candidates) == (9, 12)
    text = Told(report_on(search).page).text
    for said in (
        "1 of the 5 best are shown", "1 of 3 pairs are shown", "1 of 5 are shown; report.json",
        "over 9 of 12 candidates",
    ):  # fmt: skip
        assert said in text


def test_the_paired_test_and_the_failed_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    ledger = written(folder, of_one_weight, reason="hub/left: tensor 'x' holds nan")
    ended(folder, ledger, "candidate 2 is better than hub/left, the best parent, by +12.5 points")
    text = Told(report_on(search_of(folder, ledger)).page).text
    for said in (
        "Candidate 2 is better than hub/left, the best parent, by +12.5 points.",
        "McNemar's exact test", "12.5", "0.004", "400", "hub/left: tensor 'x' holds nan",
    ):  # fmt: skip
        assert said in text


def test_a_search_that_had_nothing_left_to_try_is_told_so(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    data = ended(folder, written(folder, of_one_weight, 3))
    for used_up, why in ((False, ""), (True, ", as nothing new was left to try")):
        (folder / "outcome.json").write_text(json.dumps({**data, "used_up": used_up}))
        search = search_of(folder, Ledger.existing(_url(folder), NAME))
        assert (
            search.status == f"This search has ended{why}: 3 candidates tried beside 2 baselines."
        )


def test_a_damaged_outcome_is_refused(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "study"
    whole = ended(folder, written(folder, of_one_weight))
    val = {**whole["top"][0]["val"]}
    damaged: list[Any] = [
        [], {}, {"winner": {"number": 2}}, {**whole, "winner": None}, {**whole, "rivals": 3},
        *({**whole, "verdict": verdict} for verdict in ([], "won", {"words": "won"})),
        *({**whole, "verdict": {**whole["verdict"], key: []}} for key in whole["verdict"]),
        *(
            {**whole, "top": [{**whole["top"][0], "val": {**val, **figures}}]}
            for figures in ({"mean": "high"}, {"mean": math.inf}, {"stderr": -1.0}, {"alike": None})
        ),
        {**whole, "top": [{**whole["top"][0], "kin": 3}]},
        {**whole, "winners_tested": "many"}, {**whole, "verdict": {**whole["verdict"], "words": "\ud800"}},
    ]  # fmt: skip
    for text in ("{", "[" * 100_000, *map(json.dumps, damaged)):
        (folder / "outcome.json").write_text(text)
        assert f"{folder / 'outcome.json'}: " in command("report", folder).error, text
    assert not (folder / "report").exists()


def test_an_outcome_of_another_search_is_refused(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "study"
    written(folder, of_one_weight)
    others = {
        "recipes": written(tmp_path / "recipes", of_one_weight, parents=("hub/left", "hub/other")),
        "scores": written(tmp_path / "scores", conflicting),
        "more": written(tmp_path / "more", of_one_weight, 30),
    }
    for name, ledger in others.items():
        run = tmp_path / f"run-{name}"
        run.mkdir()
        ended(run, ledger, top=31 if name == "more" else 3)
        found = command("report", run, "--study", f"sqlite:///{folder / 'study.db'}").error
        assert f"{run / 'outcome.json'}: is of another search" in found
        assert not (run / "report").exists()


def test_a_mean_of_one_document_has_no_error(tmp_path: Path) -> None:
    data = ended(tmp_path / "study", written(tmp_path / "study", of_one_weight))
    data["winner"]["test"] = {**data["winner"]["test"], "stderr": math.nan}
    (tmp_path / "study" / "outcome.json").write_text(json.dumps(data))
    outcome = read_outcome(tmp_path / "study")
    assert outcome is not None
    assert math.isnan(outcome.winner.later["test"].stderr)
    assert outcome.winner.later["val"].stderr == data["winner"]["val"]["stderr"]


def test_a_study_of_tasks_has_no_suite(tmp_path: Path) -> None:
    section = {"suite": "quickstart", "tasks": [{"task": "mine"}], "sampler": "tpe", "seed": 0}
    folder = tmp_path / "study"
    search = search_of(folder, written(folder, of_one_weight, 3, section=section))
    text = Told(report_on(search).page).text
    assert "quickstart" not in text
    assert '"task": "mine"' in text


def test_a_model_of_a_pool_is_the_one_that_was_merged(tmp_path: Path) -> None:
    names = ["hub/a", "hub/b", "hub/c"]
    pool = {"pool": names, "pick": 3, "parameters": {"weight": {"search": [0.0, 1.0]}}}
    places = [f"models.{i}.model" for i in range(3)]
    answers = [
        {**dict(zip(places, found, strict=True)), "models.1.other": other}
        | {f"models.{i}.parameters.weight": 0.5 for i in range(3)}
        for *found, other in product(range(3), range(3), range(3), range(2))
    ]
    folder = tmp_path / "study"
    ledger = answered(folder, {"merge_method": "linear", "models": pool}, answers)
    search = search_of(folder, ledger)
    assert [d.name for d in search.dimensions if "weight" not in d.name] == places
    rows = list(csv.DictReader(io.StringIO(report_on(search).tables["candidates.csv"])))
    assert len(rows) == len(answers)
    for row in rows:
        merged = [each["model"] for each in yaml.safe_load(row["recipe"])["models"]]
        assert [row[place] for place in places] == merged


# -- what it finds out --------------------------------------------------------------------------------


def test_conflicting_tasks_have_a_front_that_nothing_beats(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    objectives = {"objectives": ["suite_left", "suite_right"]}
    search = search_of(folder, written(folder, conflicting, 40, section=objectives))

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    every = {e.number: e.objectives for e in search.entries}
    best = {n for n, own in every.items() if not any(beats(o, own) for o in every.values())}
    assert search.front == best
    assert len(best) >= 5
    front = next(p for p in report_on(search).pictures if p.name == "front")
    searched = best - {0, 1}
    assert searched < best, "a parent is on it too"
    places = len({every[number] for number in searched})
    assert "in all of left, right on dev: " in front.told
    assert f": {len(searched)} candidates and {len(best - searched)} baselines (" in front.told
    assert f"the candidates lie at {places} places" in front.told


def test_importance_goes_to_what_the_score_depends_on(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    found = importance_of(search_of(folder, written(folder, of_one_weight, 40)))
    (shares,) = found.shares.values()
    assert shares["models.0.parameters.weight"] > 0.9
    assert math.isclose(sum(shares.values()), 1.0)


@pytest.mark.parametrize("objectives", [["suite_left", "suite_right"], []])
def test_importance_is_of_each_objective(tmp_path: Path, objectives: list[str]) -> None:
    folder = tmp_path / "study"
    scoring = lambda a, b: {"suite_left": a, "suite_right": b}  # noqa: E731
    ledger = written(folder, scoring, 40, section={"objectives": objectives})
    shares = importance_of(search_of(folder, ledger)).shares
    assert list(shares) == (objectives or ["mean"])
    if objectives:
        left, right = shares.values()
        assert left["models.0.parameters.weight"] > 0.9
        assert right["models.1.parameters.weight"] > 0.9


def test_importance_of_too_few_or_equal_candidates_is_not_told(tmp_path: Path) -> None:
    few = importance_of(search_of(tmp_path / "a", written(tmp_path / "a", of_one_weight, 3)))
    same = lambda a, b: {"suite_one": 0.5}  # noqa: E731
    equal = importance_of(search_of(tmp_path / "b", written(tmp_path / "b", same)))
    assert not few.shares
    assert "fewer" in few.why_not
    assert not equal.shares
    assert "same score" in equal.why_not


def test_names_are_short_and_say_whose_they_are() -> None:
    data = {
        "models": [{"model": "a/b.c", "parameters": {"weight": {"search": [0, 1]}}}],
        "parameters": {"density": {"search": [0, 1]}},
    }
    assert label_of("models.0.parameters.weight", data) == "a/b.c weight"
    assert label_of("parameters.density", data) == "density"
    assert label_of("variants.1.t.0", data) == "variants 1 t 0"
    assert short_names(["x_y_one", "x_y_two"]) == ["one", "two"]
    assert short_names(["x_y", "x_y_two"]) == ["y", "y_two"]
    assert short_names(["alone_here"]) == ["alone_here"]


# -- text of others -----------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A study whose models, tasks, reasons and verdict are what an enemy would write."""
    folder = tmp_path / "hostile"

    def scoring(a: float, b: float) -> dict[str, float]:
        return {HOSTILE[0]: a, HOSTILE[2]: b}

    ledger = written(folder, scoring, parents=HOSTILE[:2], reason=HOSTILE[1] * 3)
    ended(folder, ledger, "".join(HOSTILE))
    return folder


def test_text_of_others_is_shown_and_nothing_else(hostile: Path, command: Command) -> None:
    assert command("report", hostile, "--output", "page").code == 0
    page = Told(Path("page/index.html").read_text())
    assert page.tags.count("script") == 1
    assert not [a for a, _ in page.attributes if a.startswith("on")]
    assert "img" not in page.tags
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page.text)


def test_figures_stay_on_one_line_with_their_signs_and_units() -> None:
    said = "by +12.5 points (95 % interval -17.1 to 2, p = 1.8e-19 by 'x-1.5'; 61.2 ± 0.4), p = 1."
    spans = re.findall("<span class=whole>(.*?)</span>", prose(said))
    assert spans == ["+12.5 points", "95 %", "p = 1.8e-19", "61.2 ± 0.4", "p = 1"]
    for text in (said, *HOSTILE[:2], "&#39; 1 &amp;lt; 2 % 'p = 1", "9" * 400 + " % " + "1." * 400):
        assert Told(prose(text)).text == text


@pytest.mark.parametrize("formula", ["=1+1", "+1+1", "-1+1", "@SUM(A1)", "\t=1+1", "\n=1+1", " -1"])
def test_a_spreadsheet_runs_no_text_and_keeps_numbers(formula: str) -> None:
    text = csv_text([formula, "number"], [[formula, -1.5], [f"said {formula}", -2]])
    found = list(csv.reader(io.StringIO(text)))
    assert found == [[f"'{formula}", "number"], [f"'{formula}", "-1.5"], [f"said {formula}", "-2"]]


def test_a_spreadsheet_of_a_study_runs_nothing(tmp_path: Path) -> None:
    said = ['=HYPERLINK("http://example.invalid")', "@left", "+right", "-task"]
    scoring = lambda a, b: {said[3]: a * a}  # noqa: E731
    ledger = written(tmp_path / "s", scoring, 3, parents=(said[1], said[2]), reason=said[0])
    table = report_on(search_of(tmp_path / "s", ledger)).tables["candidates.csv"]
    told = [cell for row in csv.reader(io.StringIO(table)) for cell in row]
    assert f"'{said[0]}" in told
    for cell in told:
        number = re.fullmatch(r"-?[0-9.e-]+", cell)
        assert number or not cell.lstrip().startswith(("=", "+", "-", "@")), cell


def test_the_same_study_gives_the_same_bytes(tmp_path: Path, command: Command) -> None:
    ended(tmp_path / "study", written(tmp_path / "study", conflicting))
    kept: list[dict[str, bytes]] = []
    for name in ("one", "two"):
        assert command("report", tmp_path / "study", "--output", name).code == 0
        files = sorted(file for file in Path(name).rglob("*") if file.is_file())
        kept.append({str(file.relative_to(name)): file.read_bytes() for file in files})
    assert kept[0] == kept[1]
    assert {f"pictures/{name}.png" for name in PICTURES} <= kept[0].keys()


# -- where it goes ------------------------------------------------------------------------------------


def test_it_lies_in_the_study_and_is_renewed(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "study"
    written(folder, of_one_weight)
    for _ in range(2):
        assert command("report", folder).out == f"{folder / 'report' / 'index.html'}: written\n"


def test_it_takes_the_place_of_nothing_else(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "study"
    written(folder, of_one_weight)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "report.json").write_text("{}")
    assert "is no report; choose another --output" in command("report", folder, "-o", "mine").error


def test_a_database_is_asked_by_the_name_of_the_study(tmp_path: Path, command: Command) -> None:
    folder = tmp_path / "study"
    ledger = written(folder, of_one_weight)
    url = f"sqlite:///{folder / 'study.db'}"
    assert command("report", url).out == "out/report-study/index.html: written\n"
    Ledger.open(f"sqlite:///{tmp_path}/shared.db", "mine-0123", "digest", ledger.facts())
    told = command("report", f"sqlite:///{tmp_path}/shared.db").out
    assert told == "out/report-mine-0123/index.html: written\n"
    assert f"there is {NAME}" in command("report", url, "--name", "other", "-o", "b").error
    Ledger.open(url, "another", "digest", {})
    assert f"The database has another, {NAME}" in command("report", url, "-o", "c").error
    assert command("report", url, "--name", NAME, "-o", "c").code == 0


def test_a_shared_study_ends_in_the_folder_of_a_run(tmp_path: Path, command: Command) -> None:
    folder, run = tmp_path / "database", tmp_path / "run"
    ledger = written(folder, of_one_weight)
    run.mkdir()
    ended(run, ledger, "candidate 2 is better")
    url = f"sqlite:///{folder / 'study.db'}"
    assert command("report", run, "--study", url).code == 0
    assert "Candidate 2 is better." in (run / "report" / "index.html").read_text()
    assert "no such folder" in command("report", tmp_path / "none", "--study", url).error


def test_a_folder_has_no_ending(tmp_path: Path) -> None:
    (tmp_path / "model-1.5").mkdir()
    assert _place(str(tmp_path / "model-1.5"), None) == Path("out/report-model-1-5")
    assert _place(str(tmp_path / "recipe.yaml"), None) == Path("out/report-recipe")


# -- in a browser -------------------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(browser() is None, reason="no browser; TEST_BROWSER names one")


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_it_and_asks_nobody(hostile: Path, command: Command, dark: bool) -> None:
    program: Any = browser()
    assert command("report", hostile, "--output", "page").code == 0
    with opened(program) as page:
        page.open(Path("page/index.html"), dark=dark)
        assert page.said == []
        asked = [url for url in page.requests if not url.startswith("data:")]
        assert asked == [Path("page/index.html").absolute().as_uri()]
        sizes = page.ask(
            "[...document.querySelectorAll('figure svg')].map(s => s.clientWidth * s.clientHeight)"
        )
        assert len(sizes) == len(PICTURES)
        assert all(size > 10_000 for size in sizes)
        assert page.ask("document.title") == "Search hostile"
        ink, ground = (
            sum(map(int, re.findall(r"\d+", page.ask(script))[:3]))
            for script in (
                "getComputedStyle(document.querySelector('figure svg text, figure svg g')).color",
                "getComputedStyle(document.querySelector('figure')).backgroundColor",
            )
        )
        assert (ink > ground) is dark
        wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        assert page.ask(wide)


@needs_browser
def test_a_click_sorts_a_table(tmp_path: Path, command: Command) -> None:
    program: Any = browser()
    written(tmp_path / "study", of_one_weight)
    assert command("report", tmp_path / "study", "--output", "page").code == 0
    heads = "[...document.querySelectorAll('#candidates th button')]"
    column = (
        "[...document.querySelectorAll('#candidates tbody tr')].map(r => r.children[3].textContent)"
    )
    with opened(program) as page:
        page.open(Path("page/index.html"))
        for down in (True, False):
            page.ask(f"{heads}.find(b => b.textContent === 'dev').click()")
            values = [float(text) for text in page.ask(column)]
            assert len(values) == 26
            assert all((a >= b) if down else (a <= b) for a, b in pairwise(values))


@needs_browser
def test_it_is_whole_without_script_and_on_a_narrow_screen(
    tmp_path: Path, command: Command
) -> None:
    program: Any = browser()
    written(tmp_path / "study", of_one_weight)
    assert command("report", tmp_path / "study", "--output", "page").code == 0
    with opened(program) as page:
        page.open(Path("page/index.html"), width=400, scripts=False)
        assert page.said == []
        page.call("Emulation.setScriptExecutionDisabled", value=False)
        assert page.ask("document.querySelectorAll('#candidates tbody tr').length") == 26
        assert page.ask("document.documentElement.scrollWidth") <= 400


def test_pictures_take_the_colour_of_the_page(tmp_path: Path) -> None:
    written(tmp_path / "study", conflicting)
    ledger = Ledger.existing(f"sqlite:///{tmp_path / 'study' / 'study.db'}", NAME)
    for picture in report_on(search_of(tmp_path / "study", ledger)).pictures:
        assert INK not in picture.svg
        assert "currentColor" in picture.svg
        assert "<!DOCTYPE" not in picture.svg
        assert picture.png.startswith(b"\x89PNG")
