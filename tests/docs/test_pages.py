"""The pages of the methods are what their signatures and docstrings give, and their recipes parse."""

import importlib.util
import re
from pathlib import Path

import pytest

from merge.methods import Method, all_methods
from merge.recipe import parse_recipe

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("docs_pages", DOCS / "pages.py")
assert _spec is not None
assert _spec.loader is not None
docs = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(docs)
METHODS = all_methods().values()


def test_the_pages_are_up_to_date() -> None:
    """If not: python docs/pages.py."""
    written = {file.name: file.read_text(encoding="utf-8") for file in docs.FOLDER.iterdir()}
    assert written == docs.pages()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_a_page_tells_all_and_its_recipe_parses(method: Method) -> None:
    page = docs.page(method)
    assert method.when
    assert method.when in page
    assert all(f"| `{p.name}` |" in page and p.text for p in method.parameters.values())
    (recipe,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert parse_recipe(recipe).method is method


def test_a_column_separator_in_a_text_stays_in_its_cell() -> None:
    rows = [line for line in docs.page(all_methods()["ties"]).splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
