"""Renders chat templates; run as a program it does so within limits, for a template may be anyone's.

It reads {"template", "names", "chats": [{"messages", "generation_prompt"}]} from stdin and writes a list of
{"text"} or {"error"}, one a chat. It imports nothing of this project, so that it starts at once.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

SECONDS, BYTES = 2, 1 << 30  # of processor time and of memory; a rendering takes milliseconds
PATIENCE = 120  # seconds; the machine may be busy
LONGEST = 1 << 20  # characters of a rendering, of messages that have fewer than a hundred
TODAY = datetime(2024, 1, 1)  # so that a template that writes the date renders the same every day


def render_apart(
    template: str, names: Mapping[str, str], chats: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """As render, in a process of its own with little time and memory."""
    asked = json.dumps({"template": template, "names": dict(names), "chats": chats})
    command = [
        sys.executable,
        "-P",
        __file__,
    ]  # -P: a json.py in the current folder is not what is meant
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, input=asked, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        return [{"error": f"it takes more than {PATIENCE} seconds"}] * len(chats)
    if done.returncode:
        return [{"error": f"it takes more than {SECONDS} seconds or {BYTES} bytes"}] * len(chats)
    told: list[dict[str, str]] = json.loads(done.stdout)
    return told


def render(
    template: str, names: Mapping[str, str], chats: Sequence[Mapping[str, Any]]
) -> list[dict[str, str]]:
    """For each of `chats` its text, or why there is none. names: bos_token and the like."""
    try:
        template.encode()  # half a surrogate pair is no text
        compiled = _environment().from_string(template)
    except Exception as error:  # of a syntax error, or whatever strange text makes of the parser
        line = getattr(error, "lineno", None)
        return [{"error": _line(error) + (f" (line {line})" if line else "")}] * len(chats)
    return [_rendered(compiled, names, chat) for chat in chats]


def _rendered(compiled: Any, names: Mapping[str, str], chat: Mapping[str, Any]) -> dict[str, str]:
    values = {**names, "messages": chat["messages"], "tools": None, "documents": None}
    text = ""
    try:
        for piece in compiled.generate(**values, add_generation_prompt=chat["generation_prompt"]):
            text += piece
            if len(text) > LONGEST:
                return {"error": f"it writes more than {LONGEST} characters"}
        text.encode()
    except Exception as error:  # a template may do anything that Python can
        return {"error": _line(error)}
    return {"text": text}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _environment() -> Any:
    """jinja2's sandbox with what transformers gives to templates."""
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what the assistant says; it renders as if it were not there."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 reads it so)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return environment


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows: the caller's timeout has to do
        return
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))


if __name__ == "__main__":
    _limit()
    asked = json.load(sys.stdin)
    json.dump(render(asked["template"], asked["names"], asked["chats"]), sys.stdout)
