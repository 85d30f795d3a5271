"""Whatever stands in files of bases, adapters and mixtures: a plan, or one line that says what is wrong."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from dense_models import dense, mixed
from hypothesis import given, settings
from hypothesis import strategies as st
from routed_models import adapter, base, in_one_process, mixture, recipe

from merge.errors import RequestError
from merge.experts.routers.gates import gates_of
from merge.pipeline import plan_recipe
from merge.sources.opening import open_model

ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    7,
    10**30,
    1.5,
    "",
    "x",
    [],
    ["x"],
    [[1]],
    {},
    {"x": 1},
    {"type": []},
]
Planned = Callable[[], object]


@pytest.fixture(scope="module", autouse=True)
def _one_process() -> Iterator[None]:
    with in_one_process():
        yield


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Planned, list[Path]]]:
    """What is planned, and the files that it reads."""
    folder = tmp_path_factory.mktemp("damaged")
    model = base("llama", folder / "base")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    adapters = {
        name: adapter(model, folder / name, seed, target_modules=["q_proj", "down_proj"])
        for seed, name in enumerate(("a", "b"), start=5)
    }
    made = mixture(folder, model, adapters, router={"mode": "arrow"})
    (folder / "dense").mkdir()
    stock = mixed(dense(folder / "dense", "qwen2", "base", "a"), ["a", "a"]).folder
    fixed = {"mode": "uniform"}
    recipes = {
        "routed": recipe(folder / "1", model, adapters, router={"mode": "arrow"}),
        "peft": recipe(folder / "2", model, adapters, router=fixed, format="peft"),
        "dense": folder / "dense" / "mixture.yaml",
        "changed": _written(folder / "3", mixture=str(made), drop=["a"]),
        "added": _written(
            folder / "4", mixture=str(made), experts=[{"adapter": str(adapters["b"]), "name": "c"}]
        ),
        "stock": _written(
            folder / "5",
            mixture=str(stock),
            experts=[{"source_model": str(folder / "dense" / "a"), "name": "new"}],
            router={"mode": "random"},
            drop=[0],
        ),
    }
    models = [folder / "dense" / "base", folder / "dense" / "a"]
    read = {"routed": [model, *adapters.values()], "peft": [model, *adapters.values()], "dense": models,
            "changed": [made], "added": [made, adapters["b"]], "stock": [stock, models[1]]}  # fmt: skip
    found: dict[str, tuple[Planned, list[Path]]] = {
        name: (lambda f=file: plan_recipe(f, offline=True), read[name])
        for name, file in recipes.items()
    }
    for name, place in (("routers of stock", stock), ("routers", made)):
        found[name] = (lambda p=place: gates_of(open_model(str(p))), [place])
    return found


def _written(folder: Path, **keys: Any) -> Path:
    folder.mkdir()
    (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
    return folder / "recipe.yaml"


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """The file is another in here."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


def _ends_in_one_line(planned: Planned) -> bool:
    """Whether it was refused; any other error is a failure of the test."""
    try:
        planned()
    except RequestError as error:
        assert len(str(error).splitlines()) == 1  # noqa: PT017 - any refusal will do
        return True
    return False


def _places(table: Any) -> Iterator[tuple[Any, ...]]:
    """Paths of values, also of inner tables and lists."""
    keys = (
        table if isinstance(table, dict) else range(len(table)) if isinstance(table, list) else ()
    )
    for key in keys:
        yield (key,)
        yield from ((key, *rest) for rest in _places(table[key]))


def _with(table: Any, place: tuple[Any, ...], value: Any) -> Any:
    inner = table
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return table


NAMES = ["routed", "peft", "dense", "changed", "added", "stock", "routers of stock", "routers"]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60)
@given(data=st.data())
def test_a_table_with_another_value_is_planned_or_refused_in_one_line(
    name: str, plans: Mapping[str, tuple[Planned, list[Path]]], data: st.DataObject
) -> None:
    planned, folders = plans[name]
    file = data.draw(
        st.sampled_from([f for folder in folders for f in sorted(folder.glob("*config.json"))])
    )
    table = json.loads(file.read_text())
    places = list(_places(table))
    if not places:
        return
    place = data.draw(st.sampled_from(places))
    odd = _with(table, place, data.draw(st.sampled_from(ODD)))
    with changed(file, json.dumps(odd).encode()):
        _ends_in_one_line(planned)


@pytest.mark.parametrize("content", [b"", b"[]", b"null", b"{", b'"x"', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_no_table_is_refused_in_one_line(
    name: str, content: bytes, plans: Mapping[str, tuple[Planned, list[Path]]]
) -> None:
    planned, folders = plans[name]
    for folder in folders:
        for file in sorted(folder.glob("*config.json")):
            with changed(file, content):
                refused = _ends_in_one_line(planned)
                assert refused or file.name in (
                    "generation_config.json",
                    "tokenizer_config.json",
                ), file


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(share=st.floats(0, 1, exclude_max=True))
def test_weights_that_are_cut_off_are_refused_in_one_line(
    name: str, share: float, plans: Mapping[str, tuple[Planned, list[Path]]]
) -> None:
    planned, folders = plans[name]
    for folder in folders:
        for file in folder.glob("*.safetensors"):
            whole = file.read_bytes()
            with changed(file, whole[: int(share * len(whole))]):
                assert _ends_in_one_line(planned), file


def test_without_damage_all_of_these_are_planned(
    plans: Mapping[str, tuple[Planned, list[Path]]],
) -> None:
    for planned, _ in plans.values():
        assert not _ends_in_one_line(planned)
