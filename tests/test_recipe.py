"""A recipe is right in itself or refused in one line that says where and what is allowed."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from merge.errors import RecipeError
from merge.methods import all_methods
from merge.recipe import load_recipe, parse_recipe
from merge.sections import OF_SEARCHES, Sections, parse_size

TIES = """\
base_model: base
models:
  - model: a
    parameters:
      weight: 0.5
      density: {density}
merge_method: ties
"""
LINEAR = """\
merge_method: linear
models:
- {model: a, parameters: {weight: WEIGHT}}
- {model: b, parameters: {weight: 1}}
"""
SLERP = "merge_method: slerp\nbase_model: a\nparameters: {t: 0.5}\n"
TASK = "base_model: z\nparameters: {weight: 1}\nmerge_method: "


def refusal(text: str) -> str:
    """The message for a wrong recipe: one line that starts with file and line."""
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, "r.yaml")
    message = str(caught.value)
    assert re.match(r"r\.yaml:\d+: ", message), message
    assert len(message.splitlines()) == 1, message
    assert caught.value.exit_code == 2
    return message


# -- what is refused, and in which words -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        (
            "merge_methd: ties\nmodels: [{model: a}]\n",
            1,
            ["'merge_methd'", "did you mean 'merge_method'"],
        ),
        ("merge_method: ties\nmodels:\n- modell: a\n", 3, ["'modell'", "did you mean 'model'"]),
        (
            "merge_method: ties\nmodels:\n- parameters: {}\n",
            3,
            ["models.0.model is missing", "needs model"],
        ),
        (
            "merge_method: linear\nmodels:\n- model: a\n  paramters: {weight: 1}\n",
            4,
            ["'paramters'", "did you mean 'parameters'", "allowed: model, parameters"],
        ),
        (
            "merge_method: linear\nmodels:\n- model: a\n  parameters:\n    wieght: 1\n",
            5,
            ["no parameter 'wieght'", "did you mean 'weight'", "it has weight"],
        ),
        (
            "models: [{model: a}]\nmerge_method: tis\n",
            2,
            ["'tis'", "did you mean 'ties'", "there are arcee_fusion"],
        ),
        ("merge_method: linear\nmodels: []\n", 2, ["models"]),
        ("merge_method: linear\n", 1, ["models is missing"]),
        ("models: [{model: a}]\n", 1, ["merge_method is missing"]),
        ("merge_method: linear\nmodels: a\n", 2, ["models is 'a'", "list"]),
        ("merge_method: 5\nmodels: [{model: a}]\n", 1, ["merge_method is 5", "text"]),
        ("merge_method: linear\nmodels: [{model: ''}]\n", 2, ["models.0.model"]),
        (
            "merge_method: linear\nout_dtype: int8\nmodels: [{model: a}]\n",
            2,
            ["'int8'", "float32", "bfloat16"],
        ),
        (
            "merge_method: linear\ncompat: mergkit\nmodels: [{model: a}]\n",
            2,
            ["'mergkit'", "mergekit"],
        ),
        ("merge_method: linear\nbase_model: ''\nmodels: [{model: a}]\n", 2, ["base_model"]),
        ("merge_method: linear\noutput: ''\nmodels: [{model: a}]\n", 2, ["output"]),
        (
            "merge_method: linear\nmodels: [{model: a}]\nscore: {suit: x}\n",
            3,
            ["'suit'", "did you mean 'suite'"],
        ),
        (
            "merge_method: linear\nmodels: [{model: a}]\nscore: {limit: 0}\n",
            3,
            ["score.limit is 0", "1"],
        ),
        ("merge_method: linear\nmodels: [{model: a}]\nscore: 3\n", 3, ["score is 3"]),
        (
            "merge_method: linear\nmodels: [{model: a}]\nextra_tensors: base\n",
            3,
            ["'base'", "'error' or 'drop'"],
        ),
    ],
)
def test_a_wrong_key_or_type_is_named_with_its_line(text: str, line: int, parts: list[str]) -> None:
    message = refusal(text)
    assert message.startswith(f"r.yaml:{line}: ")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "density", ["0", "0.0", "1.5", "-1", "true", "'half'", "null", ".nan", ".inf", "{}", "[]"]
)
def test_a_density_outside_its_range_is_refused_in_its_line(density: str) -> None:
    message = refusal(TIES.format(density=density))
    assert message.startswith("r.yaml:6: ties.density is ")
    assert "must be" in message


def test_the_range_of_a_density_is_told() -> None:
    assert refusal(TIES.format(density="1.5")).endswith("ties.density is 1.5; it must be in (0, 1]")


@pytest.mark.parametrize(
    "weight", [".nan", ".inf", "-.inf", "1e400", "1" + "0" * 400, "true", "a", "[1, .nan]"]
)
def test_a_weight_that_is_no_finite_number_is_refused(weight: str) -> None:
    assert "linear.weight is " in refusal(LINEAR.replace("WEIGHT", weight))


@pytest.mark.parametrize("weight", ["1e400", "1" + "0" * 400])
def test_a_huge_number_does_not_make_a_long_message(weight: str) -> None:
    assert len(refusal(LINEAR.replace("WEIGHT", weight))) < 300


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("1e+2", 1e2),
        (".5e1", 5.0),
        ("-2.5e-1", -0.25),
        ("7", 7.0),
        ("1.", 1.0),
    ],
)
def test_numbers_with_an_exponent_are_numbers(text: str, value: float) -> None:
    recipe = parse_recipe(LINEAR.replace("WEIGHT", text))
    assert recipe.slices[0].entries[0].settings["weight"].at("any", 0.0) == value


@pytest.mark.parametrize("key", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("re:(", "it is no regular expression (missing )"),
        ("re:a{99999999999}", "it is no regular expression"),
        ("", "it is empty"),
    ],
)
def test_a_pattern_of_tensors_that_is_none_is_refused_in_its_line(
    key: str, pattern: str, problem: str
) -> None:
    text = TIES.format(density=0.5) + f"{key}:\n- 're:ok|(fine)'\n- '{pattern}'\n"
    assert f"r.yaml:10: {key}.1 is {pattern!r}; {problem}" in refusal(text)


def test_a_key_given_twice_is_refused_with_both_lines() -> None:
    message = refusal("merge_method: linear\nmodels: [{model: a}]\nmerge_method: ties\n")
    assert message == "r.yaml:3: 'merge_method' is given twice (first in line 1)"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# nothing\n",
        "- a\n- b\n",
        "word",
        "5",
        "a: b: c",
        "{",
        "[1, 2",
        "a: 'x",
        "\x00",
        "a: \x07",
        "a: !!timestamp x",
        "a: !!bool x",
        "a: !!int ''",
        "a: !!python/object:os.system x",
        "a: &x [*x]",
        "? [a, b]\n: c",
        "1: 2",
        "a: *nothing",
        "%YAML 9.9\n---\na: b",
        "a: 2001-99-99",
        "[" * 1200,
        "a: !!binary x",
        "---\na: 1\n---\nb: 2\n",
        "a: \ud800",
        "<<: 5",
        "=: 1",
    ],
)
def test_what_is_no_yaml_table_is_refused(text: str) -> None:
    refusal(text)


def test_an_alias_bomb_is_refused() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "too many values" in refusal("\n".join(levels))


def test_a_file_that_cannot_be_read_is_a_recipe_error(tmp_path: Path) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"name: \xff")
    for file in (tmp_path / "missing.yaml", tmp_path, latin):
        with pytest.raises(RecipeError, match="cannot be read"):
            load_recipe(file)


@pytest.mark.parametrize(
    "size", ["0", "0B", "-1", "big", "1e400", "5iB", "''", "null", "true", "[1]", "9" * 400, "0.2B"]
)
def test_a_shard_size_that_is_none_is_refused(size: str) -> None:
    text = f"merge_method: linear\nmodels: [{{model: a}}]\nshard_size: {size}\n"
    assert refusal(text).startswith("r.yaml:3: shard_size is ")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("20KB", 20_000),
        ("20k", 20_000),
        ("1KiB", 1024),
        ("1.5 MiB", 3 << 19),
        ("2GB", 2 * 10**9),
        ("1Ti", 1 << 40),
    ],
)
def test_sizes_count_in_thousands_or_in_1024s(text: str, size: int) -> None:
    assert parse_size(text) == size


# -- bases and numbers of models -------------------------------------------------------------------


BASED = [m.name for m in all_methods().values() if m.base in ("required", "first")]


@pytest.mark.parametrize("method", BASED)
def test_a_method_on_task_vectors_needs_a_base(method: str) -> None:
    message = refusal(f"models: [{{model: a}}, {{model: b}}]\nmerge_method: {method}\n")
    assert message.startswith(f"r.yaml:2: {method} needs base_model")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("merge_method: ties\nbase_model: a\nmodels: [{model: a}]\n", "no model beside its base"),
        (
            SLERP + "models: [{model: a}, {model: b}, {model: c}]\n",
            "takes 2 models (its base included), not 3",
        ),
        ("merge_method: passthrough\nmodels: [{model: a}, {model: b}]\n", "takes 1 models, not 2"),
        (
            TASK + "ties\nmodels: [{model: a}, {model: a}]\n",
            "listed twice",
        ),
    ],
)
def test_too_few_or_too_many_models_are_refused(text: str, part: str) -> None:
    assert part in refusal(text)


def test_slerp_takes_its_base_from_the_list_or_beside_it() -> None:
    for models in ("[{model: b}]", "[{model: a}, {model: b}]"):
        parse_recipe(
            f"merge_method: slerp\nbase_model: a\nparameters: {{t: 0.5}}\nmodels: {models}\n"
        )


def test_a_parameter_without_a_default_must_be_given() -> None:
    message = refusal(
        "merge_method: linear\nmodels:\n- model: a\n  parameters: {weight: 1}\n- model: b\n"
    )
    assert message.startswith("r.yaml:5: linear needs weight")


def test_models_may_not_differ_in_a_parameter_that_holds_for_all() -> None:
    text = LINEAR.replace("WEIGHT", "1, normalize: true").replace("1}", "1, normalize: false}")
    message = refusal(text)
    assert "linear.normalize holds for all models" in message


# -- values per tensor -----------------------------------------------------------------------------


def weight_at(weight: Any, name: str, depth: float = 0.0, *, shared: Any = None) -> Any:
    data: dict[str, Any] = {"merge_method": "linear", "models": [{"model": "a"}]}
    if weight is not None:
        data["models"][0]["parameters"] = {"weight": weight}
    if shared is not None:
        data["parameters"] = {"weight": shared}
    return (
        parse_recipe(yaml.safe_dump(data)).slices[0].entries[0].settings["weight"].at(name, depth)
    )


def test_a_list_is_a_gradient_over_the_layers() -> None:
    assert [weight_at([0, 1, 0.5], "x", depth) for depth in (0, 0.25, 0.5, 0.75, 1)] == [
        0,
        0.5,
        1,
        0.75,
        0.5,
    ]


def test_the_first_rule_whose_filter_is_part_of_the_name_holds() -> None:
    rules = [{"filter": "mlp", "value": [0, 2]}, {"filter": "attn", "value": 3}, {"value": 4}]
    assert weight_at(rules, "layers.0.mlp.up", 0.5) == 1
    assert weight_at(rules, "layers.0.attn.q", 0.5) == 3
    assert weight_at(rules, "norm") == 4
    assert weight_at([{"filter": "*", "value": 7}], "norm") == 7
    assert weight_at([{"filter": "mlp", "value": 7}], "norm") is None


@pytest.mark.parametrize(
    "rules",
    [
        [{"filter": "a"}],
        [{"filtr": "a", "value": 1}],
        [{"filter": 5, "value": 1}],
        [{}],
        [{"value": {}}],
        [{"value": 1}, 2],
    ],
)
def test_a_malformed_rule_is_refused(rules: list[Any]) -> None:
    refusal(
        yaml.safe_dump(
            {"merge_method": "linear", "models": [{"model": "a", "parameters": {"weight": rules}}]}
        )
    )


def test_the_models_value_goes_before_the_recipes() -> None:
    assert weight_at(1, "x", shared=2) == 1
    assert weight_at(None, "x", shared=2) == 2
    filtered = [{"filter": "mlp", "value": 5}]
    assert weight_at(filtered, "mlp", shared=2) == 5
    assert weight_at(filtered, "norm", shared=2) == 2


def test_compat_goes_before_the_default_and_after_the_recipe() -> None:
    text = "merge_method: ties\nbase_model: z\nmodels: [{model: a, parameters: {weight: 1}}]\n"
    switched = all_methods()["ties"].mergekit
    assert switched
    plain, compat = parse_recipe(text), parse_recipe(text + "compat: mergekit\n")
    for name, value in switched.items():
        assert (
            plain.slices[0].shared[name].at("x", 0)
            == all_methods()["ties"].parameters[name].default
            != value
        )
        assert compat.slices[0].shared[name].at("x", 0) == value
        own = parse_recipe(
            text + f"compat: mergekit\nparameters: {{{name}: {str(not value).lower()}}}\n"
        )
        assert own.slices[0].shared[name].at("x", 0) is (not value)


@pytest.mark.parametrize("method", ["ties", "dare_ties", "dare_linear"])
def test_int8_mask_is_accepted(method: str) -> None:
    parse_recipe(TASK.replace("}", ", int8_mask: true}") + f"{method}\nmodels: [{{model: a}}]\n")


# -- laws over drawn recipes -----------------------------------------------------------------------


def check_answer(text: str) -> None:
    """Any text is a recipe or refused as one that is not."""
    try:
        parse_recipe(text, "r.yaml")
    except RecipeError:
        refusal(text)


WORDS = st.text("abcdefghijklmnopqrstuvwxyz_", min_size=1, max_size=20)
GOOD: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "a", "parameters": {"weight": 1}}],
}


# the last is the word of mergekit-mega for output
KNOWN = {*Sections.model_fields, *OF_SEARCHES, "variants", "out_path"}


@given(WORDS.filter(lambda word: word not in KNOWN))
def test_any_unknown_key_is_refused_by_its_name(word: str) -> None:
    assert f"unknown key {word!r}" in refusal(yaml.safe_dump(GOOD | {word: 1}))


@given(st.sampled_from(sorted(all_methods())), WORDS)
def test_any_unknown_parameter_is_refused_with_the_known_ones(method: str, word: str) -> None:
    known = all_methods()[method].parameters
    assume(word not in known)
    few = all_methods()[method].models[0] - (all_methods()[method].base == "first")
    models = [{"model": name, "parameters": {word: 1}} for name in ("a", "b")[:few]]
    message = refusal(yaml.safe_dump({"merge_method": method, "base_model": "z", "models": models}))
    assert f"no parameter {word!r}" in message
    assert all(name in message for name in known)


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["ties", "linear", "slerp", "a", "base", "mergekit", "float16", "1e-3", 10**400]
    )
)
KEYS = (
    st.sampled_from(
        [*Sections.model_fields, "model", "weight", "density", "filter", "value", "suite", "t"]
    )
    | PLAIN
)
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, TREES, max_size=6), st.booleans())
def test_any_table_is_a_recipe_or_a_recipe_error(data: dict[Any, Any], completed: bool) -> None:
    text = yaml.dump(GOOD | data if completed else data)
    check_answer(text)


YAMLISH = st.lists(
    st.sampled_from(
        [
            "a",
            ": ",
            "- ",
            "\n",
            "  ",
            "[",
            "]",
            "{",
            "}",
            ",",
            "&x ",
            "*x",
            "!!",
            "!!timestamp ",
            "!!float ",
            "'",
            '"',
            "#",
            "|",
            ">",
            "? ",
            "<<: ",
            "models",
            "merge_method: linear",
            "1e3",
            "\t",
            "%",
            "---",
            "\\ud800",
        ]
    ),
    max_size=25,
).map("".join) | st.text(max_size=60)


@given(YAMLISH)
def test_any_text_is_a_recipe_or_a_recipe_error(text: str) -> None:
    check_answer(text)
