"""What a search tries whatever it finds."""

import pytest
import yaml

from merge.search.tried import baselines, parents_of


@pytest.mark.parametrize(
    ("text", "parents"),
    [
        ("{merge_method: slerp, base_model: A, models: [{model: B}]}", ["A", "B"]),
        ("{merge_method: slerp, base_model: A, models: [{model: B}, {model: A}]}", ["A", "B"]),
        ("{merge_method: nearswap, base_model: A, models: [{model: B}]}", ["A", "B"]),
        ("{merge_method: arcee_fusion, base_model: {choice: [A, C]}, models: [{model: B}]}", ["A", "C", "B"]),
        ("{base_model: A, variants: [{merge_method: ties}, {merge_method: slerp}], model: B}", ["A", "B"]),
        ("{merge_method: {choice: [ties, slerp]}, base_model: A, models: {pool: [B, C]}}", ["A", "B", "C"]),
        ("{variants: [{merge_method: ties, base_model: A}, {merge_method: slerp}], model: B}", ["B"]),
        ("{merge_method: ties, base_model: A, models: [{model: B}, {model: C}]}", ["B", "C"]),
        ("{merge_method: linear, base_model: A, models: [{model: B}, {model: C}]}", ["B", "C"]),
        ("{merge_method: nuslerp, base_model: A, models: [{model: B}, {model: C}]}", ["B", "C"]),
    ],
)  # fmt: skip
def test_a_base_is_a_parent_where_it_is_merged(text: str, parents: list[str]) -> None:
    data = yaml.safe_load(text)
    assert parents_of(data) == parents
    tried = [recipe for _, recipe in baselines(data)]
    assert [recipe["model"] for recipe in tried[: len(parents)]] == parents
    averaged = [[model["model"] for model in recipe["models"]] for recipe in tried[len(parents) :]]
    assert averaged == ([parents] if len(parents) > 1 else [])
