"""Does transformers read a tokenizer as its tokenizer.json stands? Asked in a process of its own, for its
memory and time; code that comes with a model is not run."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from merge.sources.model import Model
from merge.tokens.findings import Finding
from merge.tokens.vocabulary import TOKENIZER, Vocabulary

SECONDS = 600
ASK = (
    "import json, sys; from merge.tokens.loading import both_ways; "
    "print(json.dumps([both_ways(*asked) for asked in json.load(sys.stdin)]))"
)
PROBES = (
    "Once upon a time",
    " a space before, and  two   within\n\n\tand tabs ",
    "Grüße aus München: „Ça va?“ – naïve café",
    "日本語 и русский 🙂",
    "It's 12345.67, isn't it? x_1 = [INST] <s>",
)


def loading_findings(models: Sequence[Model], vocabularies: Sequence[Vocabulary]) -> list[Finding]:
    """Tokenizers that transformers reads otherwise than their file stands; none without transformers."""
    asked = [
        (str(model.folder), probes(vocabulary))
        for model, vocabulary in zip(models, vocabularies, strict=True)
        if vocabulary.ids
    ]
    if not asked or find_spec("transformers") is None:
        return []
    # -P: a transformers.py in the current folder is not what is meant
    command = [sys.executable, "-P", "-c", ASK]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, input=json.dumps(asked), timeout=SECONDS
        )
        answers = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, IndexError, ValueError):
        answers = ["transformers ended without an answer"] * len(asked)
    having = [v for v in vocabularies if v.ids]
    return [f for v, a in zip(having, answers, strict=True) for f in _told(v, a)]


def probes(vocabulary: Vocabulary) -> list[str]:
    """Texts of several scripts, and each of the first added tokens before and after a word."""
    added = [token.text for token in vocabulary.added[:20]]
    return [*PROBES, *(f"{text}word{text} word" for text in added)]


def both_ways(folder: str, texts: Sequence[str]) -> Any:
    """[text, ids by transformers, ids by tokenizer.json] where they differ; why it does not load."""
    import transformers
    from tokenizers import Tokenizer

    try:
        raw = Tokenizer.from_file(f"{folder}/{TOKENIZER}")
        loaded = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]
    raw.no_truncation()
    raw.no_padding()
    pairs = ((t, loaded(t).input_ids, raw.encode(t).ids) for t in texts)
    return [[text, ours, theirs] for text, ours, theirs in pairs if ours != theirs]


def _told(vocabulary: Vocabulary, answer: Any) -> Iterator[Finding]:
    models = (vocabulary.label,)
    if isinstance(answer, str):
        if "trust_remote_code" not in answer:
            what = f"transformers does not load the tokenizer: {answer}"
            yield Finding("tokenizer-not-loaded", "error", models, what, {"error": answer})
    elif answer:
        text, ours, theirs = answer[0]
        at = next((i for i, (x, y) in enumerate(zip(ours, theirs, strict=False)) if x != y), 0)
        ids = f"{ours[at : at + 3]}, not {theirs[at : at + 3]}"
        what = (
            f"transformers reads {len(answer)} of {len(probes(vocabulary))} texts with other ids than "
            f"{TOKENIZER}: {text!r} at token {at} as {ids}"
        )
        yield Finding("tokenizer-ids-differ", "warning", models, what, {"texts": answer[:5]})
