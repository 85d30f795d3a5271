"""Killed at any moment, the same command goes on and writes the same bytes."""

import fcntl
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from families import contents, drawn, family, ties_recipe, typed, write_model, write_recipe
from killed import changes, run_killed

from merge.errors import OutputError, ReadError
from merge.pipeline import run_recipe
from merge.stream import StepDigests
from merge.write import PartialFolder

LARGE = {f"model.layers.{i}.mlp.up_proj.weight": (900, 1000) for i in range(4)} | {
    "model.norm.weight": (1000,)
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """TIES of two tiny models, in several output files."""
    models = family(tmp_path, "a", "b")
    (models["base"] / "generation_config.json").write_text('{"eos_token_id": 1}')
    return ties_recipe(tmp_path / "r.yaml", models, shard_size="1KB")


def whole_run(recipe: Path, **options: Any) -> dict[str, str]:
    return contents(run_recipe(recipe, recipe.parent / "whole", **options).folder)


def steps_written(
    recipe: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[str]:
    """Runs the recipe; the names of the steps that were computed, not taken from the journal."""
    names: list[str] = []
    finished = PartialFolder.finished

    def noting(self: PartialFolder, step: Any, digests: StepDigests) -> None:
        names.append(step.name)
        finished(self, step, digests)

    with monkeypatch.context() as patch:
        patch.setattr(PartialFolder, "finished", noting)
        run_recipe(recipe, out, **options)
    return names


# -- kills -----------------------------------------------------------------------------------------


def test_a_kill_at_each_change_of_the_disk_loses_nothing(recipe: Path) -> None:
    expected = whole_run(recipe)
    out = recipe.parent / "out"
    for at in range(1, changes(recipe, out) + 1):
        assert run_killed(recipe, out, at)
        if out.exists():  # only ever whole
            assert contents(out) == expected
        run_recipe(recipe, out)
        assert contents(out) == expected, f"killed at change {at}"
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)


def test_a_kill_while_another_model_is_replaced_loses_neither(recipe: Path) -> None:
    expected = whole_run(recipe)
    out, old = recipe.parent / "out", recipe.parent / "old"
    run_recipe(
        ties_recipe(recipe.with_name("old.yaml"), {n: recipe.parent / n for n in ("base", "a")}),
        old,
    )
    former = contents(old)
    total = changes(recipe, out)
    for at in range(total - 4, total + 4):
        shutil.copytree(old, out)
        killed = run_killed(recipe, out, at, overwrite=True)
        places = [
            out,
            recipe.parent / "out.partial" / "replaced",
            recipe.parent / "out.partial" / "model",
        ]
        found = [contents(place) for place in places if place.is_dir()]
        assert former in found or expected in found
        assert not out.exists() or contents(out) in (former, expected)
        run_recipe(recipe, out, overwrite=killed)
        assert contents(out) == expected
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)


@pytest.mark.parametrize("seed", range(4))
def test_five_kills_at_random_moments_of_one_merge_lose_nothing(tmp_path: Path, seed: int) -> None:
    recipe = ties_recipe(
        tmp_path / "r.yaml", family(tmp_path, "a", "b", like=LARGE), shard_size="5MB"
    )
    expected = whole_run(recipe, threads=2, memory="160MiB")
    chosen = random.Random(seed)
    out = tmp_path / "out"
    latest = (
        changes(recipe, out, threads=2, memory="160MiB") // 6
    )  # so that five do not reach the end
    for _ in range(5):
        assert run_killed(recipe, out, chosen.randint(1, latest), threads=2, memory="160MiB")
        assert not out.exists()
    run_recipe(recipe, out, threads=chosen.randint(1, 3))
    assert contents(out) == expected


# -- the journal -----------------------------------------------------------------------------------


@pytest.fixture
def interrupted(recipe: Path) -> Path:
    """A run of `recipe` into `out` that was killed after about half of its steps."""
    out = recipe.parent / "out"
    assert run_killed(recipe, out, changes(recipe, out) // 2, threads=1)
    assert 2 < len(journal(out).read_text().splitlines()) < 9
    return out


def journal(out: Path) -> Path:
    return out.with_name(out.name + ".partial") / "journal.jsonl"


def journalled(out: Path) -> set[str]:
    """Steps that whole lines of the journal tell of."""
    lines = journal(out).read_bytes().split(b"\n")[1:-1]
    return {json.loads(line)["step"] for line in lines}


def test_journalled_steps_are_not_done_again(
    recipe: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = journalled(interrupted)
    redone = set(steps_written(recipe, interrupted, monkeypatch))
    assert done
    assert not done & redone


def test_a_torn_last_line_costs_its_step_alone(
    recipe: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_run(recipe)
    with journal(interrupted).open("ab") as stream:
        stream.write(b'{"step": "model.norm.wei')
    done = journalled(interrupted)
    assert run_killed(
        recipe, interrupted, 6, threads=1
    )  # a second kill: the torn line must not hide new ones
    assert journalled(interrupted) >= done
    done = journalled(interrupted)
    redone = set(steps_written(recipe, interrupted, monkeypatch))
    assert not done & redone
    assert contents(interrupted) == expected


@pytest.mark.parametrize(
    "garbage",
    [
        b"\xff\xfe\n",
        b"5\n",
        b"{}\n",
        b"[]\n",
        b'{"step": "lm_head.weight"}\n',
        b"\n\n",
        b'{"step": 5}\n',
        b'{"step": []}\n',
        b'{"step": "lm_head.weight", "inputs": 5}\n',
    ],
)
def test_garbage_in_the_journal_does_no_harm(
    recipe: Path, interrupted: Path, garbage: bytes
) -> None:
    expected = whole_run(recipe)
    with journal(interrupted).open("ab") as stream:
        stream.write(garbage)
    run_recipe(recipe, interrupted)
    assert contents(interrupted) == expected


@pytest.mark.parametrize("keep", [0, 10])
def test_without_its_first_line_the_journal_counts_for_nothing(
    recipe: Path, interrupted: Path, keep: int
) -> None:
    expected = whole_run(recipe)
    journal(interrupted).write_bytes(journal(interrupted).read_bytes()[:keep])
    run_recipe(recipe, interrupted)
    assert contents(interrupted) == expected


def test_a_journalled_step_whose_bytes_are_gone_is_done_again(
    recipe: Path, interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = whole_run(recipe)
    first = next(
        iter(json.loads(line)["step"] for line in journal(interrupted).read_text().splitlines()[1:])
    )
    files = sorted((journal(interrupted).parent / "model").glob("*.safetensors"))
    content = bytearray(files[0].read_bytes())
    content[-1] ^= 1  # of the first tensor: each file holds one or more whole ones
    files[0].write_bytes(content)
    redone = steps_written(recipe, interrupted, monkeypatch)
    assert first in redone
    assert contents(interrupted) == expected


def test_a_lost_output_file_is_written_again(recipe: Path, interrupted: Path) -> None:
    expected = whole_run(recipe)
    files = sorted((journal(interrupted).parent / "model").glob("*.safetensors"))
    files[0].unlink()
    os.truncate(files[1], 100)
    run_recipe(recipe, interrupted)
    assert contents(interrupted) == expected


# -- inputs and recipes that change ----------------------------------------------------------------


def touch(file: Path) -> None:
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def test_an_input_that_changed_since_is_refused_until_restart(
    recipe: Path, interrupted: Path
) -> None:
    before = contents(interrupted.with_name("out.partial"))
    write_model(recipe.parent / "a", typed(drawn(77)))
    touch(recipe.parent / "a" / "model.safetensors")
    with pytest.raises(OutputError, match=r"a/model\.safetensors: changed since .* --restart"):
        run_recipe(recipe, interrupted)
    assert contents(interrupted.with_name("out.partial")) == before
    run_recipe(recipe, interrupted, restart=True)
    assert contents(interrupted) == whole_run(recipe)


def test_another_recipe_is_refused_until_restart(recipe: Path, interrupted: Path) -> None:
    before = contents(interrupted.with_name("out.partial"))
    other = ties_recipe(
        recipe.with_name("other.yaml"), {n: recipe.parent / n for n in ("base", "a")}
    )
    with pytest.raises(OutputError, match=r"unfinished merge of another recipe.*--restart"):
        run_recipe(other, interrupted)
    assert contents(interrupted.with_name("out.partial")) == before
    run_recipe(other, interrupted, restart=True)
    assert contents(interrupted) == whole_run(other)


def test_models_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for place, seed in (("x", 1), ("y", 2)):
        write_model(tmp_path / place / "last", typed(drawn(seed)))
    orders = [
        {"x/last": {"weight": 0.2}, "y/last": {"weight": 0.8}},
        {"y/last": {"weight": 0.2}, "x/last": {"weight": 0.8}},
    ]
    first, second = (
        write_recipe(tmp_path / f"{i}.yaml", models=models, merge_method="linear")
        for i, models in enumerate(orders)
    )
    assert run_killed(first, tmp_path / "out", 9)
    with pytest.raises(OutputError, match="--restart"):
        run_recipe(second, tmp_path / "out")
    run_recipe(first, tmp_path / "out")
    with pytest.raises(OutputError, match="of another recipe or of other models"):
        run_recipe(second, tmp_path / "out")


def test_an_input_that_changes_during_the_run_is_never_published(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    close_files = PartialFolder.close_files

    def meanwhile(self: PartialFolder) -> None:
        touch(recipe.parent / "b" / "model.safetensors")
        close_files(self)

    monkeypatch.setattr(PartialFolder, "close_files", meanwhile)
    with pytest.raises(ReadError, match=r"b/model\.safetensors: changed while it was being merged"):
        run_recipe(recipe, recipe.parent / "out")
    assert not (recipe.parent / "out").exists()
    monkeypatch.undo()
    with pytest.raises(OutputError, match="--restart"):
        run_recipe(recipe, recipe.parent / "out")


# -- two runs --------------------------------------------------------------------------------------


def test_a_second_run_into_the_folder_is_refused_and_harms_nothing(
    recipe: Path, interrupted: Path
) -> None:
    before = contents(interrupted.with_name("out.partial"))
    with (interrupted.with_name("out.partial") / "lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for restart in (False, True):
            with pytest.raises(OutputError, match="another run is writing there"):
                run_recipe(recipe, interrupted, restart=restart)
    assert contents(interrupted.with_name("out.partial")) == before
    run_recipe(recipe, interrupted)
    assert contents(interrupted) == whole_run(recipe)


@pytest.mark.parametrize("name", ["notes.txt", "model/notes.txt"])
def test_a_foreign_folder_in_the_place_of_the_unfinished_one_is_not_touched(
    recipe: Path, name: str
) -> None:
    partial = recipe.parent / "out.partial"
    (partial / name).parent.mkdir(parents=True)
    (partial / name).write_text("mine")
    for restart in (False, True):
        with pytest.raises(OutputError, match="holds something else"):
            run_recipe(recipe, recipe.parent / "out", restart=restart)
    assert (partial / name).read_text() == "mine"
