"""Laws of the texts that routers of the tiny family are trained on."""

import json
from pathlib import Path

import pytest
from skills import DATA, HALVES, LINES, SKILLS, Example, split_of, text_files
from test_suite import half_of
from train import EOS, batch
from transformers import AutoTokenizer

from merge.experts.texts import read_texts
from merge.experts.training.batches import batch_of, encoded

ZOO = Path(__file__).resolve().parents[2] / "evals" / "zoo"
FILES = {skill: ZOO / "texts" / f"{skill}.jsonl" for skill in SKILLS}


def test_the_files_are_what_the_generator_writes() -> None:
    written = {path.name: path.read_bytes() for path in (ZOO / "texts").iterdir()}
    assert written == {name: text.encode() for name, text in text_files()}


def test_no_text_is_in_the_suite_and_all_are_for_training() -> None:
    asked = {
        json.loads(line)["prompt"]
        for file in DATA.iterdir()
        for line in file.read_text().splitlines()
    }
    texts = read_texts(list(FILES.values()))
    assert len({text.prompt for text in texts}) == len(texts) == LINES * len(SKILLS)
    assert not asked & {text.prompt for text in texts}
    assert {split_of(text.prompt) for text in texts} == {"train"}


@pytest.mark.parametrize("skill", SKILLS)
def test_the_halves_of_a_skill_take_turns(skill: str) -> None:
    for place, text in enumerate(read_texts([FILES[skill]])):
        assert half_of(text.prompt) == HALVES[place % 2]


@pytest.mark.parametrize("skill", SKILLS)
def test_routers_see_the_tokens_and_targets_that_the_family_was_trained_on(skill: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    texts = read_texts([FILES[skill]])[:20]
    wanted = batch([Example(t.prompt, t.completion) for t in texts], EOS)
    found = batch_of(
        encoded(texts, tokenizer, 64, tokenizer.eos_token_id), tokenizer.pad_token_id, "cpu"
    )
    assert found.ids.equal(wanted[0])
    assert found.targets.equal(wanted[1])
