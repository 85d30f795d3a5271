"""The modules that transformers makes of a model: what PEFT can adapt, by their names in memory."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from merge.errors import SourceError
from merge.sources.model import Model


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
    built = _built(model)
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


def _built(model: Model) -> Any:
    import torch
    import transformers

    kinds = model.config.get("architectures") or ["none"]
    try:
        kind = getattr(transformers, str(kinds[0]))
        if not issubclass(kind, transformers.PreTrainedModel):
            raise TypeError("is no model")
        config = transformers.AutoConfig.from_pretrained(model.folder, local_files_only=True)
        with torch.device("meta"):
            return kind(config)
    except Exception as error:  # whatever a strange config makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise SourceError(
            f"{model.label}: transformers cannot build {str(kinds[0])[:60]!r} ({reason}), so its modules are "
            "not known; an adapter can be written for the architectures that it knows"
        ) from None
