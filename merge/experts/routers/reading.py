"""What a base makes of texts: the mean of the vectors that its modules read, in a process of its own.

The process has torch and transformers in it; code that comes with a model is not run. It reads the base's
tensors by position (see passes.py), computes in float32 on one thread for each pass, and writes what it
found to a file that is gone once it is opened.
"""

import json
import logging
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from merge.adapters.file import GrowingFile
from merge.apart import reason_of, run_apart
from merge.blas import Matrix
from merge.errors import MergetoolError, RunError
from merge.experts.texts import TextsDigest, texts_of
from merge.sources import Source, TensorInfo
from merge.sources.model import Model, class_names
from merge.sources.positioned import stored_source
from merge.sources.safetensors import read_header
from merge.tokens.rows import Stored

LONGEST = 1024  # tokens: of a text in a file those count, a prompt must not have more
FOUND = "inputs.safetensors"
FEW_THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
# MALLOC_ARENA_MAX: glibc kept up to 130 MiB of weights that were let go, in heaps of each thread
ENVIRONMENT = FEW_THREADS | {
    "MALLOC_ARENA_MAX": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Asked:
    """`config`: the table of config.json. `modules`: module of the base -> width of the vectors that it
    reads. `texts`: key -> prompts; `files`: key -> files of texts, `digests`: of what these say. `statistic`,
    of the vectors of a text, one a token:

    last       that of the last token, in the mean over texts; what a tokenizer adds after a text is not its
    mean       their mean, in the mean over texts
    tokens     in the mean over the tokens of all texts
    embedding  as mean, but of the rows of tensor `embedding`, for the module "": nothing is run
    """

    label: str
    folder: str
    architecture: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, int]
    statistic: str
    texts: Mapping[str, Sequence[str]]
    files: Mapping[str, Sequence[str]]
    embedding: str = ""
    digests: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: Model, **rest: Any) -> "Asked":
        folder, tensors = str(base.folder), base.source.tensors
        kind = next(iter(class_names(base.config)), "none")
        return cls(base.label, folder, kind, dict(base.config), tensors, **rest)

    @property
    def keys(self) -> list[str]:
        return [*self.texts, *self.files]


class Inputs:
    """The vectors that were asked for; found out when the first of them is."""

    def __init__(self, asked: Asked) -> None:
        self._asked, self._lock = asked, threading.Lock()
        self._found: Source | RunError | None = None

    def vector(self, key: str, module: str) -> Matrix:
        """[width] float64; raises RunError."""
        with self._lock:
            if self._found is None:
                self._found = _read_apart(self._asked)
        if isinstance(self._found, RunError):
            raise self._found
        return _vector(self._found, key, module)


def _vector(source: Source, key: str, module: str) -> Matrix:
    name = f"{key} {module}"
    found = np.empty(source.tensors[name].rows)
    source.read(name, 0, len(found), found.view(np.uint8).data)
    return found


def _read_apart(asked: Asked) -> Source | RunError:
    """What a process of its own finds, as tensors `KEY MODULE` [width] F64 of a file that has no name any
    more."""
    with TemporaryDirectory(prefix="mergetool-") as folder:
        file = Path(folder) / FOUND
        told = json.dumps(asdict(asked))
        done = run_apart(
            "merge.experts.routers.reading", str(file), told=told, environment=ENVIRONMENT
        )
        if done.returncode:
            return RunError(f"{asked.label}: prompts cannot be read: {reason_of(done)}")
        source = stored_source(read_header(file))
        _vector(source, asked.keys[0], next(iter(asked.modules)))  # opens it before its name goes
        return source


# -- in the process of its own ---------------------------------------------------------------------


def main() -> None:
    told = json.load(sys.stdin)
    told["tensors"] = {name: _info(**info) for name, info in told["tensors"].items()}
    try:
        write_inputs(Asked(**told), Path(sys.argv[1]))
    except MergetoolError as error:
        sys.exit(str(error))


def _info(shape: list[int], strides: list[int] | None, **rest: Any) -> TensorInfo:
    return TensorInfo(
        shape=tuple(shape), strides=(strides[0], strides[1]) if strides else None, **rest
    )


def write_inputs(asked: Asked, file: Path) -> None:
    """Writes tensors `KEY MODULE`, [width] F64 each, to `file`; raises MergetoolError.

    Holds one vector for every module in memory, whatever the number of keys.
    """
    means = _embedded(asked) if asked.statistic == "embedding" else _run(asked)
    growing = GrowingFile(file, [f"{key} {m}" for key in asked.keys for m in asked.modules], {})
    for key, found in means:
        for module, mean in found.items():
            growing.add(f"{key} {module}", "F64", mean.shape, [mean])
    growing.finish()


def _embedded(asked: Asked) -> Iterator[tuple[str, dict[str, Matrix]]]:
    """By key, the mean over texts of the mean of their tokens' rows."""
    tokens, table = _Tokens(asked, LONGEST), Stored(stored_source(asked.tensors), asked.embedding)
    for key in asked.keys:
        total, count = np.zeros(table.info.cols), 0
        for ids, _ in tokens.of(key):
            numbers = np.array(ids)
            if numbers.max() >= table.info.rows:
                what = f"has token {numbers.max()}, and {asked.embedding!r} {table.info.rows} rows"
                raise RunError(f"its tokenizer {what}")
            total += table.float_rows(numbers).astype(np.float64).sum(axis=0) / len(numbers)
            count += 1
        yield key, {"": total / count}


def _run(asked: Asked) -> Iterator[tuple[str, dict[str, Matrix]]]:
    """By key, the statistic of the vectors that each module reads."""
    from merge.experts.routers.passes import Passes, built

    model = built(asked.folder, asked.architecture, asked.config)
    passes = Passes(model, stored_source(asked.tensors), asked.modules, asked.statistic)
    tokens = _Tokens(asked, min(LONGEST, passes.positions))
    for key in asked.keys:
        yield key, passes.mean(tokens.of(key))


class _Tokens:
    """Texts as the ids that transformers' tokenizer of the base makes of them, its special tokens
    included."""

    def __init__(self, asked: Asked, longest: int) -> None:
        import transformers

        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(
            asked.folder, local_files_only=True, trust_remote_code=False
        )
        self._asked = asked
        self._longest = min(longest, self._tokenizer.model_max_length)

    def of(self, key: str) -> Iterator[tuple[list[int], int]]:
        """For each text of `key` its ids, at least one, and the place of its own last one: a tokenizer may
        add others after it. Raises RunError, also where there is no text."""
        found = False
        for prompt in self._asked.texts.get(key, ()):
            found, (ids, last) = True, self._ids(prompt)
            if len(ids) > self._longest:
                what = f"has {len(ids)} tokens; at most {self._longest} are read"
                raise RunError(f"prompt {prompt[:40]!r} {what}; shorten it")
            yield ids, last
        for file in self._asked.files.get(key, ()):
            said = TextsDigest()
            for text in said.of(texts_of(Path(file))):
                found, (ids, last) = True, self._ids(text.whole)
                yield ids[: self._longest], min(last, self._longest - 1)
            if said.hex != self._asked.digests.get(file, said.hex):
                raise RunError(f"{file} changed since this was planned; run it again")
        if not found:
            raise RunError(f"no text is left of {', '.join(self._asked.files.get(key, ()))}")

    def _ids(self, text: str) -> tuple[list[int], int]:
        ids: list[int] = self._tokenizer(text).input_ids
        bare: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise RunError(
                f"its tokenizer makes no token of {text[:40]!r}; change or remove the text"
            )
        ends = (end for end in range(len(ids), 0, -1) if bare and ids[:end][-len(bare) :] == bare)
        return ids, next(ends, len(ids)) - 1


if __name__ == "__main__":
    main()
