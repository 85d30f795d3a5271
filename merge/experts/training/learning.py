"""Trains the routers of a mixture and nothing else, and writes the mixture again with them.

The model is loaded as a whole, on one device. On a CPU the same command gives the same bytes with the same
number of threads and the same torch, wherever it was cut off: the order of texts is a hash, nothing is
dropped out, and all that a step depends on is in the state that is saved.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from merge.budget import keep_freed_memory, make_budget
from merge.carry import carried_digests, own_version
from merge.disk import digest_of
from merge.errors import OutputError, RequestError, RunError
from merge.experts.checks.loading import check_loads_here
from merge.experts.checks.loading import quiet as silent
from merge.experts.routers.gates import check_trainable, gates_of
from merge.experts.texts import Text, read_texts, texts_digest
from merge.experts.training.batches import Batch, Order, batch_of, batches_of, divided, encoded
from merge.experts.training.losses import balance_loss, counted, prediction_loss, size_loss
from merge.experts.training.rewriting import card_of, rewritten
from merge.experts.training.running import opened
from merge.experts.training.state import State, rate_at, read_state, save_state
from merge.numerics import Raw, from_float32, random_key, to_float32
from merge.output import (
    Progress,
    check_disk,
    check_open_files,
    check_replaceable,
    is_replaceable,
    usable,
)
from merge.pipeline import quiet, written
from merge.plan import Plan
from merge.score import TINY
from merge.sources.model import Model
from merge.sources.opening import open_model
from merge.verify import provenance_of, verify_folder
from merge.write import (
    JOURNAL,
    TRAINING,
    check_inputs,
    check_same,
    discard_leftover,
    input_stamps,
    partial_of,
    read_journal,
    take_lock,
)

STATE = "state.safetensors"
Told = Callable[[int, float, float], None]  # step, losses of its batch: of tokens, of balance


@dataclass(frozen=True)
class Course:
    """How routers are trained. `rate`: the highest learning rate; `batch`: texts a step; `balance`, `z_loss`:
    weights of those losses; `length`: tokens of a text that are looked at; `eos`: that token ends a text."""

    steps: int = 300
    rate: float = 1e-2
    batch: int = 16
    balance: float = 0.01
    z_loss: float = 0.0
    seed: int = 0
    length: int = 512
    eos: bool = True


@dataclass(frozen=True)
class Trained:
    """A mixture with trained routers: its folder; whether it was there already; after how many steps this run
    began; what its provenance tells of the training; what was verified."""

    folder: Path
    existed: bool
    taken_up: int
    told: Mapping[str, Any]
    verified: Mapping[str, Any]


def train_router(
    folder: Path,
    files: Sequence[Path],
    output: Path,
    course: Course = Course(),
    *,
    device: str = "cpu",
    threads: int | None = None,
    save_every: int = 50,
    restart: bool = False,
    overwrite: bool = False,
    trusted: bool = False,
    progress: Progress = quiet,
    told: Told = lambda *_: None,
) -> Trained:
    """Trains the routers of the mixture in `folder` on the texts in `files`, writes the result to `output`;
    goes on where the same command was cut off.

    save_every: steps after which the state is saved. trusted: code in `folder` may run that is not ours.
    Raises RequestError before anything is written, RunError afterwards.
    """
    _check_device(device)
    model = open_model(str(folder))
    if model.adapters:
        raise RequestError(
            f"{folder}: is a model with an adapter, and training writes all else as it is; merge the adapter "
            "into it first"
        )
    check_trainable(model, gates_of(model))
    read = [(file.name, read_texts([file])) for file in files]
    texts = [text for _, listed in read for text in listed]
    divided(texts)
    values: dict[str, Raw] = {}
    asked = _asked(model, read, course)
    plan = rewritten(model, values, tuple(gates_of(model).names), _title(model, asked))
    output = _place(output, plan, files, overwrite)
    made = None if overwrite else _made(output, asked)
    if made is not None:
        discard_leftover(output)
        return Trained(output, True, course.steps, made, verify_folder(output))
    check_open_files(plan)
    budget, stamps = make_budget(plan), input_stamps(plan)
    what = _Wanted(model, texts, course, asked, _machine(model, device, threads), trusted)
    state, taken_up = _learned(what, output, plan, restart, save_every, told)
    check_inputs(stamps)
    values |= {name: _as_stored(model, name, value) for name, value in state.values.items()}
    plan = replace(plan, told={**_former(model), "training": state.facts})
    card = card_of(plan, _recounted(state.facts))
    keep_freed_memory()
    verified, _ = written(
        plan, budget, output, card, restart=restart, progress=progress,
        check=partial(_loads, trusted=trusted),
    )  # fmt: skip
    return Trained(output, False, taken_up, state.facts, verified)


def _loads(folder: Path, trusted: bool) -> dict[str, Any]:
    """As check_loads; the libraries are here already."""
    with silent():
        return check_loads_here(folder, trusted=trusted)


# -- what is asked for ------------------------------------------------------------------------------


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RequestError(
            f"--device {device}: cannot be used ({reason}); cpu always can"
        ) from None


def _asked(
    model: Model, read: Sequence[tuple[str, Sequence[Text]]], course: Course
) -> dict[str, Any]:
    """All that decides what is learned but for the machine, as JSON can tell it."""
    weights = {file.name: digest_of(file) for file in model.files()}
    carried = carried_digests(rewritten(model, {}, (), ""))
    return {
        "mixture": model.public_name,
        "files": weights | carried,
        "texts": [[name, texts_digest(texts)] for name, texts in read],
        **asdict(course),
    }


def _title(model: Model, asked: Mapping[str, Any]) -> str:
    """The trained routers among the models of a plan."""
    key = random_key("training", *(f"{name}={value}" for name, value in asked.items()))
    return f"routers of {model.public_name}, training {key:016x}"


def _machine(model: Model, device: str, threads: int | None) -> dict[str, Any]:
    """What else may decide about bits."""
    size = sum(file.stat().st_size for file in model.files())
    cores = 1 if size < TINY else len(os.sched_getaffinity(0))  # the tiny ones wait for one another
    return {
        "device": device,
        "threads": threads or cores,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "mergetool": own_version(),
    }


# -- what is there ----------------------------------------------------------------------------------


def _place(output: Path, plan: Plan, files: Sequence[Path], overwrite: bool) -> Path:
    """Where the result goes; raises OutputError where it cannot, PlanError where the disk is too small."""
    folder = usable(output, plan)
    for file in files:
        if folder.resolve() in file.resolve().parents:
            raise OutputError(f"{folder}: {file} lies in it; choose another output")
    if overwrite:
        check_replaceable(folder, files[0])
    check_disk(plan, folder)
    return folder


def _made(output: Path, asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What is told of the training whose result lies in `output`, None where nothing does; OutputError where
    it is something else."""
    if not output.is_dir() or not any(output.iterdir()):
        return None
    training = (provenance_of(output) or {}).get("training")
    if not isinstance(training, dict) or training.get("asked") != asked:
        todo = ", or give --overwrite to replace it" if is_replaceable(output) else ""
        raise OutputError(
            f"{output}: holds something else than this training's result; choose another output{todo}"
        )
    return training


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    lock = take_lock(output)
    try:
        yield
    finally:
        os.close(lock)


def _check_unfinished(output: Path, plan: Plan, restart: bool) -> None:
    """Raises OutputError where an unfinished merge lies there that is not of this training's result."""
    partial = partial_of(output)
    lines, _ = read_journal(partial / JOURNAL)
    if lines and not restart:
        check_same(partial, lines[0], plan.digest, input_stamps(plan))


def _taken_up(file: Path, course: Mapping[str, Mapping[str, Any]]) -> State | None:
    """The state in `file`, where it is of this training; OutputError names what differs."""
    state = read_state(file)
    if state is None:
        return None
    for part, wanted in course.items():
        had = state.facts.get(part) or {}
        for key, value in wanted.items():
            if had.get(key) != value:
                was = f"with {key} {had.get(key)}, not {value}"
                what = "of other files" if key in ("files", "texts") else was
                raise OutputError(
                    f"{file.parent}: holds an unfinished training {what}; finish that one, give --restart to "
                    "discard it, or choose another output"
                )
    return state


# -- training ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """A training: `asked` and `machine` decide about every bit."""

    model: Model
    texts: Sequence[Text]
    course: Course
    asked: Mapping[str, Any]
    machine: Mapping[str, Any]
    trusted: bool


def _learned(
    wanted: _Wanted, output: Path, plan: Plan, restart: bool, save_every: int, told: Told
) -> tuple[State, int]:
    """The state at the end, and after how many steps this run began; the loaded model is gone then."""
    file = partial_of(output) / TRAINING / STATE
    with _repeatable(wanted.machine):
        work = _Work(wanted)
        with _locked(output):
            if restart:
                shutil.rmtree(file.parent, ignore_errors=True)
            _check_unfinished(output, plan, restart)
            begun = _taken_up(file, {"asked": wanted.asked, "machine": wanted.machine})
            taken_up = begun.step if begun else 0
            return work.run(begun, file, save_every, told), taken_up


@contextmanager
def _repeatable(machine: Mapping[str, Any]) -> Iterator[None]:
    """So many threads, and on a CPU only algorithms that give the same bits each time."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(machine["threads"])
    torch.use_deterministic_algorithms(machine["device"] == "cpu")
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.use_deterministic_algorithms(before[1])


class _Work:
    """A loaded mixture and its texts."""

    def __init__(self, wanted: _Wanted) -> None:
        self.wanted, self.course, self.model = wanted, wanted.course, wanted.model
        self.device = wanted.machine["device"]
        self.running = opened(self.model, gates_of(self.model), self.device, wanted.trusted)
        learned, held = divided(wanted.texts)
        self.learned, self.held = self._encoded(learned), self._encoded(held)
        self.order = Order(len(self.learned), self.course.batch, self.course.seed)

    def _encoded(self, texts: Sequence[Text]) -> Any:
        end = self.running.tokenizer.eos_token_id if self.course.eos else None
        if self.course.eos and end is None:
            raise RequestError(
                f"{self.model.label}: its tokenizer names no eos token; give --no-eos"
            )
        return encoded(texts, self.running.tokenizer, self.course.length, end)

    def run(self, state: State | None, file: Path, save_every: int, told: Told) -> State:
        """The state after all steps, saved in `file` on the way."""
        if state is None:
            state = self._begun()
            save_state(state, file)
        state = state.on(self.device)
        self._put(state.values)
        while state.step < self.course.steps:
            self._step(state, told)
            if state.step % save_every == 0 and state.step < self.course.steps:
                save_state(state, file)
        if len(state.facts["held_out_loss"]) == 1:
            rounded = self._rounded(state.values)
            self._check_finite("routers", state.step, *rounded.values())
            self._put(rounded)
            loss = self.held_out_loss()
            self._check_finite("loss of held-out texts", state.step, torch.tensor(loss))
            state.facts["held_out_loss"].append(loss)
            save_state(state, file)
        return state

    def _check_finite(self, what: str, step: int, *values: Tensor) -> None:
        """Raises RunError; a state that holds NaN would never be anything else."""
        if not all(bool(torch.isfinite(value).all()) for value in values):
            raise RunError(
                f"{self.model.label}: NaN or infinity in the {what} after step {step}; give a lower --lr and "
                "--restart"
            )

    def _begun(self) -> State:
        values = {name: r.detach().float().clone() for name, r in self.running.routers.items()}
        facts = {
            "asked": self.wanted.asked,
            "machine": self.wanted.machine,
            "texts": {"learned": len(self.learned), "held_out": len(self.held)},
            "held_out_loss": [self.held_out_loss()],
        }
        return State.begun(values, facts)

    def _step(self, state: State, told: Told) -> None:
        course, routers = self.course, self.running.routers
        rows = [self.learned[i] for i in self.order.at(state.step)]
        batch = batch_of(rows, self.running.padding, self.device)
        loss, balance, whole = self._losses(batch)
        if not torch.isfinite(whole):
            raise RunError(
                f"{self.model.label}: the loss of step {state.step + 1} is {float(whole.detach())}; give a "
                "lower --lr and --restart"
            )
        gradients = torch.autograd.grad(whole, list(routers.values()), materialize_grads=True)
        named = dict(zip(routers, (gradient.float() for gradient in gradients), strict=True))
        state.descend(named, rate_at(state.step, course.steps, course.rate))
        self._check_finite("routers", state.step, *state.values.values())
        self._put(state.values)
        told(state.step, float(loss.detach()), float(balance.detach()))

    def _losses(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Of the batch's tokens, of balance, and what is made small."""
        course, running = self.course, self.running
        with running.watched() as scores:
            logits = running.model(input_ids=batch.ids, attention_mask=batch.kept.long()).logits
            found, kept = scores(), batch.kept.flatten()
            loss = prediction_loss(logits, batch.targets) / counted(batch.targets)
            balance = balance_loss(found, kept, running.gates.top_k)
            whole = loss + course.balance * balance
            if course.z_loss:
                whole = whole + course.z_loss * size_loss(found, kept)
        return loss, balance, whole

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """The mean over all tokens of the held-out texts that count."""
        total, count = 0.0, 0
        for batch in batches_of(self.held, self.course.batch, self.running.padding, self.device):
            logits = self.running.model(
                input_ids=batch.ids, attention_mask=batch.kept.long()
            ).logits
            total += float(prediction_loss(logits, batch.targets))
            count += counted(batch.targets)
        return total / count

    def _rounded(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As they will stand in the files."""
        found = {}
        for name, value in values.items():
            raw = _as_stored(self.model, name, value)
            found[name] = torch.from_numpy(to_float32(raw, self.model.source.tensors[name].dtype))
        return found

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, router in self.running.routers.items():
            router.copy_(values[name])


# -- what is told -----------------------------------------------------------------------------------


def _as_stored(model: Model, name: str, value: Tensor) -> Raw:
    """Rounded into the dtype that the files have."""
    return from_float32(value.cpu().numpy(), model.source.tensors[name].dtype)


def _former(model: Model) -> dict[str, Any]:
    """The recipe that made the mixture, where its provenance tells: this one's, before its training."""
    told = provenance_of(model.folder) or {}
    return {"recipe": told["recipe"]} if "recipe" in told else {}


def _recounted(facts: Mapping[str, Any]) -> str:
    """The training in a few sentences, for the card."""
    asked, (before, after) = facts["asked"], facts["held_out_loss"]
    files = ", ".join(name for name, _ in asked["texts"])
    names = {"rate": "--lr", "z_loss": "--z-loss"}
    keys = ("steps", "rate", "batch", "balance", "z_loss", "seed", "length")
    options = " ".join(f"{names.get(key, f'--{key}')} {asked[key]}" for key in keys)
    options += "" if asked["eos"] else " --no-eos"
    return (
        f"Only the routers of `{asked['mixture']}` were trained (`mergetool train-router`, {options}), on "
        f"{facts['texts']['learned']} texts of {files}. The mean loss of a token in "
        f"{facts['texts']['held_out']} held-out texts went from {before:.4f} to "
        f"{after:.4f}. Every other tensor is a copy, bit for bit."
    )
