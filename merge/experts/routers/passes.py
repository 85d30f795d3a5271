"""Forward passes side by side over a transformers model that is in memory one module at a time.

The model is built without memory for its weights. Every pass waits where a module begins that has some,
until all passes stand there; then these weights are read, once for all, and go when the last pass leaves the
module. Rows of embeddings are read as they are looked up. So a pass takes its activations and shares the
largest module. Measured in a process of its own: 404 MiB for a Llama of 1 MB; 472 MiB for one of 2.4 GB
with 256,000 tokens, whose layers have matrices of 16 MiB, 64 passes at once; 383 of both are torch and
transformers.

Each pass has one text and no padding, and computes as it would alone: the bits of what it finds depend
neither on the others nor on how many compute at once. What is found is added up in the order of the texts.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from merge.adapters.modules import known_config
from merge.blas import Matrix
from merge.errors import MergetoolError, RunError
from merge.numerics import grains
from merge.sources import Source
from merge.sources.names import Names
from merge.tokens.rows import Stored

TOGETHER, TOKENS = (
    64,
    2048,
)  # passes side by side, and their tokens: activations of an 8 B model 0.4 GiB
SHOWN = 160  # characters of a reason
UNLIMITED = 1 << 30  # positions of a model whose config.json has no number
Tokens = tuple[Sequence[int], int]  # ids of a text, and the place of its own last one
ELSEWHERE = "choose a router mode that does not run the base (arrow, random, uniform)"


def built(folder: str, architecture: str, table: Mapping[str, Any]) -> Any:
    """The model of a folder, `table` its config.json, in float32 on the meta device; what it computes for
    itself is there.

    Raises RunError where transformers has no such architecture; code that comes with a model is not run.
    """
    import transformers

    try:
        kind = getattr(transformers, architecture)
        config = known_config(Path(folder), table)
        config.get_text_config().use_cache = False
        with torch.device("meta"):
            model = kind._from_config(config, dtype=torch.float32)
        _compute_buffers(model)
    except Exception as error:  # whatever a strange config makes transformers raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:SHOWN]
        raise RunError(
            f"transformers cannot build {architecture!r} ({reason}); {ELSEWHERE}"
        ) from None
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Fills what no file holds, such as the frequencies of rotary positions, as transformers does after
    loading; weights are still on the meta device, where nothing happens to them."""
    for module in model.modules():
        for key in module._non_persistent_buffers_set:
            if (buffer := module._buffers.get(key)) is not None:
                module._buffers[key] = torch.empty_like(buffer, device="cpu")
    model.initialize_weights()


class _SeenAllError(Exception):
    """Ends a pass that has come as far as it is needed."""


class Passes:
    """Runs a model over texts and adds up what `modules` (name -> width) read; `statistic`: see
    reading.Asked."""

    def __init__(
        self, model: Any, source: Source, modules: Mapping[str, int], statistic: str
    ) -> None:
        self._model, self._modules = model, modules
        self._caught = _Caught(statistic)
        self._own = threading.local()
        self._computing = threading.Semaphore(len(os.sched_getaffinity(0)))
        torch.set_num_threads(1)
        for name in modules:
            hook = partial(self._see, name)
            _module(model, name).register_forward_pre_hook(hook, with_kwargs=True)
        self._weights = _Weights(model, source)
        for name, module in self._weights.modules.items():
            module.register_forward_pre_hook(partial(self._begin, name))
            module.register_forward_hook(partial(self._end, name), always_call=True)

    @property
    def positions(self) -> int:
        """Tokens of a text that the model has positions for."""
        most = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else UNLIMITED

    def mean(self, texts: Iterable[Tokens]) -> dict[str, Matrix]:
        """By module, the statistic over `texts`: [width] float64. Raises RunError."""
        self._caught.clear()
        for group in _groups(texts):
            self._run(group)
        return self._caught.means()

    def _run(self, texts: Sequence[Tokens]) -> None:
        self._meeting = _Meeting(len(texts), self._load)
        threads = [
            threading.Thread(target=self._pass, args=(number, text), daemon=True)
            for number, text in enumerate(texts)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self._weights.drop_all()
        if error := self._meeting.error:
            raise error
        self._caught.add_up()

    def _pass(self, number: int, text: Tokens) -> None:
        """One forward pass, up to the last of the modules that are looked at."""
        self._own.number, self._own.left, self._own.text = number, set(self._modules), text
        error: Exception | None = None
        with self._computing:
            try:
                with torch.inference_mode(), _Lookups(self._weights.tables):
                    self._model(input_ids=torch.tensor([list(text[0])]))
                error = RunError(f"the base does not come by {min(self._own.left)!r}; {ELSEWHERE}")
            except _SeenAllError:
                pass
            except MergetoolError as found:
                error = found
            except Exception as found:  # whatever a model raises
                reason = " ".join(f"{type(found).__name__}: {found}".split())[:SHOWN]
                error = RunError(f"the base does not run ({reason}); {ELSEWHERE}")
        self._meeting.leave(error)

    # -- hooks of modules --------------------------------------------------------------------------

    def _see(self, name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What a module reads, the first time in a pass."""
        if name not in self._own.left:
            return
        ids, last = self._own.text
        read = _hidden([*args, *kwargs.values()], self._modules[name], len(ids))
        if read is None:
            what = f"vectors of {self._modules[name]} numbers for {len(ids)} tokens"
            raise RunError(f"module {name!r} of the base does not read {what}; {ELSEWHERE}")
        self._caught.take(name, self._own.number, read, last)
        self._own.left.discard(name)
        if not self._own.left:
            raise _SeenAllError

    def _begin(self, name: str, module: Any, args: tuple[Any, ...]) -> None:
        self._computing.release()
        try:
            self._meeting.wait(name)
        finally:
            self._computing.acquire()

    def _end(self, name: str, module: Any, args: Any, output: Any) -> None:
        self._weights.leave(name)

    def _load(self, names: Sequence[str]) -> None:
        """All passes stand still, each before one of these modules."""
        self._caught.add_up()
        for name in dict.fromkeys(names):
            self._weights.enter(name, names.count(name))


def _module(model: Any, name: str) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise RunError(f"transformers' {type(model).__name__} has no module {name!r}") from None


def _hidden(values: Sequence[Any], width: int, tokens: int) -> torch.Tensor | None:
    """The first of a module's arguments that holds vectors, [tokens, width] float32."""
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1:
            same = value.shape[-1] == width and value.numel() == width * tokens
            return value.reshape(tokens, width) if same else None
    return None


def _groups(texts: Iterable[Tokens]) -> Iterator[list[Tokens]]:
    """Texts that run side by side, in their order."""
    group: list[Tokens] = []
    for text in texts:
        tokens = sum(len(ids) for ids, _ in (*group, text))
        if group and (len(group) == TOGETHER or tokens > TOKENS):
            yield group
            group = []
        group.append(text)
    if group:
        yield group


class _Caught:
    """Sums of vectors by module. What passes bring waits for the others, to be added in the order of
    texts."""

    def __init__(self, statistic: str) -> None:
        self._statistic = statistic
        self._waiting: dict[str, dict[int, tuple[Matrix, int]]] = {}
        self._sums: dict[str, tuple[Matrix, int]] = {}

    def clear(self) -> None:
        self._waiting, self._sums = {}, {}

    def take(self, module: str, number: int, read: torch.Tensor, last: int) -> None:
        """The vectors [tokens, width] of pass `number`, and which one is the text's last; by any thread."""
        count = len(read) if self._statistic == "tokens" else 1
        chosen = read[last : last + 1] if self._statistic == "last" else read
        total: Matrix = chosen.sum(dim=0, dtype=torch.float64).numpy()
        if not np.isfinite(total).all():
            what = "the base holds NaN or takes weights from outside of their module"
            raise RunError(f"what module {module!r} reads is not finite: {what}; {ELSEWHERE}")
        mean = total if self._statistic == "tokens" else total / len(chosen)
        self._waiting.setdefault(module, {})[number] = (mean, count)

    def add_up(self) -> None:
        for module, found in self._waiting.items():
            for number in sorted(found):
                total, count = self._sums.get(module, (np.zeros(0), 0))
                vector, more = found[number]
                self._sums[module] = (total + vector if count else vector, count + more)
        self._waiting = {}

    def means(self) -> dict[str, Matrix]:
        return {module: total / count for module, (total, count) in self._sums.items()}


class _Meeting:
    """Where passes wait until all that still run do; the last that comes calls `go` with what they wait
    for."""

    def __init__(self, running: int, go: Callable[[Sequence[str]], None]) -> None:
        self._running, self._go = running, go
        self._changed = threading.Condition()
        self._wanted: list[str] = []
        self._round = 0
        self.error: Exception | None = None

    def wait(self, name: str) -> None:
        """Raises the error of whichever pass had one."""
        with self._changed:
            self._wanted.append(name)
            own = self._round
            self._go_on()
            while own == self._round and not self.error:
                self._changed.wait()
            if self.error:
                raise self.error

    def leave(self, error: Exception | None) -> None:
        with self._changed:
            self._running -= 1
            self.error = self.error or error
            self._go_on()
            self._changed.notify_all()

    def _go_on(self) -> None:
        if self.error or not self._wanted or len(self._wanted) < self._running:
            return
        try:
            self._go(self._wanted)
        except Exception as error:
            self.error = error
        self._wanted, self._round = [], self._round + 1
        self._changed.notify_all()


class _Weights:
    """The values of a model's modules, read where they lie. `modules`: those whose weights come and go, by
    name; `tables`: embeddings, by the identity of the parameter that stands for all their rows.

    What is not there is NaN: whoever used it would find nothing else.
    """

    def __init__(self, model: Any, source: Source) -> None:
        self._source, self._lock = source, threading.Lock()
        self._names = Names(source.tensors)
        self._inside: dict[str, int] = {}
        self._absent: dict[tuple[str, str], torch.Tensor] = {}
        self._called = _called(model)
        self.modules = {name: m for name, m in model.named_modules() if _values(m)}
        self.tables: dict[int, Stored] = {}
        for name, key in self._called:
            self._hide(name, key)
        for name in [n for n, m in self.modules.items() if isinstance(m, torch.nn.Embedding)]:
            weight = self.modules.pop(name).weight
            if stored := self._fitting(name, "weight"):
                self.tables[id(weight)] = Stored(source, stored)

    def enter(self, name: str, passes: int) -> None:
        with self._lock:
            there = self._inside.get(name, 0)
            self._inside[name] = there + passes
        if not there:
            for key, value in _values(self.modules[name]):
                self._put(name, key, self._read(self._stored(name, key, value)))

    def leave(self, name: str) -> None:
        with self._lock:
            if name in self._inside:
                self._inside[name] -= 1
                if not self._inside[name]:
                    self._drop(name)

    def drop_all(self) -> None:
        for name in [*self._inside]:
            self._drop(name)

    def _drop(self, name: str) -> None:
        del self._inside[name]
        for key, _ in _values(self.modules[name]):
            self._hide(name, key)

    def _hide(self, name: str, key: str) -> None:
        if (name, key) not in self._absent:
            value = getattr(self.modules[name], key)
            nothing = (
                torch.full((), torch.nan)
                if value.is_floating_point()
                else torch.zeros((), dtype=value.dtype)
            )
            self._absent[name, key] = nothing.expand(value.shape)
        self._put(name, key, self._absent[name, key])

    def _put(self, name: str, key: str, value: torch.Tensor) -> None:
        module = self.modules[name]
        if key in module._parameters:
            module._parameters[key] = torch.nn.Parameter(value, requires_grad=False)
        else:
            module._buffers[key] = value

    def _stored(self, name: str, key: str, value: torch.Tensor) -> str:
        """The tensor of the base that the value of a module is."""
        whole, found = self._called[name, key][0], self._fitting(name, key)
        if not found:
            raise RunError(
                f"transformers holds {whole!r}, which is no tensor of the base; {ELSEWHERE}"
            )
        shape = self._source.tensors[found].shape
        if shape != tuple(value.shape):
            what = f"has shape {list(shape)}, but {list(value.shape)} in transformers"
            raise RunError(f"tensor {found!r} {what}; its config.json is of another model")
        return found

    def _fitting(self, name: str, key: str) -> str:
        """The base's name for it, or for what it is tied to; "" for none."""
        found = (self._names.fitting(whole) for whole in self._called[name, key])
        return next((names[0] for names in found if len(names) == 1), "")

    def _read(self, stored: str) -> torch.Tensor:
        """A tensor as float32, widened grain by grain."""
        info = self._source.tensors[stored]
        whole = np.empty((info.rows, info.cols), np.float32)
        for first, end in grains(info.shape):
            whole[first:end] = self._source.rows(stored, first, end)
        return torch.from_numpy(whole.reshape(info.shape))


def _called(model: Any) -> dict[tuple[str, str], list[str]]:
    """For each value, by module and its name there: its whole name, first, and those of what it is tied
    to."""
    every = [(n, key, value) for n, m in model.named_modules() for key, value in _values(m)]
    tied: dict[int, list[str]] = {}
    for name, key, value in every:
        tied.setdefault(id(value), []).append(f"{name}.{key}" if name else key)
    return {
        (name, key): sorted(tied[id(value)], key=(f"{name}.{key}" if name else key).__ne__)
        for name, key, value in every
    }


def _values(module: Any) -> list[tuple[str, torch.Tensor]]:
    """A module's own parameters, and buffers that files hold."""
    buffers = {
        k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set
    }
    both = [*module._parameters.items(), *buffers.items()]
    return [(key, value) for key, value in both if value is not None]


class _Lookups(TorchFunctionMode):
    """Reads the rows that are looked up in embeddings; `tables` as of _Weights."""

    def __init__(self, tables: Mapping[int, Stored]) -> None:
        super().__init__()
        self._tables = tables

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding:
            ids, weight = [*args, *(kwargs[k] for k in ("input", "weight") if k in kwargs)][:2]
            if table := self._tables.get(id(weight)):
                return _looked_up(table, ids)
        return func(*args, **kwargs)


def _looked_up(table: Stored, ids: torch.Tensor) -> torch.Tensor:
    numbers, places = np.unique(ids.numpy(), return_inverse=True)
    if numbers[0] < 0 or numbers[-1] >= table.info.rows:
        what = f"{table.name!r} has {table.info.rows} rows"
        raise RunError(
            f"row {numbers[-1]} is looked up, but {what}; its tokenizer is of another model"
        )
    rows = table.float_rows(numbers)[places.reshape(-1)]
    return torch.from_numpy(rows).reshape(*ids.shape, table.info.cols)
