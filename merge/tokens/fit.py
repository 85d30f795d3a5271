"""Do these vocabularies fit together? Ids by pairs; stop tokens and templates of all at once."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from merge.tokens.findings import Finding, Severity
from merge.tokens.vocabulary import FLAGS, SETTINGS, TOKENIZER, AddedToken, Vocabulary
from merge.tokens.wholeness import (
    control_tokens,
    eos_places,
    quoted,
    stop_file,
    tables,
)

ALIGNED = "tokenizer:\n  source: base\n"
UNITED = "tokenizer:\n  source: base\n  specials: union\n"
SHOWN = 3  # tokens told of in words


def vocabulary_findings(vocabularies: Sequence[Vocabulary]) -> Iterator[Finding]:
    """Where these vocabularies differ; ids are compared with those of the first that has tokens."""
    having = [vocabulary for vocabulary in vocabularies if vocabulary.ids]
    for vocabulary in having[1:]:
        yield from token_findings(having[0], vocabulary)
        yield from padding_difference(having[0], vocabulary)
    yield from control_findings(vocabularies)
    yield from eos_difference(vocabularies)
    yield from template_difference(vocabularies)


def token_findings(a: Vocabulary, b: Vocabulary) -> Iterator[Finding]:
    """Whether ids and pieces of text mean the same in both; both have tokens."""
    if a.tokenizer is b.tokenizer:
        return
    yield from _ids(a, b)
    yield from _flags(a, b)
    for key, code, name in [
        ("normalizer", "normalizer-differs", "texts are normalised"),
        ("pre_tokenizer", "pre-tokenizer-differs", "texts are split"),
    ]:
        ours, theirs = a.tokenizer.get(key), b.tokenizer.get(key)
        if ours != theirs:
            what = f"{name} in other ways: {_short(ours)} and {_short(theirs)} ({TOKENIZER})"
            yield Finding(code, "warning", (a.label, b.label), what, {key: [ours, theirs]})
    if (ours := a.merges) != (theirs := b.merges):
        counts = [len(ours), len(theirs)]
        what = f"pieces are put together in other ways: {counts[0]} and {counts[1]} merges ({TOKENIZER})"
        yield Finding("merges-differ", "warning", (a.label, b.label), what, {"merges": counts})


def control_findings(vocabularies: Sequence[Vocabulary]) -> Iterator[Finding]:
    """Control tokens of one model's template that others cannot spell; a template is told of once."""
    for owner in _with_templates(vocabularies).values():
        lacking = {
            other.label: missing
            for other in vocabularies
            if other.ids and (missing := [t for t in control_tokens(owner) if t not in other.ids])
        }
        if lacking:
            texts = sorted({text for missing in lacking.values() for text in missing})
            said = ", ".join(f"{text!r} ({owner.ids[text]})" for text in texts)
            what = (
                f"the chat template of {owner.label} writes {said}, unknown to {', '.join(lacking)}"
            )
            evidence = {"tokens": lacking, "file": owner.template_file}
            models = (owner.label, *lacking)
            yield Finding("control-token-missing", "error", models, what, evidence, UNITED)


def eos_difference(vocabularies: Sequence[Vocabulary]) -> Iterator[Finding]:
    """One finding for all: at which ids, texts and by which files each stops. Ids are compared where a model
    comes without tokens."""
    told = [v for v in vocabularies if v.stop_ids]
    spelt = all(v.ids for v in told)
    ends = {
        (frozenset(_stop_texts(v)), v.named("eos_token") or _end(v))
        if spelt
        else frozenset(v.stop_ids)
        for v in told
    }
    if len(ends) < 2:
        return
    what = (
        f"{told[0].label} stops {', '.join([_said_stop(told[0]), *map(_labelled_stop, told[1:])])}"
    )
    evidence = {
        v.label: {
            "ids": list(v.stop_ids),
            "texts": _stop_texts(v),
            "file": stop_file(v),
            "eos_token": v.named("eos_token"),
            "ids_by_file": eos_places(v),
        }
        for v in told
    }
    fix = _stop_fix(told) if spelt else ""
    yield Finding("eos-differs", "error", tuple(v.label for v in told), what, evidence, fix)


def template_difference(vocabularies: Sequence[Vocabulary]) -> Iterator[Finding]:
    """A warning where only some models have a template: the result has it if they lend the files."""
    first = _with_templates(vocabularies)
    without = [v.label for v in vocabularies if v.template is None]
    if not first or len(first) + bool(without) == 1:
        return
    owners = [[v.label for v in vocabularies if _template(v) == template] for template in first]
    said = [
        f"{', '.join(labels)} ({owner.template_file})"
        for labels, owner in zip(owners, first.values(), strict=True)
    ]
    count = f"{len(said)} chat templates" if len(said) > 1 else "one chat template"
    what = f"{count}: {'; '.join(said)}" + (f"; none: {', '.join(without)}" if without else "")
    fix = f"chat_template:\n  from: {quoted(f'model:{next(iter(first.values())).label}')}\n"
    severity: Severity = "error" if len(first) > 1 else "warning"
    labels, evidence = tuple(v.label for v in vocabularies), {"with": owners, "without": without}
    yield Finding("template-differs", severity, labels, what, evidence, fix)


def padding_difference(a: Vocabulary, b: Vocabulary) -> Iterator[Finding]:
    """Rows without a token, where there are more of them in one model."""
    if a.rows is None or b.rows is None:
        return
    spare = [a.rows - a.size, b.rows - b.size]
    if a.rows != b.rows and spare[0] != spare[1]:
        what = f"{a.rows} rows for {a.size} ids, and {b.rows} for {b.size}"
        evidence = {"rows": [a.rows, b.rows], "ids": [a.size, b.size]}
        yield Finding("padded-vocabulary", "warning", (a.label, b.label), what, evidence, ALIGNED)


def _ids(a: Vocabulary, b: Vocabulary) -> Iterator[Finding]:
    models = (a.label, b.label)
    moved = {t: [i, b.ids[t]] for t, i in a.ids.items() if t in b.ids and b.ids[t] != i}
    if moved:
        said = [f"{text!r} is {i} and {j}" for text, (i, j) in _first(moved)]
        what = f"{len(moved)} tokens have other ids: {', '.join(said)}"
        yield Finding("token-id-differs", "error", models, what, _counted(moved), ALIGNED)
    renamed = {
        i: [t, b.texts[i]]
        for i, t in a.texts.items()
        if i in b.texts and b.texts[i] not in a.ids and t not in b.ids
    }
    if renamed:
        said = [f"{i} is {t!r} and {u!r}" for i, (t, u) in _first(renamed)]
        what = f"{len(renamed)} ids are other tokens: {', '.join(said)}"
        yield Finding("id-token-differs", "error", models, what, _counted(renamed), ALIGNED)
    told = {*control_tokens(a), *control_tokens(b)}.union(*renamed.values())
    yield from _added(a, b, told)
    yield from _added(b, a, told)


def _added(own: Vocabulary, other: Vocabulary, told: set[str]) -> Iterator[Finding]:
    """Tokens that `own` alone has, without those that are told of otherwise."""
    only = {t: i for t, i in own.ids.items() if t not in other.ids and t not in told}
    if only:
        said = ", ".join(f"{text!r} ({i})" for text, i in _first(only))
        rest = f", and {len(only) - SHOWN} more" * (len(only) > SHOWN)
        specials = only.keys() <= {token.text for token in own.added}
        taken = "a union of specials takes" if specials else "only a full union takes all of"
        what = f"only {own.label} has {said}{rest}; {taken} them in"
        fix = UNITED if specials else ALIGNED
        models = (other.label, own.label)
        yield Finding("tokens-added", "warning", models, what, _counted(only), fix)


def _counted(ids: Mapping[Any, Any]) -> dict[str, Any]:
    return {"ids": dict(_first(ids, 100)), "count": len(ids)}


def _flags(a: Vocabulary, b: Vocabulary) -> Iterator[Finding]:
    theirs = {token.text: token for token in b.added}
    unlike = {
        token.text: _unlike_flags(token, theirs[token.text])
        for token in a.added
        if token.text in theirs and theirs[token.text].flags != token.flags
    }
    if unlike:
        said = [f"{', '.join(flags)} of {text!r}" for text, flags in _first(unlike)]
        what = f"flags of {len(unlike)} added tokens differ: {'; '.join(said)}"
        fix = "tokenizer:\n  source: base\n  conflict: base\n"
        yield Finding("flags-differ", "warning", (a.label, b.label), what, {"flags": unlike}, fix)


def _unlike_flags(a: AddedToken, b: AddedToken) -> list[str]:
    return [flag for flag, x, y in zip(FLAGS, a.flags, b.flags, strict=True) if x != y]


def _first(found: Mapping[Any, Any], count: int = SHOWN) -> list[tuple[Any, Any]]:
    return [*found.items()][:count]


def _short(value: Any) -> str:
    """A setting on one line: of tables their type alone."""
    if isinstance(value, dict) and "type" in value:
        parts = [v for key in ("normalizers", "pretokenizers") for v in tables(value.get(key))]
        return str(value["type"]) + (f"({', '.join(map(_short, parts))})" if parts else "")
    return "none" if value is None else str(value)


def _template(vocabulary: Vocabulary) -> str | None:
    """Without a line end at its end, which rendering drops."""
    return None if vocabulary.template is None else vocabulary.template.removesuffix("\n")


def _with_templates(vocabularies: Sequence[Vocabulary]) -> dict[str, Vocabulary]:
    """The templates that there are, each with the first model that has it."""
    first: dict[str, Vocabulary] = {}
    for vocabulary in vocabularies:
        if (template := _template(vocabulary)) is not None:
            first.setdefault(template, vocabulary)
    return first


def _stop_texts(vocabulary: Vocabulary) -> list[str]:
    return [vocabulary.texts.get(i, f"#{i}") for i in vocabulary.stop_ids]


def _said_stop(vocabulary: Vocabulary) -> str:
    pairs = zip(vocabulary.stop_ids, _stop_texts(vocabulary), strict=True)
    stops = " and ".join(f"{i} {text!r}" for i, text in pairs)
    eos = vocabulary.named("eos_token")
    other = eos is not None and eos not in _stop_texts(vocabulary)
    named = f" with the eos_token {eos!r} ({SETTINGS})" if other else ""
    return f"at {stops} ({stop_file(vocabulary)}){named}"


def _labelled_stop(vocabulary: Vocabulary) -> str:
    return f"{vocabulary.label} {_said_stop(vocabulary)}"


def _end(vocabulary: Vocabulary) -> str:
    """The one text that stands for where a model stops."""
    eos, stops = vocabulary.named("eos_token"), _stop_texts(vocabulary)
    return eos if eos in stops else stops[0]


def _stop_fix(told: Sequence[Vocabulary]) -> str:
    """The end as the model has it whose template is proposed; the others speak of theirs as that one. Where
    beginning and end are one token, a swap would make the end the beginning: a copy."""
    eos = _end(next(iter(_with_templates(told).values()), told[0]))
    unify: dict[tuple[str, str], list[str]] = {}
    for v in told:
        if (own := _end(v)) != eos:
            how = "copy" if own == v.named("bos_token") else "swap"
            unify.setdefault((own, how), []).append(v.label)
    section: dict[str, Any] = {"eos": eos}
    if unify:
        section["unify"] = [
            {"from": own, "to": eos, "how": how, "models": labels}
            for (own, how), labels in unify.items()
        ]
    return yaml.safe_dump({"stop": section}, sort_keys=False, allow_unicode=True)
