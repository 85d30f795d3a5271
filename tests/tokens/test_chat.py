"""Specialists that end their answers otherwise, merged into one that chats and stops by itself."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from families import contents

from merge.errors import PlanError
from merge.pipeline import run_recipe
from merge.shipped import shipped
from merge.sources.opening import open_model
from merge.tokens.doctor import diagnosed

RECIPE = shipped("recipes/chat.yaml")
LIMIT = 30  # tokens: more than any answer has


def answers(folder: Path, skill: str, count: int = 8) -> Iterator[tuple[str, str, bool]]:
    """(right answer, given answer, whether it stopped by itself) to held-out questions in a chat."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    file = shipped("evals/suites/quickstart/data") / f"{skill}.heldout.jsonl"
    for line in file.read_text().splitlines()[:count]:
        document = json.loads(line)
        asked = [{"role": "user", "content": document["prompt"].removesuffix("=")}]
        prompt = tokenizer.apply_chat_template(
            asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        out = model.generate(**prompt, max_new_tokens=LIMIT)[0, prompt["input_ids"].shape[1] :]
        said = tokenizer.decode(out)
        yield document["answer"], said, said.endswith(tokenizer.eos_token)


def test_a_chat_with_the_merged_model_stops_by_itself(tmp_path: Path) -> None:
    folder = run_recipe(RECIPE, tmp_path / "out").folder
    found = [answer for skill in ("reverse", "roman") for answer in answers(folder, skill)]
    assert all(stopped for _, _, stopped in found)
    right = [said == f"{answer}<|im_end|>" for answer, said, _ in found]
    assert sum(right) >= 14  # of 16; its parents each fail one half of the skills
    assert diagnosed([open_model(str(folder))]) == []


def test_without_its_lines_about_stopping_it_is_refused_with_those_lines(tmp_path: Path) -> None:
    text = RECIPE.read_text(encoding="utf-8")
    start, end = text.index("stop:"), text.index("chat_template:")
    (tmp_path / "r.yaml").write_text(text[:start] + text[end:], encoding="utf-8")
    with pytest.raises(
        PlanError, match=r"zoo:base stops at 2 '</s>' .*zoo:clerk at 69 '<\|im_end\|>'"
    ) as refused:
        run_recipe(tmp_path / "r.yaml", tmp_path / "out")
    assert "stop: {eos: </s>, unify: [{from: <|im_end|>" in str(refused.value)


def test_the_seed_of_hashing_changes_no_byte(tmp_path: Path) -> None:
    run = "import sys, pathlib; from merge.pipeline import run_recipe as run; "
    run += "run(sys.argv[1], pathlib.Path(sys.argv[2]))"
    results = []
    for seed in ("1", "2"):
        out, environment = tmp_path / seed, {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", run, str(RECIPE), str(out)]
        subprocess.run(command, env=environment, check=True, capture_output=True)
        results.append(contents(out))
    assert results[0] == results[1]
