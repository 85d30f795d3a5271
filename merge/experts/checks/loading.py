"""Whether a written model loads with stock transformers: every tensor in its place to the bit, logits finite.

transformers only warns of tensors that it does not find and leaves them as they were drawn, and it says
nothing of experts that bear other numbers than it expects. So what it made of the files is written back,
layer by layer, and compared with them. All of it happens in a process of its own: for its memory, and so that
no code of the current folder runs.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from merge.anatomy import COUNTS, layer_of, matched, recomputed, tied_heads
from merge.apart import answer_of, available_memory, reason_of, run_apart
from merge.errors import MergetoolError, RequestError, SourceError, VerifyError
from merge.experts.checks.trust import may_run_code
from merge.score import FLOAT32_LIMIT
from merge.sources.model import Model, holds_adapter, read_json, refuse_adapters, text_config
from merge.sources.weights import open_safetensors

ERRORS = {kind.__name__: kind for kind in (VerifyError, RequestError, SourceError)}
OVERHEAD = 1.5  # times the weights: experts are put together while the files are read
LIBRARIES = 1 << 30  # bytes: torch, transformers, and what a forward pass takes
SHORT, LONG = 3, 40  # tokens of the two texts that are run
TEXTS = (  # what tokenizers part otherwise
    "Once upon a time, 12345 of them didn't.",
    "  two  spaces,\n\ta tab",
    "Zoë, naïve über 東京 🙂",
)


def check_loads(
    folder: Path, *, forward: bool = True, trusted: bool = False, like: Path | None = None
) -> dict[str, Any]:
    """{"loads_as": class, "compared": whether every bit was, "forward": whether tokens were run}, and "notes"
    where texts are not read as the model in the folder `like` reads them.

    Of a model larger than the free memory only names and shapes are compared. trusted: code in the folder
    may run that is not ours. Raises VerifyError for the first tensor that is not in its place, or where the
    outputs are not finite; RequestError for an adapter and for code that is not trusted.
    """
    refuse_adapters(folder)
    if holds_adapter(folder):
        todo = "merge it into its base (model: base+adapter) and load the result"
        raise RequestError(f"{folder}: is an adapter, which does not load without its base; {todo}")
    asked = json.dumps(
        {
            "folder": str(folder.absolute()),
            "forward": forward,
            "trusted": trusted,
            "like": like and str(like.absolute()),
        }
    )
    with tempfile.TemporaryDirectory() as modules:
        own = {"HF_MODULES_CACHE": modules}  # copies of modelling code
        done = run_apart("merge.experts.checks.loading", told=asked, environment=own)
    return _told(folder, done)


def _told(folder: Path, done: "subprocess.CompletedProcess[str]") -> dict[str, Any]:
    if done.returncode:
        raise VerifyError(f"{folder}: cannot be loaded with transformers: {reason_of(done)}")
    told: dict[str, Any] = json.loads(answer_of(done))
    if "error" in told:
        raise ERRORS.get(told["error"], VerifyError)(told["what"])
    return told


def main() -> None:
    """Answers check_loads: what it asks on stdin, what was found on the last line of stdout."""
    asked = json.load(sys.stdin)
    try:
        with quiet():
            told = check_loads_here(Path(asked["folder"]), asked["forward"], asked["trusted"])
            if asked["like"]:
                told |= _compared_reading(Path(asked["folder"]), Path(asked["like"]))
    except MergetoolError as error:
        told = {"error": type(error).__name__, "what": str(error)}
    print(json.dumps(told))


def check_loads_here(folder: Path, forward: bool = True, trusted: bool = False) -> dict[str, Any]:
    """As check_loads, in this process."""
    opened, remote = _opened(folder), may_run_code(folder, trusted=trusted)
    _check_size(opened, remote)
    if OVERHEAD * _bytes(opened) + LIBRARIES > available_memory():
        model = _described(opened, remote)
        _check_described(opened, model)
        return {"loads_as": type(model).__name__, "compared": False, "forward": False}
    model = _loaded(opened, remote, "auto")
    _check_values(opened, model)
    ran = forward and _runs(folder, model)
    return {"loads_as": type(model).__name__, "compared": True, "forward": ran}


# -- building and loading --------------------------------------------------------------------------


def loaded_model(folder: Path, *, trusted: bool = False) -> Any:
    """The model in `folder` as transformers loads it, to be run: in float32 up to FLOAT32_LIMIT.

    Raises VerifyError where a tensor is not in its place, RequestError for code that is not trusted.
    """
    import torch

    opened, remote = _opened(folder), may_run_code(folder, trusted=trusted)
    dtype = torch.float32 if _bytes(opened) <= FLOAT32_LIMIT else "auto"
    with quiet():
        return _loaded(opened, remote, dtype)


def _opened(folder: Path) -> Model:
    refuse_adapters(folder)
    return Model(str(folder), folder, read_json(folder / "config.json"), open_safetensors(folder))


def _bytes(opened: Model) -> int:
    return sum(info.nbytes for info in opened.source.tensors.values())


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps warnings and bars of transformers from between the lines of a command."""
    from transformers import logging

    told, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(told)
        if bar:
            logging.enable_progress_bar()


def _check_size(opened: Model, remote: bool) -> None:
    """Raises VerifyError where config.json describes a far larger model, which would fill the memory."""
    stored = opened.source.tensors
    for table in (opened.config, text_config(opened.config)):
        for key in COUNTS:
            if isinstance(count := table.get(key), int) and count > len(stored):
                raise VerifyError(
                    f"{opened.folder}: config.json describes {key} {count}, but the files hold {len(stored)} "
                    "tensors"
                )
    described = sum(p.numel() for p in _described(opened, remote).parameters())
    held = sum(info.rows * info.cols for info in stored.values())
    if described > 2 * held:
        raise VerifyError(
            f"{opened.folder}: config.json describes {described} parameters, but the files hold {held}"
        )


def _described(opened: Model, remote: bool) -> Any:
    """The model that config.json describes, without values; raises VerifyError."""
    import torch
    from transformers import AutoConfig, PreTrainedModel

    reason = ""
    for loader in _loaders(opened.config, remote):
        try:
            config = AutoConfig.from_pretrained(
                opened.folder, local_files_only=True, trust_remote_code=remote
            )
            with torch.device("meta"):  # shapes alone
                if issubclass(loader, PreTrainedModel):
                    return loader(config)
                return loader.from_config(config, trust_remote_code=remote)
        except Exception as error:  # whatever a modelling file raises
            reason = reason or _reason(error)
    raise VerifyError(f"{opened.folder}: cannot be loaded with transformers: {reason}")


def _loaded(opened: Model, remote: bool, dtype: Any) -> Any:
    """The model by the first class that can load it; VerifyError names what it lacks, or why none can."""
    reason = ""
    for loader in _loaders(opened.config, remote):
        try:
            model, found = loader.from_pretrained(
                opened.folder,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are told in the loading info
                local_files_only=True,
                trust_remote_code=remote,
                dtype=dtype,
            )
        except Exception as error:  # whatever a modelling file raises
            reason = reason or _reason(error)
            continue
        _check_found(opened.folder, model, found)
        return model.eval()
    _check_described(opened, _described(opened, remote))  # which may name a tensor
    raise VerifyError(f"{opened.folder}: cannot be loaded with transformers: {reason}")


def _loaders(config: Mapping[str, Any], remote: bool) -> Iterator[Any]:
    """What may make the model: the classes that config.json names, of the folder's code where that may run;
    then what is usual."""
    import transformers

    listed = config.get("architectures")
    kinds = [str(kind) for kind in listed] if isinstance(listed, list) else []
    table = config.get("auto_map")
    for auto, path in (table if remote and isinstance(table, dict) else {}).items():
        if isinstance(path, str) and path.rpartition(".")[2] in kinds:
            yield getattr(transformers, auto)
    for kind in kinds:
        found = getattr(transformers, kind, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            yield found
    yield transformers.AutoModelForCausalLM
    yield transformers.AutoModel


def _check_found(folder: Path, model: Any, found: Mapping[str, Any]) -> None:
    """Raises VerifyError for what transformers itself says about the tensors."""
    for what, problem in (
        ("missing_keys", "is missing"),
        ("unexpected_keys", "is not expected"),
        ("mismatched_keys", "has another shape than expected"),
    ):
        names = (key if isinstance(key, str) else str(key[0]) for key in found.get(what) or ())
        for name in sorted(names):
            raise VerifyError(
                f"{folder}: tensor {name!r} {problem} when loaded as {type(model).__name__}"
            )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


# -- comparing -------------------------------------------------------------------------------------


def _check_described(opened: Model, model: Any) -> None:
    """Raises VerifyError unless a model without values has the names and shapes of the files."""
    state = model.state_dict()
    try:
        _pairs(opened, model, _written(model, state))
    except VerifyError as error:
        try:
            _pairs(opened, model, state)  # experts may be stored as transformers holds them
        except VerifyError:
            raise error from None


def _check_values(opened: Model, model: Any) -> None:
    """Raises VerifyError unless a loaded model has every bit of the files, and no more."""
    from safetensors import safe_open

    state = model.state_dict()
    names = _written(model, {name: tensor.to("meta") for name, tensor in state.items()})
    pairs, stored = _pairs(opened, model, names), opened.source.tensors
    tied = tied_heads(opened.config, stored)
    names_of_files = {info.file for info in stored.values()}
    files: dict[str, Any] = {file: safe_open(file, "pt") for file in names_of_files}
    left = set(pairs.values()) - set(tied)
    for part in (*_parts(state), state):
        if not left:
            return
        for name, tensor in _written(model, part).items():
            place = pairs.get(name)
            if place in left:
                held = files[stored[place].file].get_tensor(place)
                _check_bits(opened.folder, place, held, tensor)
                left.discard(place)
    if left:
        raise VerifyError(
            f"{opened.folder}: tensor {min(left)!r} could not be compared with what {type(model).__name__} "
            "holds"
        )


def _written(model: Any, state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Tensors of a model by the names, and in the pieces, in which transformers writes them: those of each
    expert apart."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))  # type: ignore[no-any-return]


def _parts(state: Mapping[str, Any]) -> Iterable[dict[str, Any]]:
    """The tensors of each layer, and those outside of layers: so little is copied at once. What is written
    back of several of these together is not among what is written back of each."""
    layers: dict[Any, dict[str, Any]] = defaultdict(dict)
    for name, tensor in state.items():
        layers[layer_of(name)][name] = tensor
    return layers.values()


def _pairs(opened: Model, model: Any, tensors: Mapping[str, Any]) -> dict[str, str]:
    """Tensors of the model -> those of the files; raises VerifyError where one is missing, is of no use or
    has another shape."""
    kind, stored = type(model).__name__, opened.source.tensors
    pairs = matched(tensors, stored)
    shared = _shared(model) | set(tied_heads(opened.config, stored, tensors))
    ignored = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    for name in tensors:
        if name not in pairs and name not in shared and not _fits(ignored, name):
            what = f"tensor {name!r} is missing when loaded as {kind}"
            raise VerifyError(f"{opened.folder}: {what}")
    used = {*pairs.values(), *tied_heads(opened.config, stored)}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name, info in stored.items():
        if name not in used and not recomputed(name, info.shape) and not _fits(ignored, name):
            what = f"tensor {name!r} is not expected when loaded as {kind}"
            raise VerifyError(f"{opened.folder}: {what}")
    for name, place in pairs.items():
        shape, found = list(tensors[name].shape), list(stored[place].shape)
        if shape != found:
            what = f"tensor {place!r} has shape {found}, but {shape} when loaded as {kind}"
            raise VerifyError(f"{opened.folder}: {what}")
    return pairs


def _fits(patterns: Iterable[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _shared(model: Any) -> set[str]:
    """Names of parameters that are one and the same as another."""
    named: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        named[id(parameter)].append(name)
    return {name for names in named.values() if len(names) > 1 for name in names}


def _check_bits(folder: Path, name: str, stored: Any, loaded: Any) -> None:
    import torch

    def bits(tensor: Any) -> Any:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    if not torch.equal(bits(stored.to(loaded.dtype)), bits(loaded)):
        raise VerifyError(f"{folder}: tensor {name!r} has other values loaded than stored")
    if loaded.is_floating_point() and not bool(torch.isfinite(loaded).all()):
        raise VerifyError(f"{folder}: tensor {name!r} holds NaN or infinity")


# -- reading texts -----------------------------------------------------------------------------------


def _compared_reading(folder: Path, like: Path) -> dict[str, list[str]]:
    """A note where the two give other tokens for a text: transformers goes by model_type for the class of a
    tokenizer, which may read tokenizer.json otherwise."""
    from transformers import AutoTokenizer

    try:
        both = [
            AutoTokenizer.from_pretrained(f, local_files_only=True, trust_remote_code=False)
            for f in (folder, like)
        ]
        unlike = any(both[0](text).input_ids != both[1](text).input_ids for text in TEXTS)
    except (
        Exception
    ):  # no tokenizer; for files that it cannot read `tokenizers` raises a plain Exception
        return {}
    if not unlike:
        return {}
    kinds = [type(tokenizer).__name__ for tokenizer in both]
    what = f"transformers reads its texts by {kinds[0]}, and the base's by {kinds[1]}"
    todo = f"load its tokenizer with {kinds[1]}.from_pretrained, or choose another architecture"
    return {"notes": [f"{what}, which gives other tokens: {todo}"]}


# -- running ---------------------------------------------------------------------------------------


def _runs(folder: Path, model: Any) -> bool:
    """Whether tokens were run: not by a model that takes none. VerifyError where outputs are not finite."""
    import torch

    if model.main_input_name != "input_ids":
        return False
    for length in (SHORT, LONG):
        ids = _ids(model, length)
        inputs = {"input_ids": ids}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
        try:
            with torch.no_grad():
                out = model(**inputs)
        except Exception as error:  # whatever a modelling file raises
            raise VerifyError(f"{folder}: its forward pass fails: {_reason(error)}") from None
        if not bool(torch.isfinite(out["logits"] if "logits" in out else out[0]).all()):
            raise VerifyError(f"{folder}: its outputs for {ids.shape[1]} tokens are not finite")
    return True


def _ids(model: Any, length: int) -> Any:
    """[1, tokens] ids from all over the vocabulary, at most as many as there are positions."""
    import torch

    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or length
    rows = model.get_input_embeddings().weight.shape[0]
    tokens = torch.arange(max(1, min(length, most - 2)))  # some count positions from 2
    return (tokens * 7919 + 1)[None] % rows


if __name__ == "__main__":
    main()
