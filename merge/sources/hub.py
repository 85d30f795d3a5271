"""Models of the Hugging Face hub: fetched whole for merging, or only their headers for planning.

The hub's own library does the transfers, so its cache and its settings hold here too: HF_HOME,
HF_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HF_HUB_OFFLINE. It is imported where it is used: it is slow.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from glob import escape
from pathlib import Path

from merge.errors import MergetoolError, ReadError, SourceError
from merge.sources import Source, TensorInfo
from merge.sources.foreign import refuse_declared
from merge.sources.model import ADAPTER, ADAPTER_PICKLED, ADAPTER_WEIGHTS, read_json
from merge.sources.pickled import parse_checkpoint
from merge.sources.safetensors import (
    INDEX,
    SINGLE,
    header_length,
    parse_header,
)
from merge.sources.weights import (
    LAYOUTS,
    SAFETENSORS,
    chosen_files,
    open_weights,
    whole_model,
)

BESIDE = ["*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "tokenizer*"]
NEVER = ["*/*", "*.bin", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.pt", "*.pth", "*.safetensors"]
ENDINGS = tuple(ending for layout in LAYOUTS for ending in (*layout.endings, layout.index))
COMMIT = re.compile(r"[0-9a-f]{40}")
HEADER_THREADS = 8  # as many as the hub's library uses for files: it is waiting, not work
LOGIN = "log in with `hf auth login` or set HF_TOKEN"


def fetch(repo: str, revision: str | None, *, offline: bool = False) -> tuple[Path, str]:
    """The folder of a hub model, complete, and its commit; what the cache has is not fetched again.

    revision: branch, tag or commit; None is the main branch. offline: the cache alone.
    Raises SourceError.
    """
    model = _wanted(repo, revision, offline)
    folder, weights = _small_files(model)
    with _told_in_one_line(model):
        _download(model, folder.name, allow=[escape(file) for file in weights], ignore=[])
    if missing := _missing(folder, weights):
        raise SourceError(
            f"{model}: {missing[0]} is not there, though the model needs it "
            f"(commit {folder.name}); tell the model's authors"
        )
    return folder, folder.name


def peek(repo: str, revision: str | None, *, offline: bool = False) -> tuple[Path, str, Source]:
    """As `fetch` and `open_weights`, but of weights that are not in the cache only the headers.

    The source then knows all tensors, and its `read` raises ReadError. Raises SourceError.
    """
    model = _wanted(repo, revision, offline)
    folder, weights = _small_files(model)
    if not _missing(folder, weights):
        return folder, folder.name, open_weights(folder)
    if model.offline:
        raise SourceError(f"{model}: {_not_cached()}")
    with _told_in_one_line(model), ThreadPoolExecutor(HEADER_THREADS) as pool:
        headers = list(pool.map(lambda file: _remote_header(model, folder, file), weights))
    tensors = whole_model(folder, dict(zip(weights, headers, strict=True)))

    def read(name: str, first_row: int, end_row: int, out: memoryview) -> None:
        raise ReadError(f"{model}: tensor {name!r} is not here; only headers were fetched, to plan")

    return folder, folder.name, Source(tensors, read)


def fetch_adapter(repo: str, revision: str | None, *, offline: bool = False) -> tuple[Path, str]:
    """As `fetch`, but the two files of a LoRA adapter, which is small, and nothing else; its weights in
    PyTorch's format where it has no others."""
    model = _wanted(repo, revision, offline)
    for weights in (ADAPTER_WEIGHTS, ADAPTER_PICKLED):
        with _told_in_one_line(model):
            folder = _download(model, revision, allow=[ADAPTER, weights], ignore=[])
        if not COMMIT.fullmatch(folder.name):
            raise SourceError(f"{model}: the hub's commit is {folder.name!r}, which is no hash")
        if not _missing(folder, (ADAPTER, weights)):
            return folder, folder.name
    lacks = f"is no adapter: it has no {ADAPTER} with {ADAPTER_WEIGHTS} or {ADAPTER_PICKLED} beside"
    raise SourceError(f"{model}: {_not_cached() if model.offline else lacks}")


@dataclass(frozen=True)
class _Wanted:
    """A model of the hub as it was asked for; its text is how messages name it."""

    repo: str
    revision: str | None
    offline: bool

    def __str__(self) -> str:
        name = self.repo if self.revision is None else f"{self.repo}@{self.revision}"
        return f"model {name!r}"


def _wanted(repo: str, revision: str | None, offline: bool) -> _Wanted:
    from huggingface_hub import constants

    model = _Wanted(repo, revision, offline or constants.HF_HUB_OFFLINE)
    # the library makes paths of revisions; git forbids these too
    if revision is not None and (".." in revision or revision[:1] in ("/", "")):
        raise SourceError(f"{model}: not a revision; give a branch, a tag or a commit hash")
    return model


def _small_files(model: _Wanted) -> tuple[Path, list[str]]:
    """The model's folder with everything but weights, and the names of the weight files it needs.

    Before a single weight is fetched it is known that they are of a format that is read.
    """
    with _told_in_one_line(model):
        folder = _download(model, model.revision, allow=BESIDE, ignore=NEVER)
        if not COMMIT.fullmatch(folder.name):
            raise SourceError(f"{model}: the hub's commit is {folder.name!r}, which is no hash")
        names = _names(model, folder)
    if (folder / "config.json").is_file():
        refuse_declared(str(model), read_json(folder / "config.json"))
    if model.offline and not any(name.endswith(ENDINGS) for name in names):
        raise SourceError(f"{model}: {_not_cached()}")
    weights = chosen_files(str(model), folder, names)
    if not (folder / "config.json").is_file():
        raise SourceError(
            f"{model}: has no config.json; whole models can be merged, and adapters as model+adapter"
        )
    return folder, weights


def _names(model: _Wanted, folder: Path) -> list[str]:
    """Names of the model's files; asks the hub only where the folder leaves the weights open."""
    here = [file.name for file in folder.iterdir()]
    if model.offline or INDEX in here or SINGLE in here:
        return here
    from huggingface_hub import HfApi

    return HfApi().list_repo_files(model.repo, revision=folder.name)


def _missing(folder: Path, files: Sequence[str]) -> list[str]:
    return [file for file in files if not (folder / file).is_file()]


def _download(model: _Wanted, revision: str | None, allow: list[str], ignore: list[str]) -> Path:
    """The folder in the cache, which is named by the commit."""
    from huggingface_hub import snapshot_download

    with _bars_on_terminals_alone():
        folder = snapshot_download(
            model.repo,
            revision=revision,
            allow_patterns=allow,
            ignore_patterns=ignore,
            local_files_only=model.offline,
        )
    return Path(folder)


@contextmanager
def _bars_on_terminals_alone() -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its lists of names are lazy
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    asked_for = constants.HF_HUB_DISABLE_PROGRESS_BARS is not None  # by the variable of this name
    if asked_for or sys.stderr.isatty() or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def _remote_header(model: _Wanted, folder: Path, file: str) -> dict[str, TensorInfo]:
    """The tensors of one weight file on the hub, as if it lay in `folder`; of a PyTorch checkpoint
    without their places, for which each storage would have to be asked for."""
    from huggingface_hub import hf_hub_url

    url = hf_hub_url(model.repo, file, revision=folder.name)
    name = f"{model}: {file}"

    def read(start: int, end: int) -> bytes:
        got = _remote_bytes(url, start, end)[0] if end > start else b""
        if len(got) != end - start:
            raise SourceError(f"{name}: the hub sent {len(got)} of {end - start} bytes; try again")
        return got

    first, size = _remote_bytes(url, 0, 8)
    if file.endswith(SAFETENSORS.endings):
        text = read(8, 8 + header_length(name, size, first))
        tensors = parse_header(name, size, text)
    else:
        tensors = parse_checkpoint(name, size, read, places=False)
    return {tensor: replace(info, file=str(folder / file)) for tensor, info in tensors.items()}


def _remote_bytes(url: str, start: int, end: int) -> tuple[bytes, int]:
    """Bytes [start, end) of a file on the hub and the whole file's size; never reads much more."""
    from huggingface_hub import constants
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its lists of names are lazy
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    headers = build_hf_headers() | {
        "Range": f"bytes={start}-{end - 1}",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout) as response:
        hf_raise_for_status(response)
        whole = response.status_code == 200  # a server that does not know ranges
        skipped, wanted = (start if whole else 0), end - start
        got = bytearray()
        for chunk in response.iter_bytes(1 << 16):
            got += chunk
            if len(got) >= skipped + wanted:
                break
        told = response.headers["Content-Length" if whole else "Content-Range"]
        return bytes(got[skipped : skipped + wanted]), int(told.rpartition("/")[2])


@contextmanager
def _told_in_one_line(model: _Wanted) -> Iterator[None]:
    """Turns whatever the hub's library raises, which is no closed set, into a SourceError."""
    try:
        yield
    except MergetoolError:
        raise
    except Exception as error:
        raise SourceError(f"{model}: {_reason(model, error)}") from None


def _reason(model: _Wanted, error: Exception) -> str:
    from huggingface_hub import constants, errors

    page = f"{constants.ENDPOINT}/{model.repo}"
    if isinstance(error, errors.LocalEntryNotFoundError) and model.offline:
        return _not_cached()
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.HFValidationError):
        return "not a hub id; write owner/name or owner/name@revision"
    if isinstance(error, errors.GatedRepoError):
        return f"gated on the hub; accept its licence at {page}, then {LOGIN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"not on the hub ({page}), or private; check the name, or {LOGIN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision; give a branch, a tag or a commit hash of {page}"
    if isinstance(error, errors.EntryNotFoundError) and isinstance(error, errors.HfHubHTTPError):
        name = Path(error.response.url.path).name
        return f"{name} is not there, though the model needs it; tell the model's authors"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        todo = f"check your access and {LOGIN}" if status in (401, 403) else "try again later"
        return f"{constants.ENDPOINT} answers {status}; {todo}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return (
            f"cannot write to the cache {constants.HF_HUB_CACHE} ({error.strerror}); "
            "free space there, or set HF_HOME to a folder on another disk"
        )
    found = " ".join(f"{type(error).__name__}: {error}".split())
    return (
        f"could not be fetched whole from {constants.ENDPOINT} ({found}); check the network and "
        "run the same command again, or use --offline if the cache has the model"
    )


def _not_cached() -> str:
    from huggingface_hub import constants

    return f"not complete in the cache {constants.HF_HUB_CACHE} and offline; fetch it online once"
