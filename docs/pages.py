"""Writes docs/methods: a page for every merge method and an index, from signatures and docstrings.

    python docs/pages.py

A test compares the pages with what this gives.
"""

import json
from pathlib import Path
from typing import Any

import yaml

from merge.methods import REQUIRED, Method, Parameter, all_methods

FOLDER = Path(__file__).with_name("methods")
LINKS = {"arXiv:": "https://arxiv.org/abs/", "doi:": "https://doi.org/"}
BASES = {
    "required": "`base_model` is required; task vectors are the differences from it",
    "optional": "`base_model` is optional; with one, task vectors take the place of the models",
    "first": "`base_model` is required and is the first of the models",
    "donor": "`base_model` is optional and lends only configuration and tokenizer",
}
EXAMPLES = {"weight": 0.5, "density": 0.5, "t": 0.5, "select_topk": 0.1}
OF_A_METHOD = {("nearswap", "t"): 0.001}


def pages() -> dict[str, str]:
    """Markdown by file name."""
    methods = all_methods().values()
    return {"README.md": index(list(methods))} | {f"{m.name}.md": page(m) for m in methods}


def index(methods: list[Method]) -> str:
    rows = [f"| [{m.name}]({m.name}.md) | {_cell(m.summary)} | {_cell(m.when)} |" for m in methods]
    head = ["# Merge methods", "", "| method | what it gives | when it helps |", "|---|---|---|"]
    return "\n".join([*head, *rows, ""])


def page(method: Method) -> str:
    low, high = method.models
    models = f"{low}" if low == high else f"{low} or more"
    parts = [
        f"# {method.name}",
        method.text,
        f"**When it helps:** {method.when}",
        f"**Paper:** {_linked(method.paper)}" if method.paper else "",
        f"**Models:** {models}; {BASES[method.base]}.",
        table(method),
        f"## Recipe\n\n```yaml\n{recipe(method)}```",
        _compatibility(method),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(method: Method) -> str:
    """The parameters, or nothing where there are none."""
    if not method.parameters:
        return "It has no parameters."
    head = ["| parameter | values | given | default | meaning |", "|---|---|---|---|---|"]
    return "\n".join(["## Parameters\n", *head, *map(_row, method.parameters.values())])


def _row(parameter: Parameter) -> str:
    given = "per model" if parameter.per_model else "for all"
    default = "required" if parameter.default is REQUIRED else f"`{json.dumps(parameter.default)}`"
    cells = (f"`{parameter.name}`", parameter.allowed, given, default, parameter.text)
    return "| " + " | ".join(map(_cell, cells)) + " |"


def recipe(method: Method) -> str:
    """A small recipe that parses: what is required, and what the method makes little sense without."""
    own, shared = _examples(method, per_model=True), _examples(method, per_model=False)
    count = max(method.models[0], min(2, method.models[1])) - (method.base == "first")
    names = [f"owner/fine-tune-{i + 1}" for i in range(count)]
    entries = [{"model": name} | ({"parameters": dict(own)} if own else {}) for name in names]
    keys: dict[str, Any] = {"merge_method": method.name}
    keys |= {"base_model": "owner/base"} if method.base in ("required", "first") else {}
    keys |= {"models": entries} | ({"parameters": shared} if shared else {})
    return yaml.safe_dump(keys, sort_keys=False)


def _examples(method: Method, *, per_model: bool) -> dict[str, float]:
    parameters = [p for p in method.parameters.values() if p.per_model is per_model]
    return {
        p.name: OF_A_METHOD.get((method.name, p.name)) or EXAMPLES[p.name]
        for p in parameters
        if p.default is REQUIRED or p.name in EXAMPLES
    }


def _compatibility(method: Method) -> str:
    if not method.mergekit:
        return ""
    theirs = ", ".join(f"`{k}: {json.dumps(v)}`" for k, v in method.mergekit.items())
    return f"`compat: mergekit` sets {theirs}."


def _linked(paper: str) -> str:
    """Identifiers of papers as links."""
    words = paper.split(" ")
    for i, word in enumerate(words):
        for kind, address in LINKS.items():
            if word.startswith(kind):
                words[i] = f"[{word}]({address}{word.removeprefix(kind)})"
    return " ".join(words)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
