"""No chat with a result has an id without a row: whatever is said in it, and whoever seems to say it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from chain import EMBED, HEAD
from families import write_recipe
from german import german_models
from hypothesis import given, settings
from hypothesis import strategies as st
from methods.cases import read_values
from numbered import ids_of, write_rows

from merge.errors import PlanError
from merge.pipeline import run_recipe
from merge.shipped import shipped
from merge.sources.model import read_json
from merge.tokens.sections import TemplateSection
from merge.tokens.templates import BUILTIN, templated
from merge.tokens.vocabulary import Vocabulary, folder_files, read_vocabulary

PUBLISHED = Path(__file__).parents[3] / "shared/real/tokenizers/templates/chat_templates"
CONTROLS = tuple(dict.fromkeys(text for texts in BUILTIN.values() for text in texts))
LIKE = (
    "<|im_", "end|>", "<|nobody|>", "<|reserved_special_token_247|>", "<0x0A>", "<0xFF>", "[INST]",
    "[/INST]", "<s>", "</s>", "<unk>", "<|endoftext|>", "<|end_of_text|>", "<<SYS>>", "\0", "\n\n", "🙂",
)  # fmt: skip
Messages = list[dict[str, str]]


def conversations(texts: st.SearchStrategy[str]) -> st.SearchStrategy[Messages]:
    """A system message or none, and turns; or messages of any roles in any order."""
    system = st.lists(texts, max_size=1).map(lambda said: [("system", text) for text in said])
    turns = st.lists(texts, min_size=1, max_size=4).map(
        lambda said: [(("user", "assistant")[i % 2], text) for i, text in enumerate(said)]
    )
    roles = st.sampled_from(["system", "user", "assistant", "tool"]) | texts
    free = st.lists(st.tuples(roles, texts), min_size=1, max_size=4)
    proper = st.tuples(system, turns).map(lambda parts: parts[0] + parts[1])
    return (proper | free).map(lambda said: [{"role": r, "content": t} for r, t in said])


def check(folder: Path, templates: Sequence[str | None]) -> None:
    """The law for the result in `folder` with each of `templates`; None is its own."""
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stored = read_values(folder)
    rows = min(len(stored[name]) for name in {EMBED, HEAD} & stored.keys())
    added = {t["content"]: t["id"] for t in read_json(folder / "tokenizer.json")["added_tokens"]}
    like = st.sampled_from([*CONTROLS, *LIKE, *[*added][:20], *[*added][-20:]])
    texts = st.lists(like | st.text(max_size=6), max_size=5).map("".join)
    written: set[int] = set()

    @settings(max_examples=50)
    @given(st.sampled_from(templates), conversations(texts), st.booleans())
    def law(template: str | None, messages: Messages, prompt: bool) -> None:
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
            )
        except TemplateError:
            return  # a template may refuse messages; then nothing is said
        ids = tokenizer(text, add_special_tokens=False).input_ids
        written.update(ids)
        assert all(i < rows for i in ids)

    law()
    assert written & {*added.values()}  # control tokens are among what was said


def accepted(result: Vocabulary, sections: Mapping[str, Any]) -> list[str]:
    """Those of the templates that the result can have."""
    found = []
    for label, section in sections.items():
        try:
            templated(result, {}, TemplateSection.model_validate(section), "", Path())
        except PlanError:
            continue
        found.append(label)
    return found


def builtin(name: str) -> str:
    return (Path(templated.__code__.co_filename).parent / "builtin" / f"{name}.jinja").read_text()


def published() -> dict[str, str]:
    """As their makers publish them: the indentation and the line ends are for reading."""
    texts = {file.stem: file.read_text() for file in sorted(PUBLISHED.glob("*.jinja"))}
    return {
        name: text if text.startswith("{%-") else text.replace("    ", "").replace("\n", "")
        for name, text in texts.items()
    }


@pytest.mark.parametrize(
    ("name", "adds"),
    [("mistral_v1", False), ("mistral_v1", True), ("mistral_v3", True),
     ("llama3", True), ("gpt2", True)],
)  # fmt: skip
def test_with_every_template_that_a_real_vocabulary_can_have(
    name: str, adds: bool, real_tokenizers: Path, tmp_path: Path
) -> None:
    """adds: the recipe adds the control tokens of all built-in templates. No row is there to spare."""
    table = read_json(real_tokenizers / name / "tokenizer.json")
    told = read_json(real_tokenizers / name / "tokenizer_config.json")
    write_rows(tmp_path / "m", table, told, seed=1, padding=8)
    lacking = [text for text in CONTROLS if adds and text not in ids_of(table)]
    recipe: dict[str, Any] = {"model": "m", "chat_template": "zephyr"}
    recipe["tokenizer"] = {"tokens": {text: {} for text in lacking}, "keep_padding": False}
    if adds:
        recipe |= {"chat_template": "chatml", "stop": {"eos": "<|im_end|>"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    out = run_recipe(tmp_path / "r.yaml", tmp_path / "out").folder
    result = read_vocabulary("the result", folder_files(out))
    assert result is not None
    assert len(read_values(out)[EMBED]) == result.size == len(ids_of(table)) + len(lacking)
    found = accepted(result, {label: f"builtin:{label}" for label in BUILTIN})
    assert {label for label, texts in BUILTIN.items() if adds or not texts} <= {*found}
    templates = [builtin(label) for label in found]
    if (name, adds) == ("mistral_v1", True):
        others = published()
        templates += [
            others[n] for n in accepted(result, {n: {"text": t} for n, t in others.items()})
        ]
    check(out, [None, *templates])


@pytest.fixture(scope="module")
def german(tmp_path_factory: pytest.TempPathFactory, real_tokenizers: Path) -> Path:
    """A folder with the four German models, heads tied."""
    folder = tmp_path_factory.mktemp("german")
    german_models(folder, real_tokenizers, tied=True)
    return folder


UNIFY = {"from": "</s>", "to": "<|im_end|>", "models": ["leo", "kafka"]}
OWN: Mapping[str, Mapping[str, Any]] = {
    "ChatML": {
        "stop": {"eos": "<|im_end|>", "unify": UNIFY},
        "chat_template": {"from": "model:disco"},
    },
    # whose vocabulary has no <|im_end|>: said in a chat it is text
    "INST": {
        "tokenizer": {"source": "base", "specials": "base"},
        "stop": {"eos": "</s>", "also": "none"},
        "chat_template": {"from": "model:kafka"},
    },
}


@pytest.mark.parametrize("kind", OWN)
def test_with_a_models_own_template(kind: str, german: Path, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models={german / name: {"weight": 1.0} for name in ("leo", "disco", "sauerkraut", "kafka")},
        merge_method="linear",
        base_model=str(german / "leo"),
        **OWN[kind],
    )
    check(run_recipe(recipe, tmp_path / "out").folder, [None])


@pytest.mark.parametrize("recipe", ["chat", "retoken"])
def test_with_the_template_of_a_recipe_that_comes_along(recipe: str, tmp_path: Path) -> None:
    check(run_recipe(shipped(f"recipes/{recipe}.yaml"), tmp_path / "out").folder, [None])
