"""Questions -> answers -> grades or verdicts, all kept in a folder; a killed run goes on."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.pool import ThreadPool
from operator import call
from pathlib import Path
from typing import Any

from merge.judge.answering import answers_of
from merge.judge.grading import grade_of, once_more, to_compare, to_grade, verdict_of
from merge.judge.journal import Journal
from merge.judge.outcome import Comparison, Grades, Reading, Talks
from merge.judge.questions import Question
from merge.judge.server import Messages, Reply, Server
from merge.score.conditions import Conditions
from merge.score.harness import quiet_libraries
from merge.score.models import Candidate

READ: Mapping[str, Callable[[str], float | str | None]] = {"grade": grade_of, "verdict": verdict_of}
ANSWERS, GRADES = "answers.jsonl", "grades.jsonl"
Answers = Mapping[str, Sequence[Mapping[str, Any]]]
Count = Callable[[int], None]


@dataclass
class Court:
    """A judge, the questions, and the folder of what was answered and graded. `max_tokens` of an answer;
    `parallel`: requests to the server at a time."""

    server: Server
    questions: Sequence[Question]
    folder: Path
    max_tokens: int = 1024
    parallel: int = 4
    conditions: Conditions = field(default_factory=Conditions)

    def __post_init__(self) -> None:
        self._answers, self._grades = Journal(self.folder / ANSWERS), Journal(self.folder / GRADES)

    def graded(
        self, found: Candidate, label: str, answer: Count = lambda _: None, judge: Count = lambda _: None
    ) -> Grades:  # fmt: skip
        """Each answer of a model gets a grade; raises RequestError or ScoreError."""
        answers = self._answered(found, label, answer)
        jobs = [
            partial(self._read, "grade", to_grade(q, _texts(answers[q.id]), turn),
                    {"model": label, "question": q.id, "turn": turn + 1})
            for q in self.questions
            for turn in range(len(q.turns))
        ]  # fmt: skip
        readings = iter(self._side_by_side(jobs, judge))
        by_question = {q.id: [next(readings) for _ in q.turns] for q in self.questions}
        return Grades(label, self.questions, by_question, Talks.of(answers))

    def compared(
        self, found: Sequence[Candidate], labels: Sequence[str], answer: Count = lambda _: None,
        judge: Count = lambda _: None,
    ) -> Comparison:  # fmt: skip
        """Two models' answers to each question get two verdicts, one in each order."""
        first, second = (
            self._answered(each, label, answer) for each, label in zip(found, labels, strict=True)
        )
        jobs = []
        for q in self.questions:
            ours, theirs = _texts(first[q.id]), _texts(second[q.id])
            for order, (a, b) in enumerate(((ours, theirs), (theirs, ours))):
                about = {"a": labels[order], "b": labels[1 - order], "question": q.id}
                jobs.append(partial(self._read, "verdict", to_compare(q, a, b), about))
        readings = iter(self._side_by_side(jobs, judge))
        by_question = {q.id: [next(readings), next(readings)] for q in self.questions}
        talks = (Talks.of(first), Talks.of(second))
        return Comparison(labels[0], labels[1], self.questions, by_question, talks)

    def _answered(self, found: Candidate, label: str, progress: Count) -> Answers:
        with quiet_libraries():
            return answers_of(
                found, label, self.questions, self._answers, max_tokens=self.max_tokens,
                conditions=self.conditions, progress=progress,
            )  # fmt: skip

    def _side_by_side(
        self, jobs: Sequence[Callable[[], Reading]], progress: Count
    ) -> list[Reading]:
        found = []
        with ThreadPool(self.parallel) as pool:  # whose threads keep no interrupted process alive
            try:
                for reading in pool.imap(call, jobs):
                    found.append(reading)
                    progress(1)
            except Exception:
                pool.terminate()
                pool.join()  # what is on its way by now is kept
                raise
        return found

    def _read(self, kind: str, messages: Messages, about: Mapping[str, Any]) -> Reading:
        """What the judge says; asked once more where that cannot be read."""
        reply = self._reply(messages, {"kind": kind, **about})
        value = _value(kind, reply)
        if value is not None:
            return Reading(value, False)
        again = once_more(messages, reply.text, kind)
        reply = self._reply(again, {"kind": kind, **about, "again": True})
        return Reading(_value(kind, reply), True, not reply.is_whole)

    def _reply(self, messages: Messages, about: Mapping[str, Any]) -> Reply:
        asked = {"url": self.server.url, **self.server.body(messages)}
        row = self._grades.row(
            asked,
            {"judge": self.server.model, **about},
            lambda: asdict(self.server.ask(messages)),
        )
        return Reply(**row)


def _value(kind: str, reply: Reply) -> float | str | None:
    """None where it cannot be read; what the end of a reply would say is not known before it is there."""
    return READ[kind](reply.text) if reply.is_whole else None


def _texts(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    return [str(answer["text"]) for answer in answers]
