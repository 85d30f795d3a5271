"""What shows in a task's answers that something is wrong: cut off, empty, in loops, all alike."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from merge.score.results import Answers

DEFAULT_LIMIT = 256  # tokens of an answer, where neither task nor model of lm-eval says more
LONGEST_LOOP = 200  # characters of the piece that comes again and again
LOOP_LENGTH = 40  # characters of a loop at least: "........" ends many a good answer


def answers_of(samples: Sequence[Mapping[str, Any]], lm: Any) -> Answers:
    """Shares over the documents of one task as lm-eval logs them, each once."""
    documents = list({sample["doc_id"]: sample for sample in samples}.values())
    if not documents:
        return Answers(0)
    cut = sum(any(_is_cut(request, lm) for request in _requests(d)) for d in documents)
    made = [
        (str(answer), request)
        for document in documents
        for request, answers in zip(_requests(document), document["resps"], strict=True)
        if _generation(request) is not None
        for answer in answers
    ]
    if not made:
        return Answers(0, cut_prompts=cut / len(documents))
    texts = [text for text, _ in made]
    return Answers(
        len(texts),
        cut / len(documents),
        sum(_tokens(text, lm) >= _limit(request, lm) for text, request in made) / len(texts),
        sum(not text.strip() for text in texts) / len(texts),
        sum(map(ends_in_loop, texts)) / len(texts),
        Counter(texts).most_common(1)[0][1] / len(texts),
    )


def ends_in_loop(text: str) -> bool:
    """Whether the text ends in a piece that stands there four times or more, 40 characters in all."""
    end = text.rstrip()
    sizes = range(1, min(LONGEST_LOOP, len(end) // 4) + 1)
    return any(end.endswith(end[-n:] * max(4, -(-LOOP_LENGTH // n))) for n in sizes)


def _requests(sample: Mapping[str, Any]) -> list[Sequence[Any]]:
    """The arguments of each request of a document: (prompt, continuation or settings, ...)."""
    found = sample["arguments"]
    if isinstance(found, Mapping):  # as lm-eval writes them into files
        return [list(each.values()) for each in found.values()]
    return list(found)


def _generation(request: Sequence[Any]) -> Mapping[str, Any] | None:
    """The settings of a request to generate, or None."""
    return request[1] if len(request) > 1 and isinstance(request[1], Mapping) else None


def _limit(request: Sequence[Any], lm: Any) -> int:
    settings = _generation(request) or {}
    default = getattr(lm, "max_gen_toks", DEFAULT_LIMIT)
    return int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or default)


def _is_cut(request: Sequence[Any], lm: Any) -> bool:
    """Whether prompt and answer do not fit into the model's window; rolling likelihoods always do."""
    if len(request) < 2:
        return False
    window = int(getattr(lm, "max_length", 0) or 0)
    settings = _generation(request)
    # a likelihood needs one place less: the last token is only looked at
    text = str(request[0]) + ("" if settings is not None else str(request[1]))
    needed = _limit(request, lm) if settings is not None else -1
    if not window or len(text.encode()) + needed <= window:  # no token is shorter than a byte
        return False
    return _tokens(text, lm) + needed > window


def _tokens(text: str, lm: Any) -> int:
    return len(lm.tok_encode(text, add_special_tokens=False))
