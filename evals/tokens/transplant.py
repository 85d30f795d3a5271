"""A tokenizer transplanted onto a real Llama of 260 K parameters, ours beside mergekit-tokensurgeon's.

    python -m evals.tokens.transplant --llama DIR --peer-venv DIR

The Llama tells stories (minutes of one processor). On some a byte-level tokenizer and a donor of another
width are trained (ten minutes); both are kept in --folder. The Llama gets that tokenizer by every way of
filling rows; the bits per byte on stories that nobody was trained on say how good the rows are. The defaults
were chosen on other stories again (--choose).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from merge.pipeline import run_recipe

from .donor import Recipe, sampled_stories, train_donor
from .score import bits_per_byte

TEST, CHOICE, TEST_STORIES = 11, 12, 256  # seeds of stories that the donor never sees, and how many
PEER: Mapping[str, Sequence[str]] = {
    "mean": ("-a", "mean"),
    "subword": ("-a", "subword"),
    "common_interpolation": ("-a", "common_interpolation"),
    "common_interpolation, cosine, k 8": ("-a", "common_interpolation", "-c", "-k", "8"),
    "common_interpolation, cosine, k 2": ("-a", "common_interpolation", "-c", "-k", "2"),
    "omp": ("-a", "omp"),
    "omp, k 8": ("-a", "omp", "-k", "8"),
    "landmark_pca": ("-a", "landmark_pca"),
    "stb": ("-a", "stb"),
}


WAYS = ("mean", "subword", "omp", "procrustes")


def transplanted(llama: Path, donor: Path, how: str, scratch: Path) -> tuple[Path, dict[str, Any]]:
    """The folder of the Llama with the donor's tokenizer, and what its provenance tells of the rows made."""
    recipe = {"model": str(llama), "tokenizer": {"source": str(donor), "missing": how}}
    scratch.mkdir(parents=True)
    (scratch / "recipe.yaml").write_text(json.dumps(recipe))
    folder = run_recipe(scratch / "recipe.yaml", scratch / "out").folder
    made: dict[str, Any] = json.loads((folder / "mergetool.json").read_text())["rows_made"][0]
    return folder, made


def peer_model(venv: Path, llama: Path, donor: Path, options: Sequence[str], folder: Path) -> Path:
    """`folder` with what mergekit-tokensurgeon makes of the same two models. It knows from the class of a
    tokenizer how words begin: its copies say LlamaTokenizer and GPT2Tokenizer, or it would match no word."""
    copies = [folder.parent / f"peer-{name}" for name in ("llama", "donor")]
    for source, copy, kind in zip(
        (llama, donor), copies, ("LlamaTokenizer", "GPT2Tokenizer"), strict=True
    ):
        shutil.copytree(source, copy, dirs_exist_ok=True)
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(
            json.dumps(settings | {"tokenizer_class": kind})
        )
    command = [
        str(venv / "bin" / "mergekit-tokensurgeon"),
        *map(str, copies),
        str(folder),
        *options,
    ]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {
        "HF_HUB_OFFLINE": "1"
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    shutil.copy(donor / "tokenizer.json", folder)
    return folder


def prepared(llama: Path, folder: Path, recipe: Recipe) -> Path:
    """The donor, made and kept in `folder` where it is not there yet."""
    donor = folder / f"donor-{recipe.hidden}-{recipe.pieces}"
    if not (donor / "made.json").is_file():
        stories = told(llama, folder, recipe.stories, recipe.seed)
        loss = train_donor(stories, donor, recipe)
        (donor / "made.json").write_text(json.dumps(asdict(recipe) | {"nats_per_token": loss}))
    return donor


def told(llama: Path, folder: Path, count: int, seed: int) -> list[str]:
    """Stories sampled with that seed, kept in `folder`."""
    kept = folder / f"stories-{seed}-{count}.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(sampled_stories(llama, count, seed)))
    stories: list[str] = json.loads(kept.read_text())
    return stories


def compared(asked: argparse.Namespace, donor: Path, scratch: Path) -> dict[str, Any]:
    """All figures of one run."""
    stories = told(asked.llama, asked.folder, TEST_STORIES, CHOICE if asked.choose else TEST)
    untouched = bits_per_byte(asked.llama, stories)
    ours, peer = {}, dict[str, dict[str, Any]]()
    for name in WAYS:
        folder, made = transplanted(asked.llama, donor, name, scratch / f"ours-{name}")
        loss = bits_per_byte(folder, stories)
        ours[name] = {"bits_per_byte": loss, "held_out_error": made["median_error"]}
    for number, (name, options) in enumerate(PEER.items() if asked.peer_venv else ()):
        try:
            folder = scratch / f"peer-{number}"
            peer_model(asked.peer_venv, asked.llama, donor, options, folder)
            peer[name] = {"bits_per_byte": bits_per_byte(folder, stories)}
        except RuntimeError as error:
            peer[name] = {"failed": str(error)}
    return {"filled": made["rows"], "untouched": untouched, "ours": ours, "peer": peer}


def table(figures: Mapping[str, Any]) -> str:
    lines = [f"{'':44}bits/byte   median error of held-out rows"]
    lines.append(f"{'the Llama with its own tokenizer':44}{figures['untouched']:9.4f}")
    for who, name in (("ours", "mergetool"), ("peer", "tokensurgeon")):
        for way, found in figures[who].items():
            lines.append(f"{name + ' ' + way:44}{_cells(found)}")
    return "\n".join(lines)


def _cells(found: Mapping[str, Any]) -> str:
    if "failed" in found:
        return f"  failed: {found['failed']}"
    error = f"{found['held_out_error']:14.3f}" if "held_out_error" in found else ""
    return f"{found['bits_per_byte']:9.4f}{error}"


def main(arguments: Sequence[str]) -> int:
    asked = _asked(arguments)
    import torch

    torch.set_num_threads(1)  # the same donor and the same losses on every run
    recipe = Recipe(hidden=asked.hidden, pieces=asked.pieces)
    donor = prepared(asked.llama, asked.folder, recipe)
    with tempfile.TemporaryDirectory() as scratch:
        figures = compared(asked, donor, Path(scratch))
    print(table(figures))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))
    return 0


def _asked(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m evals.tokens.transplant", description=__doc__)
    parser.add_argument("--llama", type=Path, required=True, help="folder of the Llama")
    parser.add_argument("--peer-venv", type=Path, help="virtual environment with mergekit 0.1.5")
    parser.add_argument(
        "--hidden", type=int, default=Recipe.hidden, help="width of the donor (%(default)s)"
    )
    parser.add_argument(
        "--pieces", type=int, default=Recipe.pieces, help="of its tokenizer (%(default)s)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("out/transplant"),
        help="where stories and donor are kept",
    )
    parser.add_argument(
        "--choose", action="store_true", help="score on the stories for choosing settings"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
