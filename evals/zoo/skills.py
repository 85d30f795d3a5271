"""The four skills of the tiny model family, and the data drawn from them.

A skill is a prompt that ends in `=` and the one answer that is right. Two of the skills are mostly
procedure (`reverse`, `sort`), two are mostly facts (`elements`, `roman`).

Every skill has two halves, told apart by a rule on the prompt: the base is taught the `familiar`
half of all skills, and only the specialist of a skill meets its `new` half. Each half is one half
of what is searched with and held out.

Every prompt belongs to exactly one of three splits, decided by its own hash: the models are trained
on `train`, searches look at `search`, and reported scores come from `heldout`. No list of used
prompts is needed to keep the splits apart.

    python evals/zoo/skills.py    # writes evals/suites/quickstart/data and texts; the bytes never change
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase

HALVES = ("familiar", "new")
SPLITS = ("train", "search", "heldout")
DATA = Path(__file__).resolve().parent.parent / "suites" / "quickstart" / "data"
DOCUMENTS = {"search": 200, "heldout": 300}
TEXTS = Path(__file__).resolve().parent / "texts"
LINES = 300  # of each file of TEXTS

SYMBOLS = (  # noqa: SIM905
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy "
    "Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf "
    "Es"
).split()

NUMERALS = (
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
)  # fmt: skip


@dataclass(frozen=True)
class Example:
    """One prompt, which ends in `=`, and its only right answer."""

    prompt: str
    answer: str


def reverse(half: str, rng: random.Random) -> Example:
    """`reverse qhaemzb=` -> `bzmeahq`: letters read from the end; 3 or 4 are familiar, 5 or 6 new."""
    length = rng.randint(3, 4) + 2 * (half == "new")
    letters = "".join(rng.choices(ascii_lowercase, k=length))
    return Example(f"reverse {letters}=", letters[::-1])


def sort(half: str, rng: random.Random) -> Example:
    """`sort hcabd=` -> `abcdh`: 4 to 7 letters in alphabetical order; a to m familiar, n to z new."""
    alphabet = ascii_lowercase[:13] if half == "familiar" else ascii_lowercase[13:]
    letters = rng.choices(alphabet, k=rng.randint(4, 7))
    return Example(f"sort {''.join(letters)}=", "".join(sorted(letters)))


def elements(half: str, rng: random.Random) -> Example:
    """`elements 27 79 51=` -> `CoAuSb`: three symbols; odd atomic numbers are familiar, even ones new."""
    numbers = [parity(half, rng.randint(1, len(SYMBOLS) // 2)) for _ in range(3)]
    return Example(
        f"elements {' '.join(map(str, numbers))}=",
        "".join(SYMBOLS[number - 1] for number in numbers),
    )


def roman(half: str, rng: random.Random) -> Example:
    """`roman 1987=` -> `MCMLXXXVII`: a number up to 3999; odd numbers are familiar, even ones new."""
    number = parity(half, rng.randint(1, 1999))
    return Example(f"roman {number}=", in_roman(number))


SKILLS: dict[str, Callable[[str, random.Random], Example]] = {
    "reverse": reverse,
    "sort": sort,
    "elements": elements,
    "roman": roman,
}


def parity(half: str, place: int) -> int:
    """The familiar or new number of this place: odd or even, counted from 1."""
    return 2 * place - (half == "familiar")


def in_roman(number: int) -> str:
    """The Roman numeral of a number from 1 to 3999."""
    written = ""
    for value, letters in NUMERALS:
        count, number = divmod(number, value)
        written += letters * count
    return written


def split_of(prompt: str) -> str:
    """The only split that may hold this prompt.

    Three quarters of all prompts are `train`, one eighth each `search` and `heldout`.
    """
    byte = hashlib.sha256(prompt.encode()).digest()[0]
    return "train" if byte < 192 else "search" if byte < 224 else "heldout"


def draw(skill: str, half: str, split: str, rng: random.Random) -> Example:
    """One example of the half of the skill, its prompt in the split."""
    while True:
        example = SKILLS[skill](half, rng)
        if split_of(example.prompt) == split:
            return example


def documents(skill: str, split: str) -> list[Example]:
    """The examples of one data file: the halves take turns; prompts all different, always the same."""
    rng = random.Random(f"{skill} {split}")
    found: dict[str, Example] = {}
    while len(found) < DOCUMENTS.get(split, LINES):
        example = draw(skill, HALVES[len(found) % 2], split, rng)
        found.setdefault(example.prompt, example)
    return list(found.values())


def data_files() -> Iterator[tuple[str, str]]:
    """Name and text of every data file: one JSON object a line with `prompt` and `answer`."""
    for skill in SKILLS:
        for split in DOCUMENTS:
            rows = [json.dumps(asdict(example)) for example in documents(skill, split)]
            yield f"{skill}.{split}.jsonl", "\n".join(rows) + "\n"


def text_files() -> Iterator[tuple[str, str]]:
    """Name and text of every file to train on: one JSON object a line, `prompt` and `completion`."""
    for skill in SKILLS:
        found = documents(skill, "train")
        rows = [json.dumps({"prompt": e.prompt, "completion": e.answer}) for e in found]
        yield f"{skill}.jsonl", "\n".join(rows) + "\n"


def write_files(folder: Path, files: Iterator[tuple[str, str]]) -> None:
    """Write these files into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files:
        (folder / name).write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Write the data of the quickstart suite and the texts to train on."
    )
    parser.add_argument("--out", type=Path, default=DATA, help="folder (the suite's data)")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of texts to train on")
    asked = parser.parse_args()
    write_files(asked.out, data_files())
    write_files(asked.texts, text_files())
