"""Results in transformers 4.57: texts have the ids, and chats the answers and ends, that they have in 5.

    python -m evals.compat.transformers4 [--venv DIR]   the environment is made on the first run

Both read them by this same file, run as a program that imports nothing of this project. The German models
need the real tokenizers beside the repository.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared/real/tokenizers"
WANTED, PINNED = "transformers==4.57.*", ("numpy", "torch")  # the latter as in constraints.txt
LIMIT = 30  # tokens of an answer: more than any has
SENTENCES = (
    "Once upon a time", " a space before", "two  spaces   within", "\n\tlines\n\n", "reverse abc=", "",
    "Grüße aus München", "„Ça va?“ – naïve café", "日本語", "и русский", "🙂👩‍👩‍👧", "12345.67",
    "It's x_1 = [INST]", "</", "<s>", "<|im_", "\0\x7f\ufeff", "a" * 40, "▁▁", "Ġ é e\u0301",
)  # fmt: skip


def main(arguments: Sequence[str]) -> int:
    """1 where a result is read otherwise or does not stop."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    parser = argparse.ArgumentParser(prog="python -m evals.compat.transformers4")
    parser.add_argument("--venv", type=Path, default=cache / "mergetool-compat/transformers-4.57")
    pythons = (prepared(parser.parse_args(arguments).venv.absolute()), Path(sys.executable))
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for name, folder, questions in results(Path(scratch)):
            asked = {"folder": str(folder), "texts": texts(folder), "questions": questions}
            there, here = (read_by(python, asked) for python in pythons)
            found = problems(asked, there, here)
            said = f"{len(there['ids'])} texts, {len(questions)} answers as in {here['version']}"
            print(f"{name} in {there['version']}: {'; '.join(found[:3]) or said}")
            wrong += len(found)
    return int(wrong > 0)


def problems(
    asked: Mapping[str, Any], there: Mapping[str, Any], here: Mapping[str, Any]
) -> list[str]:
    """What differs between two readings of a result, and answers that do not end."""
    found = [
        f"{text!r} is {ids}, not {others}"
        for what, name in (("texts", "ids"), ("questions", "said"))
        for text, ids, others in zip(asked[what], there[name], here[name], strict=True)
        if ids != others
    ]
    return found + [f"{said} does not end" for said in there["said"] if said[-1] != there["eos"]]


def texts(folder: Path) -> list[str]:
    """140: every sentence by itself, in two surroundings, and between control tokens."""
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    marks = [token["content"] for token in added * 4][-4:]
    frames = ["{}", "x {} y", "{0}\n{0}", *(mark + "{}" + mark for mark in marks)]
    return [frame.format(sentence) for frame in frames for sentence in SENTENCES]


def read(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of the texts and of the answers to the questions, and the end, by the transformers that is here."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(asked["folder"])
    model = transformers.AutoModelForCausalLM.from_pretrained(asked["folder"])
    said = []
    for question in asked["questions"]:
        chat = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        out = model.generate(ids, max_new_tokens=LIMIT, do_sample=False)
        said.append(out[0, ids.shape[1] :].tolist())
    told = {"version": transformers.__version__, "eos": tokenizer.eos_token_id, "said": said}
    return told | {"ids": [tokenizer(text).input_ids for text in asked["texts"]]}


def read_by(python: Path, asked: Mapping[str, Any]) -> Any:
    """`read` in a process of that interpreter."""
    told = subprocess.check_output(
        [python, "-I", __file__, "--read"], input=json.dumps(asked), text=True
    )
    return json.loads(told.splitlines()[-1])


def prepared(venv: Path) -> Path:
    """The interpreter of the virtual environment, which is made where there is none."""
    python = venv / "bin" / "python"
    if not python.is_file():
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pinned = [line for line in lines if line.partition("==")[0] in PINNED]
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run(
            [python, "-m", "pip", "install", "-q", WANTED, "jinja2", *pinned], check=True
        )
    return python


def results(scratch: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """Names and folders of results, with questions for their chats."""
    from merge.pipeline import run_recipe
    from merge.sources.opening import open_model
    from merge.tokens.doctor import diagnosed, recipe_lines

    files = [ROOT / f"evals/suites/quickstart/data/{s}.heldout.jsonl" for s in ("reverse", "roman")]
    prompts = [json.loads(line)["prompt"] for f in files for line in f.read_text().splitlines()[:8]]
    chat = run_recipe(ROOT / "recipes/chat.yaml", scratch / "chat").folder
    yield "chat", chat, [prompt.removesuffix("=") for prompt in prompts]
    if REAL.is_dir():
        subprocess.run([sys.executable, REAL / "convert.py", scratch / "real"], check=True)
        sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests/tokens")]
        from german import german_models  # type: ignore[import-not-found]

        models = [str(folder) for folder in german_models(scratch, scratch / "real").values()]
        lines = recipe_lines(diagnosed([open_model(folder) for folder in models], load=False))
        listed = ", ".join(f"{{model: {folder}, parameters: {{weight: 1}}}}" for folder in models)
        (scratch / "r.yaml").write_text(f"merge_method: linear\nmodels: [{listed}]\n{lines}")
        yield "german", run_recipe(scratch / "r.yaml", scratch / "out").folder, ["Geht es?"]


if __name__ == "__main__":
    if sys.argv[1:] == ["--read"]:
        print(json.dumps(read(json.load(sys.stdin))))
    else:
        sys.exit(main(sys.argv[1:]))
