"""The classes that transformers makes a model of, and which of its modules are linear layers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from merge.adapters.modules import asked, built_model
from merge.errors import SourceError
from merge.experts.lora.answers import keep, kept, key_of
from merge.sources.model import Model

LINEAR = ("Linear", "Conv1D")


@dataclass(frozen=True)
class Classes:
    """`model`, `config`: names of classes of transformers. `kinds`: class for automatic loading -> class.
    `prefix`: what the names of the body's tensors begin with in a whole model. `linear`: modules, as they
    are called in memory. `parameters`: the names of each in memory, several where it is tied. `width`:
    columns that a layer reads, 0 where that is not known. `tokenizer`: the class that reads the tokens, ""
    where there is none that transformers brings."""

    model: str
    config: str
    kinds: Mapping[str, str]
    prefix: str
    linear: frozenset[str]
    parameters: Sequence[Sequence[str]]
    width: int
    tokenizer: str

    def in_memory(self, name: str) -> tuple[str, str, str]:
        """What a module or parameter that files call `name` may be called in memory, and the other way
        round: a body may be stored without its prefix, or with it alone."""
        prefix = f"{self.prefix}."
        return name, name.removeprefix(prefix), prefix + name

    def module(self, name: str) -> str:
        """What a module that holds parameters, and that files call `name`, is called in memory."""
        known = {each for names in self.parameters for each in names}
        return next(
            found
            for found in self.in_memory(name)
            if any(each.startswith(f"{found}.") for each in known)
        )


def asked_classes(model: Model) -> Classes:
    """The classes of `model`, by a process of its own, or as one has told before; raises SourceError where
    transformers has none."""
    return _answered(_Question(key_of(model, __file__), model))


@dataclass(frozen=True)
class _Question:
    """Two are the same where `key` is."""

    key: str
    model: Model = field(compare=False)


@lru_cache(maxsize=16)
def _answered(question: _Question) -> Classes:
    if found := _told(kept(question.key)):
        return found
    told = asked(classes_of, question.model)
    keep(question.key, told)
    found = _told(told)
    assert found is not None
    return found


def _told(told: Any) -> Classes | None:
    """The classes that an answer tells, None where it is none; names of classes become code."""
    try:
        found = Classes(**told | {"linear": frozenset(told["linear"])})
        names = [found.model, found.config, *found.kinds, *found.kinds.values()]
        sound = all(map(str.isidentifier, names)) and (found.tokenizer + "x").isidentifier()
        return found if sound else None
    except (TypeError, KeyError, AttributeError):
        return None


def classes_of(model: Model) -> Classes:
    """As asked_classes, in this process."""
    built = built_model(model)
    width = getattr(built.config.get_text_config(), "hidden_size", None)
    return Classes(
        type(built).__name__,
        _known(type(built.config), model),
        {kind: _known(found, model) for kind, found in _kinds(built)},
        built.base_model_prefix,
        frozenset(n for n, module in built.named_modules() if type(module).__name__ in LINEAR),
        _parameters(built),
        width if isinstance(width, int) else 0,
        _tokenizer(model),
    )


def _known(found: type, model: Model) -> str:
    """The name of a class, by which transformers gives it to others."""
    import transformers

    if getattr(transformers, found.__name__, None) is not found:
        raise SourceError(f"{model.label}: transformers does not offer its class {found.__name__}")
    return str(found.__name__)


def _kinds(built: Any) -> Iterator[tuple[str, type]]:
    """The classes for automatic loading that make the same of the config, and the one that makes its body."""
    from transformers.models.auto import modeling_auto

    for name, kind in sorted(vars(modeling_auto).items()):
        mapping = getattr(kind, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or type(built.config) not in mapping:
            continue
        found = mapping[type(built.config)]
        found = found[0] if isinstance(found, tuple) else found
        if found is type(built) or name == "AutoModel":
            yield name, found


def _parameters(built: Any) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in built.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _tokenizer(model: Model) -> str:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            model.folder, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ):  # no tokenizer; for files that it cannot read `tokenizers` raises a plain Exception
        return ""
    return str(type(found).__name__)
