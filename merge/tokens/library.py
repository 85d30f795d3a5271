"""The library `tokenizers`, which raises plain exceptions and panics on files that it does not like."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from merge.errors import MergetoolError, SourceError


@contextmanager
def library_errors(label: str) -> Iterator[None]:
    """Whatever the library raises, as a SourceError of one line."""
    try:
        yield
    except (MergetoolError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:  # its panics are no Exception
        told = " ".join(str(error).split())[:200]
        raise SourceError(f"{label}: tokenizers cannot use tokenizer.json: {told}") from None


def read_tokenizer(table: Mapping[str, Any]) -> Any:
    """A tokenizers.Tokenizer of the contents of a tokenizer.json; within library_errors."""
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(table))
