"""A candidate's answers: its own chat template, greedy, one conversation at a time."""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from merge.agreement import canonical
from merge.errors import RequestError
from merge.judge.journal import Journal
from merge.judge.questions import Question
from merge.score.conditions import Conditions
from merge.score.models import Candidate, few_threads, loaded, weight_bytes


def answers_of(
    found: Candidate,
    label: str,
    questions: Sequence[Question],
    journal: Journal,
    *,
    max_tokens: int,
    conditions: Conditions,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, list[dict[str, Any]]]:
    """By question the answer to each turn: `text`, and whether it was `cut` at `max_tokens`.

    The model is loaded where an answer is missing. Raises RequestError where it has no chat template.
    """
    asked = _Asked(found, label, max_tokens, conditions)
    answers: dict[str, list[dict[str, Any]]] = {}
    with few_threads(weight_bytes(found)):
        for question in questions:
            answers[question.id] = _conversation(asked, question, journal)
            progress(1)
    return answers


def _conversation(asked: "_Asked", question: Question, journal: Journal) -> list[dict[str, Any]]:
    messages: list[dict[str, str]] = []
    found = []
    for turn, text in enumerate(question.turns):
        messages.append({"role": "user", "content": text})
        about = {"model": asked.label, "question": question.id, "turn": turn + 1}
        found.append(
            journal.row(
                {"model": asked.identity, "limit": asked.max_tokens, "messages": messages},
                about,
                partial(asked.answer, messages),
            )
        )
        messages.append({"role": "assistant", "content": found[-1]["text"]})
    return found


class _Asked:
    """A model that is loaded when the first answer is missing."""

    def __init__(
        self, found: Candidate, label: str, max_tokens: int, conditions: Conditions
    ) -> None:
        self.label, self.max_tokens = label, max_tokens
        self.identity = identity_of(found)
        self._found, self._conditions = found, conditions
        self._running: tuple[Any, Any] | None = None

    def answer(self, messages: Sequence[dict[str, str]]) -> dict[str, Any]:
        """The greedy answer, without special tokens."""
        import torch

        self._running = self._running or self._opened()
        model, tokenizer = self._running
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=self.max_tokens, do_sample=False,
                pad_token_id=_padding(tokenizer),
            )  # fmt: skip
        new = out[0, inputs["input_ids"].shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True)
        return {"text": text, "cut": len(new) >= self.max_tokens and not _ends(model, int(new[-1]))}

    def _opened(self) -> tuple[Any, Any]:
        model, tokenizer = loaded(self._found, self.label, self._conditions)
        if not tokenizer.chat_template:
            raise RequestError(
                f"{self.label}: has no chat template, so it cannot be asked; write one into it with a recipe "
                "(chat_template: chatml)"
            )
        return model, tokenizer


def _padding(tokenizer: Any) -> int:
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)


def _ends(model: Any, token: int) -> bool:
    stops = model.generation_config.eos_token_id
    return token in (stops if isinstance(stops, list) else [stops])


def identity_of(found: Candidate) -> str:
    """Stands for a model: sizes and times of the files in its folder, or the plan of a merge with those of
    the files that it reads and carries over."""
    if isinstance(found, Path):
        plan, files = "", sorted(file for file in found.rglob("*") if file.is_file())
    else:
        from merge.carry import carried

        plan, files = found.digest, [file for model in found.models for file in model.files()]
        files += [file for file in carried(found).values() if isinstance(file, Path)]
    stats = [(file, file.stat()) for file in files]
    facts = [(str(file.resolve()), s.st_size, s.st_mtime_ns) for file, s in stats]
    return hashlib.sha256(canonical([plan, facts]).encode()).hexdigest()
