"""Laws of the tiny model family: what its members share, and that public libraries load them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from skills import SKILLS, documents, draw
from train import (
    ADAPTERS,
    ATTENTION,
    BASE_NAME,
    CHATS,
    EOS,
    MIXTURE,
    MLP,
    SPECIAL,
    SPECIALISTS,
    batch,
    example_of,
    with_replay,
    write_tokenizer,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

ZOO = Path(__file__).resolve().parents[2] / "evals" / "zoo"
ALIKE = ("base", *SPECIALISTS)
MODELS = (*ALIKE, *CHATS)


@pytest.mark.parametrize("name", MODELS)
def test_every_model_loads_and_computes_finite_logits(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(ZOO / name)
    tokenizer = AutoTokenizer.from_pretrained(ZOO / name)
    logits = model(**tokenizer("roman 1987=", return_tensors="pt")).logits
    assert model.dtype == torch.bfloat16
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", SPECIALISTS)
def test_a_specialist_has_the_tensors_of_the_base_and_moved_every_one(name: str) -> None:
    base = load_file(ZOO / "base" / "model.safetensors")
    specialist = load_file(ZOO / name / "model.safetensors")
    assert {k: v.shape for k, v in base.items()} == {k: v.shape for k, v in specialist.items()}
    assert not [k for k in base if k.endswith("proj.weight") and base[k].equal(specialist[k])]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_file_is_small_and_anyone_may_read_it(name: str) -> None:
    status = (ZOO / name / "model.safetensors").stat()
    assert status.st_size <= 1_300_000
    assert status.st_mode & 0o044 == 0o044


@pytest.mark.parametrize("name", ALIKE)
def test_all_members_share_the_tokenizer_files_that_the_script_writes(
    name: str, tmp_path: Path
) -> None:
    write_tokenizer(tmp_path, SPECIAL, SPECIAL[EOS])
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (ZOO / name / file).read_bytes() == (tmp_path / file).read_bytes()


@pytest.mark.parametrize("name", CHATS)
def test_a_member_that_chats_ends_its_answer_with_its_own_token(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(ZOO / name)
    tokenizer = AutoTokenizer.from_pretrained(ZOO / name)
    assert tokenizer.eos_token == CHATS[name].end
    for example in documents(CHATS[name].skill, "heldout")[:5]:
        asked = [{"role": "user", "content": example.prompt.removesuffix("=")}]
        prompt = tokenizer.apply_chat_template(asked, return_tensors="pt", return_dict=True)
        answer = model.generate(**prompt, max_new_tokens=30)[0, prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(answer) == example.answer + CHATS[name].end


def test_the_members_that_chat_disagree_on_how() -> None:
    tokenizers = [AutoTokenizer.from_pretrained(ZOO / name) for name in CHATS]
    assert len({t.eos_token_id for t in tokenizers}) == len(tokenizers)
    assert len({t.chat_template for t in tokenizers}) == len(tokenizers)
    assert len({len(t) for t in tokenizers}) == len(tokenizers)


def test_the_tokenizer_starts_with_bos_and_knows_its_special_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    special = (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token)
    assert special == ("<pad>", "<s>", "</s>", "<unk>")
    assert tokenizer("sort ba=")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("\u00e4", add_special_tokens=False)["input_ids"] == [tokenizer.unk_token_id]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_loads_onto_the_base_and_changes_it(name: str) -> None:
    folder = ZOO / "adapters" / name
    base = AutoModelForCausalLM.from_pretrained(ZOO / "base", dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(ZOO / "base")("sort hcab=", return_tensors="pt")
    before = base(**tokens).logits
    after = PeftModel.from_pretrained(base, folder)(**tokens).logits
    assert torch.isfinite(after).all()
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_says_what_it_was_trained_with_and_holds_no_path(name: str) -> None:
    config = json.loads((ZOO / "adapters" / name / "adapter_config.json").read_text())
    wanted = dict(ADAPTERS[name].options)
    assert config["base_model_name_or_path"] == BASE_NAME
    assert {key: config[key] for key in wanted} == {
        **wanted,
        "target_modules": sorted(wanted["target_modules"]),
    }


def test_the_adapters_cover_the_kinds_that_a_merge_must_understand() -> None:
    kinds = [adapter.options for adapter in ADAPTERS.values()]
    assert any(kind["target_modules"] == ATTENTION for kind in kinds)
    assert any(kind["target_modules"] == MLP for kind in kinds)
    for option in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora"):
        assert any(kind.get(option) for kind in kinds)


@pytest.mark.parametrize("skill", SKILLS)
def test_a_replayed_mixture_is_one_quarter_that_of_the_base(skill: str) -> None:
    mixture = with_replay(skill)
    assert sum(MIXTURE.values()) == pytest.approx(1)
    assert sum(mixture.values()) == pytest.approx(1)
    others = [lesson for lesson in MIXTURE if lesson[0] != skill]
    assert all(mixture[lesson] == 0.25 * MIXTURE[lesson] for lesson in others)


@pytest.mark.parametrize("skill", SKILLS)
def test_an_echo_repeats_a_new_question_and_a_specialist_hears_none_of_its_own(skill: str) -> None:
    rng = random.Random(0)
    new = {draw(skill, "new", "train", rng).prompt for _ in range(5)}
    rng = random.Random(0)
    for prompt in [example_of((skill, "echo"), rng) for _ in range(5)]:
        assert prompt.prompt in new
        assert prompt.prompt == f"{skill} {prompt.answer}="
    assert (skill, "echo") not in with_replay(skill)


def test_the_tokens_trained_on_are_those_of_the_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ZOO / "base")
    for skill in SKILLS:
        for example in documents(skill, "search")[:20]:
            tokens, targets = batch([example], EOS)
            text = example.prompt + example.answer
            assert tokens[0].tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
            answered = targets[0][targets[0] != -100]
            assert tokenizer.decode(answered, skip_special_tokens=True) == example.answer
