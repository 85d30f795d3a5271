"""What a chat template makes of a conversation whose words are known, and so what it adds to them."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from merge.tokens.render import render_apart
from merge.tokens.vocabulary import LIKE_CONTROL

SYSTEM = "probesystem"
QUESTIONS = ("probequestionone", "probequestiontwo")
ANSWERS = ("probeanswerone", "probeanswertwo")
WORDS = (SYSTEM, *QUESTIONS, *ANSWERS)


@dataclass(frozen=True)
class Dialogue:
    """`full`: two questions and answers. `prompt`: the same without the last answer, asking for it."""

    full: str
    prompt: str

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """What looks like a control token and is no part of the messages; each once."""
        found = (
            m.group() for text in (self.full, self.prompt) for m in LIKE_CONTROL.finditer(text)
        )
        return tuple(dict.fromkeys(found))

    @cached_property
    def tails(self) -> tuple[str, ...]:
        """What follows each answer, less white space at its start, up to the next message."""
        after = [self.full.partition(answer)[2] for answer in ANSWERS if answer in self.full]
        return tuple(re.split("|".join(WORDS), tail)[0].lstrip() for tail in after)

    @cached_property
    def unasked(self) -> str | None:
        """What stands between `prompt` and the answer; None where `full` does not start with `prompt`, less
        the order to think first, which finished answers do not show."""
        prompt = re.sub(r"<think>\s*\Z", "", self.prompt)
        if not self.full.startswith(prompt):
            return None
        return self.full[len(prompt) :].partition(ANSWERS[-1])[0]


def own_text(text: str, first: int, end: int) -> str:
    """What of text[first:end] a template wrote itself: without the words of the messages."""
    words = re.finditer("|".join(WORDS), text)
    said = {at for word in words for at in range(*word.span())}
    return "".join(text[at] for at in range(first, end) if at not in said)


def probed(template: str, names: Mapping[str, str]) -> tuple[tuple[Dialogue, ...], str]:
    """Dialogues as `template` writes them (with a system message, without one), and why there are none.

    names: bos_token and the like. Templates that take the parts of a message instead of its text get those.
    """
    chats = [chat for messages in _conversations() for chat in _chats(messages)]
    told = render_apart(template, names, chats)
    pairs = list(zip(told[::2], told[1::2], strict=True))
    found = [Dialogue(f["text"], p["text"]) for f, p in pairs if "text" in f and "text" in p]
    found = [d for d in found if QUESTIONS[-1] in d.full and ANSWERS[-1] in d.full]
    problem = told[2].get("error") or told[3].get("error") or "it leaves out the messages"
    return tuple(found), "" if found else problem


def _conversations() -> Iterator[list[dict[str, Any]]]:
    turns = [word for turn in zip(QUESTIONS, ANSWERS, strict=True) for word in turn]
    plain = [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(turns)]
    yield [{"role": "system", "content": SYSTEM}, *plain]
    yield plain
    yield [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in plain]


def _chats(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"messages": messages, "generation_prompt": False},
        {"messages": messages[:-1], "generation_prompt": True},
    ]
