"""The modules that transformers makes of a model: what PEFT can adapt, by their names in memory."""

import importlib
import json
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merge.anatomy import COUNTS, SIDE_COUNTS
from merge.apart import answer_of, reason_of, run_apart
from merge.errors import SourceError
from merge.sections import shown
from merge.sources import Source
from merge.sources.model import Model, read_json, text_config

SECONDS, BYTES = 300, 8 << 30  # for building; 7 s and 0.4 GiB measured for 126 layers


@dataclass(frozen=True)
class Modules:
    """`tensors`: module -> names of its own parameters and buffers, such as weight and bias. `linear`: those
    that LoRA can adapt, and whether they are stored transposed, [in, out]. `parents`: have modules in them.
    `embedding`, `head`: of the vocabulary, "" where there is none; not among the linear ones."""

    tensors: Mapping[str, tuple[str, ...]]
    linear: Mapping[str, bool]
    parents: frozenset[str]
    embedding: str
    head: str


def modules_of(model: Model) -> Modules:
    """The modules of `model` by its config alone, without memory for its values.

    Raises SourceError where transformers has no such architecture; code that comes with a model is not run.
    """
    built = built_model(model)
    tensors: dict[str, tuple[str, ...]] = {}
    for key in built.state_dict():
        module, _, leaf = key.rpartition(".")
        tensors[module] = (*tensors.get(module, ()), leaf)
    named = dict(built.named_modules())
    vocabulary = [built.get_input_embeddings(), built.get_output_embeddings()]
    embedding, head = ("".join(n for n, m in named.items() if m is part) for part in vocabulary)
    linear = {
        name: type(module).__name__ == "Conv1D"
        for name, module in named.items()
        if type(module).__name__ in ("Linear", "Conv1D") and name not in (embedding, head)
    }
    parents = frozenset(name for name, module in named.items() if [*module.children()])
    return Modules(tensors, linear, parents, embedding, head)


def asked_modules(model: Model) -> Modules:
    """As modules_of, by a process of its own."""
    told = asked(modules_of, model)
    tensors = {module: tuple(leaves) for module, leaves in told["tensors"].items()}
    parents = frozenset(told["parents"])
    return Modules(tensors, told["linear"], parents, told["embedding"], told["head"])


def asked(ask: Callable[[Model], Any], model: Model) -> dict[str, Any]:
    """The fields of the dataclass that `ask(model)` gives in a process of its own, as JSON tells them: torch
    and transformers take more memory than the rest, and a config.json may ask for more than anyone has.

    ask: a function of a module, which looks at the folder and config of the model. Raises SourceError.
    """
    _check_layers(model)
    of = (model.label, str(model.folder), str(BYTES), ask.__module__, ask.__name__)
    config = json.dumps(dict(model.config))
    try:
        done = run_apart("merge.adapters.modules", *of, told=config, seconds=SECONDS)
    except subprocess.TimeoutExpired:
        what = f"transformers has not built what config.json describes in {SECONDS} seconds"
        raise SourceError(f"{model.label}: {what}; check its sizes") from None
    if done.returncode:
        raise SourceError(reason_of(done).removeprefix("merge.errors.SourceError: "))
    return json.loads(answer_of(done))  # type: ignore[no-any-return]


def main() -> None:
    """Answers `asked`, in as much memory as it says."""
    label, folder, most, module, function = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_DATA, (int(most), int(most)))
    ask = getattr(importlib.import_module(module), function)
    found = ask(Model(label, Path(folder), json.load(sys.stdin), Source({}, _nothing)))
    print(json.dumps(vars(found), default=sorted))


def _nothing(*_: object) -> None:
    raise AssertionError("only the config is looked at")


def _check_layers(model: Model) -> None:
    """Raises SourceError where config.json describes more layers than there are tensors."""
    stored = len(model.source.tensors)
    for table in (model.config, text_config(model.config)):
        for key in (*COUNTS, *(key for keys in SIDE_COUNTS.values() for key in keys)):
            if isinstance(count := table.get(key), int) and count > stored:
                raise SourceError(
                    f"{model.label}: config.json says {key} is {shown(count)}, but its files hold {stored} "
                    "tensors; give the config.json of these weights"
                )


def built_model(model: Model) -> Any:
    """What transformers makes of a config.json, without values; raises SourceError."""
    import torch
    import transformers

    kinds = model.config.get("architectures") or ["none"]
    try:
        kind = getattr(transformers, str(kinds[0]))
        if not issubclass(kind, transformers.PreTrainedModel):
            raise TypeError("is no model")
        config = known_config(model.folder, model.config)
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # whatever a strange config makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SourceError(
            f"{model.label}: transformers cannot build {str(kinds[0])[:60]!r} ({reason}), so its modules are "
            "not known; that takes an architecture that it knows"
        ) from None


def known_config(folder: Path, table: Mapping[str, Any]) -> Any:
    """What transformers makes of the config.json in `folder`; of `table`, where that is of another type: a
    model that is seen inside of the one in the folder. Raises whatever transformers does."""
    from transformers import AutoConfig

    if read_json(folder / "config.json").get("model_type") == table.get("model_type"):
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    rest = {key: value for key, value in table.items() if key != "model_type"}
    return AutoConfig.for_model(table["model_type"], **rest)


if __name__ == "__main__":
    main()
