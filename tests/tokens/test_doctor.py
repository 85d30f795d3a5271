"""Clean models have no finding; each way to break one has the finding of its own code and no other."""

import json
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mutations as m
import numpy as np
import pytest
import yaml
from families import drawn, typed, write_model, write_recipe
from german import ANSWER, CHATML, IM_END, IM_START, INST, german_models
from numpy.typing import NDArray
from ran import Ran

from merge.pipeline import run_recipe
from merge.shipped import shipped
from merge.sources import Source, TensorInfo
from merge.sources.model import Model
from merge.sources.opening import open_model
from merge.tokens.codes import CODES
from merge.tokens.doctor import diagnosed, examined_files, recipe_lines
from merge.tokens.findings import Finding
from merge.tokens.sections import StopSection, TemplateSection, TokenizerSection
from merge.tokens.vocabularies import Vocabularies
from merge.tokens.vocabulary import Vocabulary, read_vocabulary

REAL = Path(__file__).parents[3] / "shared/real"
ZOO = ("base", "chemist", "reverser", "scribe", "sorter")


def examined(model: Model) -> list[Finding]:
    """What is found in one model, without asking transformers."""
    return diagnosed([model], load=False)


def compared(models: Sequence[Model]) -> list[Finding]:
    """What is found between models."""
    return [finding for finding in diagnosed(models, load=False) if len(finding.models) > 1]


def vocabulary_of(model: Model) -> Vocabulary:
    return Vocabularies().of(model)


def equal_rows(values: NDArray[Any], a: int, b: int) -> None:
    values[b] = values[a]


def nan_row(values: NDArray[Any]) -> None:
    values[7, 3] = 0x7FC0


def ends_with(text: str, i: int) -> m.Mutation:
    def append(data: dict[str, Any]) -> None:
        processor = data["post_processor"]
        processor["single"].append({"SpecialToken": {"id": text, "type_id": 0}})
        processor["special_tokens"][text] = {"id": text, "ids": [i], "tokens": [text]}

    return m.tokenizer(append)


def wrong_begin(data: dict[str, Any]) -> None:
    data["post_processor"]["special_tokens"]["<s>"]["ids"] = [3]


def other_end(text: str, i: int) -> m.Mutation:
    return m.together(
        m.config(eos_token_id=i), m.generation(eos_token_id=i), m.settings(eos_token=text)
    )


# of zoo:base, whose tokens are <pad> <s> </s> <unk> and characters, tied, bfloat16
BROKEN = [
    ("id-beyond-rows", "error", m.put_token(69, "<|more|>")),
    ("vocab-size-differs", "error", m.config(vocab_size=70)),
    ("eos-disagrees", "error", m.config(eos_token_id=3)),
    ("eos-disagrees", "error", m.settings(eos_token="<unk>")),
    ("eos-disagrees", "error", ends_with("<unk>", 3)),
    ("eos-missing", "error", m.generation(eos_token_id=None)),
    ("eos-missing", "error", m.edited("generation_config.json", lambda d: d.pop("eos_token_id"))),
    ("eos-unknown", "error", m.generation(eos_token_id=[2, 777])),
    ("eos-unknown", "error", m.settings(eos_token="<|end|>")),
    (
        "stale-special-tokens-map",
        "error",
        m.edited("special_tokens_map.json", lambda d: d.update(eos_token={"content": "<unk>"})),
    ),
    (
        "stale-special-tokens-map",
        "warning",
        m.together(
            m.settings(added_tokens_decoder={}),
            m.edited("special_tokens_map.json", lambda d: d.update(eos_token="<unk>")),
        ),
    ),
    ("pad-is-eos", "warning", m.settings(pad_token="</s>")),
    ("added-id-moves", "error", m.change_token("<pad>", id=3)),
    (
        "added-id-moves",
        "error",
        m.together(m.more_rows(9), m.put_token(70, "<|after a hole|>")),
    ),
    (
        "added-tokens-differ",
        "error",
        m.settings(added_tokens_decoder={"2": m.added_token(2, "<unk>")}),
    ),
    ("post-processor-ids", "error", m.tokenizer(wrong_begin)),
    ("tying-disagrees", "error", m.config(tie_word_embeddings=False)),
    ("tying-disagrees", "error", m.own_head(lambda head: equal_rows(head, 4, 0))),
    ("row-zero", "error", m.rows(m.EMBEDDING, lambda v: v[2].fill(0))),
    ("row-zero", "error", m.rows(m.EMBEDDING, lambda v: v[40].fill(0x8000))),
    ("row-not-finite", "error", m.rows(m.EMBEDDING, nan_row)),
    ("row-duplicate", "error", m.rows(m.EMBEDDING, lambda v: equal_rows(v, 2, 9))),
    ("row-duplicate", "warning", m.rows(m.EMBEDDING, lambda v: equal_rows(v, 8, 9))),
]
# the same, made to no longer fit zoo:base
UNLIKE = [
    ("token-id-differs", "error", m.swap_pieces("a", "b")),
    ("id-token-differs", "error", m.rename_piece("a", "ß")),
    ("tokens-added", "warning", m.put_token(69, "<|more|>")),
    ("eos-differs", "error", other_end("<unk>", 3)),
    ("eos-differs", "error", m.generation(eos_token_id=[2, 3])),
    ("eos-differs", "error", m.settings(eos_token="<unk>")),
    ("flags-differ", "warning", m.change_token("</s>", lstrip=True)),
    (
        "normalizer-differs",
        "warning",
        m.tokenizer(lambda d: d.update(normalizer={"type": "Lowercase"})),
    ),
    (
        "pre-tokenizer-differs",
        "warning",
        m.tokenizer(lambda d: d.update(pre_tokenizer={"type": "Whitespace"})),
    ),
    (
        "merges-differ",
        "warning",
        m.tokenizer(lambda d: d["model"].update(merges=["a b"])),
    ),
    ("padded-vocabulary", "warning", m.more_rows(3)),
    ("architecture-differs", "error", m.config(model_type="mistral")),
    ("heads-differ", "error", m.config(num_attention_heads=8)),
    (
        "shape-differs",
        "error",
        m.tensors(lambda d: d.pop("model.layers.3.mlp.up_proj.weight")),
    ),
    (
        "rope-differs",
        "warning",
        m.config(rope_parameters={"rope_theta": 1e6, "rope_type": "default"}),
    ),
    (
        "rope-differs",
        "warning",
        m.config(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters=None),
    ),
    ("tying-differs", "warning", m.together(m.own_head(), m.config(tie_word_embeddings=False))),
    ("settings-differ", "warning", m.config(rms_norm_eps=1e-5)),
    (
        "dtype-differs",
        "warning",
        m.tensors(lambda d: d.update({n: ("F16", v) for n, (_, v) in d.items()})),
    ),
]
# of disco, which has ChatML and stops at <|im_end|>
CHATTING = [
    ("template-twice", "warning", m.text_file("chat_template.jinja", INST)),
    ("template-broken", "error", m.settings(chat_template="{% for")),
    ("template-never-stops", "error", m.settings(chat_template=CHATML.replace(IM_END, IM_START))),
    ("template-unspellable", "warning", m.settings(chat_template="<|begin|>" + CHATML)),
    ("template-prompt-differs", "warning", m.settings(chat_template=CHATML + "Antwort: ")),
    ("template-double-bos", "error", m.settings(chat_template="<s><s>" + CHATML)),
    (
        "template-unknown-text",
        "warning",
        m.tokenizer(lambda d: d["model"].update(byte_fallback=False)),
    ),
    ("tokenizer-broken", "error", m.tokenizer(lambda d: d.update(decoder={"type": "Nonsense"}))),
]
ELSEWHERE = {
    "control-token-missing",
    "template-differs",
    "template-id-beyond-rows",
    "tokenizer-ids-differ",
    "tokenizer-not-loaded",
}


def mutated(source: Path, folder: Path, mutation: m.Mutation) -> Model:
    shutil.copytree(source, folder)
    mutation(folder)
    return open_model(str(folder))


def coded(findings: list[Finding]) -> set[tuple[str, str]]:
    assert all(f.what and "\n" not in f.what for f in findings)
    return {(f.code, f.severity) for f in findings}


@pytest.fixture(scope="module")
def german(
    tmp_path_factory: pytest.TempPathFactory, real_tokenizers: Path
) -> Callable[[bool], dict[str, Path]]:
    made: dict[bool, dict[str, Path]] = {}

    def models(tied: bool) -> dict[str, Path]:
        if tied not in made:
            folder = tmp_path_factory.mktemp("german")
            made[tied] = german_models(folder, real_tokenizers, tied=tied)
        return made[tied]

    return models


def test_every_code_is_explained_and_tested() -> None:
    assert {code for code, *_ in BROKEN + UNLIKE + CHATTING} | ELSEWHERE == CODES.keys()


def test_the_tiny_family_has_no_finding() -> None:
    models = [open_model(f"zoo:{name}") for name in ZOO]
    chatting = [open_model(f"zoo:{name}") for name in ("mirror", "clerk")]
    assert [f for model in models + chatting for f in examined(model)] == []
    assert compared(models) == []


def test_a_pretrained_model_has_no_finding() -> None:
    if not (REAL / "stories260k").is_dir():
        pytest.skip("the real model does not lie beside the repository")
    assert diagnosed([open_model(str(REAL / "stories260k"))]) == []


@pytest.mark.parametrize("name", ["llama2", "llama3", "mistral_v1", "mistral_v3", "gpt2"])
def test_models_with_real_tokenizers_have_no_finding(
    name: str, tmp_path: Path, real_tokenizers: Path
) -> None:
    shutil.copytree(real_tokenizers / name, tmp_path, dirs_exist_ok=True)
    plain = open_model(str(write_model(tmp_path, typed(drawn(1)))))
    vocabulary = vocabulary_of(plain)
    eos = vocabulary.ids[vocabulary.named("eos_token") or ""]
    like = {m.EMBEDDING: (vocabulary.size, 4), m.HEAD: (vocabulary.size, 4)}
    told = {"eos_token_id": eos, "vocab_size": vocabulary.size, "tie_word_embeddings": False}
    write_model(tmp_path, typed(drawn(1, like)), config=told)
    assert examined(open_model(str(tmp_path))) == []


@pytest.mark.parametrize("tied", [False, True])
def test_each_german_model_is_whole(tied: bool, german: Callable[[bool], dict[str, Path]]) -> None:
    models = [open_model(str(folder)) for folder in german(tied).values()]
    assert [f for model in models for f in examined(model)] == []


@pytest.mark.parametrize(("code", "severity", "mutation"), BROKEN)
def test_a_broken_model_has_the_finding_of_its_own_code(
    code: str, severity: str, mutation: m.Mutation, tmp_path: Path
) -> None:
    model = mutated(shipped("evals/zoo/base"), tmp_path / "broken", mutation)
    assert coded(examined(model)) == {(code, severity)}


@pytest.mark.parametrize(("code", "severity", "mutation"), UNLIKE)
def test_a_model_that_no_longer_fits_has_the_finding_of_its_own_code(
    code: str, severity: str, mutation: m.Mutation, tmp_path: Path
) -> None:
    model = mutated(shipped("evals/zoo/base"), tmp_path / "unlike", mutation)
    base = open_model("zoo:base")
    assert coded(compared([base, model])) == {(code, severity)}
    assert coded(compared([model, base])) == {(code, severity)}


@pytest.mark.parametrize(("code", "severity", "mutation"), BROKEN + UNLIKE)
def test_a_fix_is_lines_of_the_recipe_language(
    code: str, severity: str, mutation: m.Mutation, tmp_path: Path
) -> None:
    model = mutated(shipped("evals/zoo/base"), tmp_path / "other", mutation)
    checked(recipe_lines([*compared([open_model("zoo:base"), model]), *examined(model)]))


def checked(lines: str) -> dict[str, Any]:
    section: dict[str, Any] = yaml.safe_load(lines) or {}
    known = {"tokenizer": TokenizerSection, "stop": StopSection, "chat_template": TemplateSection}
    assert section.keys() <= known.keys()
    return {key: known[key].model_validate(value) for key, value in section.items()}


def test_files_alone_are_examined_without_tensors() -> None:
    model = open_model("zoo:base")
    assert examined_files(vocabulary_of(model), None) == []
    grown = vocabulary_of(model).files | {"generation_config.json": b"{}"}
    planned = read_vocabulary("out", grown, rows=69)
    assert planned is not None
    assert coded(examined_files(planned, None)) == {("eos-missing", "error")}


def test_the_german_case_names_ids_and_files_and_the_lines_that_resolve_it(
    tmp_path: Path, german: Callable[[bool], dict[str, Path]], command: Callable[..., Ran],
) -> None:  # fmt: skip
    for name, folder in german(False).items():
        (tmp_path / name).symlink_to(folder)
    ran = command("doctor", "leo", "disco", "sauerkraut", "kafka")
    assert ran.code == 1
    (line,) = [line for line in ran.out.splitlines() if "eos-differs" in line]
    assert "leo stops at 2 '</s>' (generation_config.json)" in line
    assert "disco at 32000 '<|im_end|>' (generation_config.json)" in line
    section = checked(ran.out.partition("add to the recipe:\n")[2])
    assert section["stop"].eos == "<|im_end|>"
    (unify,) = section["stop"].unify
    assert (unify.from_, unify.to, unify.models) == ("</s>", "<|im_end|>", ["leo", "kafka"])
    assert section["chat_template"].from_ == "model:disco"
    told = json.loads(command("doctor", "leo", "disco", "sauerkraut", "kafka", "--json").out)
    by_code = {f["code"]: f for f in told["findings"]}
    assert by_code.keys() == {"eos-differs", "template-differs", "control-token-missing"}
    assert by_code["eos-differs"]["evidence"]["kafka"]["ids"] == [2]
    assert by_code["eos-differs"]["evidence"]["disco"]["ids_by_file"] == {
        "generation_config.json": [32000], "config.json": [32000], "tokenizer_config.json": [32000],
    }  # fmt: skip
    assert by_code["template-differs"]["evidence"]["without"] == ["leo"]
    assert yaml.safe_load(told["fix"])["stop"]["eos"] == "<|im_end|>"


@pytest.mark.parametrize("tied", [False, True])
def test_the_lines_that_doctor_proposes_make_a_result_that_is_whole_and_stops(
    tied: bool, tmp_path: Path, german: Callable[[bool], dict[str, Path]]
) -> None:
    for name, folder in german(tied).items():
        (tmp_path / name).symlink_to(folder)
    lines = recipe_lines(compared([open_model(name, [tmp_path]) for name in german(tied)]))
    models = {name: {"weight": 1.0} for name in german(tied)}
    recipe = write_recipe(
        tmp_path / "r.yaml", models=models, base_model="leo", merge_method="linear"
    )
    recipe.write_text(recipe.read_text() + lines)
    out = run_recipe(recipe, tmp_path / "out").folder
    assert diagnosed([open_model(str(out))]) == []
    assert answered(out) == [ANSWER, IM_END]


def answered(folder: Path) -> list[str]:
    """The tokens with which the model answers a question in its own template, at most 8."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "Geht es?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(folder)
        out = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return list(tokenizer.convert_ids_to_tokens(out))


def test_a_name_that_others_wrote_does_not_reach_the_terminal_as_it_is(
    tmp_path: Path, command: Callable[..., Ran]
) -> None:
    mutated(shipped("evals/zoo/base"), tmp_path / "model", m.config(model_type="a\n\x1b[31mb"))
    ran = command("doctor", "zoo:base", "model")
    assert ran.code == 1
    assert ran.out.isascii()
    assert "\x1b" not in ran.out
    assert "a??[31mb" in ran.out


def test_models_with_one_end_and_template_fit(german: Callable[[bool], dict[str, Path]]) -> None:
    models = german(True)
    assert compared([open_model(str(models[name])) for name in ("disco", "sauerkraut")]) == []


def test_templates_are_compared_with_their_tokens(
    tmp_path: Path, german: Callable[[bool], dict[str, Path]]
) -> None:
    disco = german(True)["disco"]
    whole = open_model(str(disco))
    other = mutated(disco, tmp_path / "a", m.settings(chat_template=INST))
    assert coded(compared([whole, other])) == {("template-differs", "error")}
    without = mutated(
        disco, tmp_path / "b", m.edited("tokenizer_config.json", lambda d: d.pop("chat_template"))
    )
    assert coded(compared([without, whole])) == {("template-differs", "warning")}
    silent = mutated(disco, tmp_path / "c", m.drop_token("<|im_start|>"))
    assert coded(compared([whole, silent])) == {("control-token-missing", "error")}


@pytest.mark.parametrize(("code", "severity", "mutation"), CHATTING)
def test_a_broken_chat_has_the_finding_of_its_own_code(
    code: str,
    severity: str,
    mutation: m.Mutation,
    tmp_path: Path,
    german: Callable[[bool], dict[str, Path]],
) -> None:
    model = mutated(german(True)["disco"], tmp_path / "broken", mutation)
    assert coded(examined(model)) == {(code, severity)}


def test_a_template_that_is_twice_the_same_is_no_finding(
    tmp_path: Path, german: Callable[[bool], dict[str, Path]]
) -> None:
    same = m.text_file("chat_template.jinja", CHATML)
    assert examined(mutated(german(True)["disco"], tmp_path / "same", same)) == []


def test_a_template_that_writes_a_token_without_a_row(
    tmp_path: Path, german: Callable[[bool], dict[str, Path]]
) -> None:
    short = m.together(m.config(vocab_size=32001), m.fewer_rows(1))
    found = examined(mutated(german(True)["disco"], tmp_path / "short", short))
    assert {f.code for f in found} == {"id-beyond-rows", "template-id-beyond-rows"}


def test_a_tokenizer_that_transformers_reads_otherwise(
    tmp_path: Path, german: Callable[[bool], dict[str, Path]]
) -> None:
    leo = german(True)["leo"]
    llama = m.together(
        m.settings(tokenizer_class="LlamaTokenizer"),
        m.config(model_type="llama", architectures=["LlamaForCausalLM"]),
    )
    other = mutated(leo, tmp_path / "a", llama)  # its normalizer is replaced as it is loaded
    assert coded(diagnosed([other])) == {("tokenizer-ids-differ", "warning")}
    assert examined(other) == []
    unread = mutated(
        leo, tmp_path / "b", m.tokenizer(lambda d: d.update(decoder={"type": "Nonsense"}))
    )
    assert coded(diagnosed([unread])) == {("tokenizer-not-loaded", "error")}


def test_rows_of_end_tokens_may_be_alike(tmp_path: Path) -> None:
    alike = m.together(
        m.rows(m.EMBEDDING, lambda v: equal_rows(v, 2, 3)), m.generation(eos_token_id=[2, 3])
    )
    assert examined(mutated(shipped("evals/zoo/base"), tmp_path / "alike", alike)) == []


def test_rows_that_nothing_trains_may_be_anything(tmp_path: Path) -> None:
    spare = m.rows(m.EMBEDDING, lambda v: (v[0].fill(0), v[3].fill(0)))  # <pad> and <unk>
    assert examined(mutated(shipped("evals/zoo/base"), tmp_path / "spare", spare)) == []


def test_both_generations_of_config_say_the_same_of_rope(tmp_path: Path) -> None:
    older = m.config(rope_parameters=None, rope_theta=10000, rope_scaling=None)
    model = mutated(shipped("evals/zoo/base"), tmp_path / "older", older)
    assert compared([open_model("zoo:base"), model]) == []


def test_the_command_says_plainly_that_there_is_nothing(command: Callable[..., Ran]) -> None:
    ran = command("doctor", "zoo:base", "zoo:sorter")
    assert (ran.code, ran.out) == (0, "no findings\n")
    told = json.loads(command("doctor", "zoo:base", "--json", "--no-load").out)
    assert told == {"models": ["zoo:base"], "findings": [], "fix": ""}


def test_warnings_alone_are_no_failure(tmp_path: Path, command: Callable[..., Ran]) -> None:
    mutated(shipped("evals/zoo/base"), tmp_path / "model", m.settings(pad_token="</s>"))
    ran = command("doctor", "model")
    assert ran.code == 0
    assert ran.out.startswith("warning pad-is-eos  model: ")


def test_rows_are_read_in_bounded_memory() -> None:
    rows, cols = 1 << 15, 4096  # 256 MiB as bfloat16
    info = TensorInfo("BF16", (rows, cols))

    def read(name: str, first: int, end: int, out: memoryview) -> None:
        values = np.frombuffer(out, "<u2").reshape(-1, cols)
        values[:] = 0x3F80
        values[:, :2] = np.arange(first, end)[:, None] >> np.array([0, 8]) & 0xFF

    source = Source({m.EMBEDDING: info}, read)
    model = Model("large", shipped("evals/zoo/base"), {"vocab_size": rows}, source)
    tracemalloc.start()
    assert examined(model) == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # a grain of 512 KiB, its magnitudes and a mask; 8 bytes a row, once more as sorted; small tables
    assert peak < 4 << 20
