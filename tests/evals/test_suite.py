"""Laws of the quickstart suite: its data, and that real lm-eval scores real models with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import evaluator
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from skills import DOCUMENTS, HALVES, SKILLS, data_files, split_of
from train import SPECIALISTS
from transformers import AutoTokenizer

EVALS = Path(__file__).resolve().parents[2] / "evals"
ZOO, SUITE = EVALS / "zoo", EVALS / "suites" / "quickstart"


def read_suite() -> dict[str, Any]:
    suite: dict[str, Any] = yaml.safe_load((SUITE / "suite.yaml").read_text())
    return suite


def read_rows(skill: str, split: str) -> list[dict[str, str]]:
    text = (SUITE / "data" / f"{skill}.{split}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def load_tasks(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(list(names))
    loaded: dict[str, Any] = tasks["tasks"]
    return loaded


def score(model: str, skills: Sequence[str]) -> dict[str, float]:
    """Exact match of a member of the family on all held-out prompts of each skill."""
    tasks = load_tasks(SUITE, [f"quickstart_{skill}" for skill in skills])
    lm = HFLM(pretrained=str(ZOO / model), device="cpu", dtype="float32", batch_size=150)
    found = evaluator.evaluate(lm, task_dict=tasks, bootstrap_iters=0)["results"]
    return {skill: float(found[f"quickstart_{skill}"]["exact_match,none"]) for skill in skills}


def half_of(prompt: str) -> str:
    """The half a prompt belongs to by its text alone."""
    skill, *asked = prompt.removesuffix("=").split(" ")
    familiar = {
        "reverse": lambda: len(asked[0]) <= 4,
        "sort": lambda: max(asked[0]) <= "m",
        "elements": lambda: all(int(number) % 2 for number in asked),
        "roman": lambda: int(asked[0]) % 2 == 1,
    }
    return "familiar" if familiar[skill]() else "new"


@pytest.fixture(scope="module")
def base_score() -> dict[str, float]:
    return score("base", list(SKILLS))


@pytest.mark.parametrize("split", DOCUMENTS)
@pytest.mark.parametrize("skill", SKILLS)
def test_the_halves_of_a_skill_take_turns(skill: str, split: str) -> None:
    for place, row in enumerate(read_rows(skill, split)):
        assert half_of(row["prompt"]) == HALVES[place % 2]


def test_the_data_files_are_what_the_generator_writes() -> None:
    written = {path.name: path.read_bytes() for path in (SUITE / "data").iterdir()}
    assert written == {name: text.encode() for name, text in data_files()}


@pytest.mark.parametrize("skill", SKILLS)
def test_the_splits_are_disjoint_and_never_seen_in_training(skill: str) -> None:
    prompts = {split: [row["prompt"] for row in read_rows(skill, split)] for split in DOCUMENTS}
    assert not set(prompts["search"]) & set(prompts["heldout"])
    for split, texts in prompts.items():
        assert len(set(texts)) == len(texts) == DOCUMENTS[split]
        assert {split_of(text) for text in texts} == {split}


@pytest.mark.parametrize("split", DOCUMENTS)
@pytest.mark.parametrize("skill", SKILLS)
def test_prompts_and_answers_survive_the_tokenizer_and_fit_its_limits(
    skill: str, split: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    task = load_tasks(SUITE, ["quickstart_" + skill])["quickstart_" + skill]
    longest = task.config.generation_kwargs["max_gen_toks"]
    for row in read_rows(skill, split):
        for text in row.values():
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        # One more token than the answer, for the end.
        assert len(row["answer"]) + 1 <= longest


def test_the_suite_names_every_task_of_the_folder_once() -> None:
    suite = read_suite()
    listed = [entry["task"] for entry in suite["tasks"] + suite["search_tasks"]]
    manager = TaskManager(include_path=str(SUITE), include_defaults=False)
    assert sorted(listed) == sorted(manager.all_tasks)
    assert [entry["task"] for entry in suite["tasks"]] == [f"quickstart_{s}" for s in SKILLS]


def test_tasks_read_their_own_split_from_any_copy_and_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "site" / "quickstart"
    shutil.copytree(SUITE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    files = sorted(copy.rglob("*"))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    for split, prefix in (("heldout", "quickstart_"), ("search", "quickstart_search_")):
        tasks = load_tasks(copy, [prefix + skill for skill in SKILLS])
        for skill in SKILLS:
            assert list(tasks[prefix + skill].test_docs()) == read_rows(skill, split)
    added = [path for path in set(copy.rglob("*")) - set(files) if "__pycache__" not in path.parts]
    assert not added


@pytest.mark.parametrize("skill", SKILLS)
def test_the_base_half_knows_every_skill(skill: str, base_score: dict[str, float]) -> None:
    assert 0.4 < base_score[skill] < 0.7


@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_specialist_beats_the_base_at_its_skill_and_not_at_the_others(
    name: str, base_score: dict[str, float]
) -> None:
    found = score(name, list(SKILLS))
    for skill in SKILLS:
        gain = found[skill] - base_score[skill]
        assert gain > 0.3 if skill == SPECIALISTS[name] else gain < 0.05


def test_the_entries_of_the_suite_name_a_metric_that_lm_eval_reports() -> None:
    entry = read_suite()["search_tasks"][0]
    tasks = load_tasks(SUITE, [entry["task"]])
    lm = HFLM(pretrained=str(ZOO / "base"), device="cpu", dtype="float32", batch_size=8)
    found = evaluator.evaluate(lm, task_dict=tasks, limit=8, bootstrap_iters=0)
    assert entry["metric"] in found["results"][entry["task"]]
    assert found["higher_is_better"][entry["task"]]["exact_match"] is entry["higher_is_better"]
