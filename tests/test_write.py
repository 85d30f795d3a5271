"""The written folder: it loads, its bytes are always the same, and no part of it looks whole."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import (
    contents,
    drawn,
    family,
    shapes,
    stored,
    ties_recipe,
    typed,
    write_model,
    write_recipe,
)
from ran import Ran
from safetensors import safe_open

from merge.errors import NonFiniteError, OutputError
from merge.experts.checks.loading import check_loads
from merge.pipeline import plan_recipe, run_recipe
from merge.verify import verify_folder
from merge.write import ALIGNMENT, PartialFolder, layout


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """TIES of two tiny models."""
    return ties_recipe(tmp_path / "r.yaml", family(tmp_path, "a", "b"))


def looks_whole(folder: Path) -> bool:
    """Whether a loader could take any file under `folder` for weights."""
    for file in folder.rglob("*.safetensors"):
        try:
            with safe_open(file, "np"):
                return True
        except Exception:
            continue
    return False


# -- a real model ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a real tokenizer, and two fine-tunes, saved by transformers."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("llamas")
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    words = {"<s>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for i, name in enumerate(("base", "a", "b")):
        with torch.no_grad():
            for value in model.parameters():
                value += 0.01 * i * torch.randn_like(value)
        model.generation_config = GenerationConfig(max_new_tokens=5, eos_token_id=1)
        model.save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    ties_recipe(folder / "single.yaml", {n: folder / n for n in ("base", "a", "b")})
    ties_recipe(
        folder / "sharded.yaml", {n: folder / n for n in ("base", "a", "b")}, shard_size="20KB"
    )
    run_recipe(folder / "single.yaml", folder / "single")
    run_recipe(folder / "sharded.yaml", folder / "sharded")
    return folder


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_transformers_loads_it_without_a_missing_tensor_and_generates(
    llamas: Path, kind: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = llamas / kind
    files = sorted(p.name for p in out.glob("*.safetensors"))
    assert (files == ["model.safetensors"]) == (kind == "single")
    assert (out / "model.safetensors.index.json").is_file() == (kind == "sharded")
    assert check_loads(out)["loads_as"] == "LlamaForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True)
    prompt = tokenizer("w5 w6 w7", return_tensors="pt")
    assert model.generate(prompt["input_ids"], do_sample=False).shape[1] > 3
    assert tokenizer.apply_chat_template([{"content": "w9"}], tokenize=False) == "w9"


def test_what_transformers_loads_are_the_stored_bits(llamas: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded = [
        AutoModelForCausalLM.from_pretrained(llamas / k).state_dict() for k in ("single", "sharded")
    ]
    with safe_open(llamas / "single" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        for name in opened.keys():  # noqa: SIM118 - not a mapping
            for state in loaded:
                assert torch.equal(state[name], opened.get_tensor(name))


def test_config_and_tokenizer_are_the_donors_to_the_byte(llamas: Path) -> None:
    donor, written = contents(llamas / "base"), contents(llamas / "single")
    carried = {name: digest for name, digest in donor.items() if name != "model.safetensors"}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    } <= carried.keys()
    assert {name: written.get(name) for name in carried} == carried


# -- the files -------------------------------------------------------------------------------------


def test_a_shard_is_closed_before_it_would_grow_too_large(recipe: Path) -> None:
    ties_recipe(recipe, {n: recipe.parent / n for n in ("base", "a", "b")}, shard_size="1KB")
    plan = plan_recipe(recipe)
    shards = layout(plan)
    sizes = {s.name: s.nbytes for s in plan.steps}
    assert len(shards) > 1
    for shard in shards:
        assert sum(sizes[name] for name in shard.offsets) <= 1000
        assert min(shard.offsets.values()) % ALIGNMENT == 0
    assert [name for shard in shards for name in shard.offsets] == [s.name for s in plan.steps]


def test_tensors_start_where_they_can_be_used_in_place(tmp_path: Path) -> None:
    """Whole pages at a page, others at a multiple of the size of their values."""
    random = np.random.default_rng(0)
    tensors = {
        f"{name}.{dtype}": (dtype, stored(random.random(shape, dtype=np.float32), dtype))
        for name, shape in (("odd", (3, 7)), ("page", (32, 64)), ("pages", (128, 96)))
        for dtype in ("BF16", "F32")
    }
    write_model(tmp_path / "m", tensors)
    write_recipe(tmp_path / "r.yaml", models={"m": None}, merge_method="passthrough")
    plan = plan_recipe(tmp_path / "r.yaml")
    (shard,) = layout(plan)
    for step in plan.steps:
        whole = step.nbytes % ALIGNMENT == 0
        unit = ALIGNMENT if whole else {"BF16": 2, "F32": 4}[step.dtype]
        assert shard.offsets[step.name] % unit == 0
    assert sum(step.nbytes % ALIGNMENT == 0 for step in plan.steps) == 4


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(recipe: Path) -> None:
    ties_recipe(recipe, {n: recipe.parent / n for n in ("base", "a", "b")}, shard_size="1B")
    result = run_recipe(recipe, recipe.parent / "out")
    assert len(list(result.folder.glob("*.safetensors"))) == len(shapes())
    verify_folder(result.folder)


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties", "slerp"])
def test_threads_memory_and_repetition_do_not_show_in_any_file(tmp_path: Path, method: str) -> None:
    like = {
        "model.layers.0.mlp.weight": (900, 1100),
        "model.norm.weight": (300_000,),
        "lm_head.weight": (7, 3),
    }
    models = family(tmp_path, "a", "b", like=like)
    names = ["a"] if method == "slerp" else ["a", "b"]
    shared = {"slerp": {"t": 0.3}, "linear": {"weight": 0.5}}.get(
        method, {"weight": 0.5, "density": 0.4}
    )
    base = {} if method == "linear" else {"base_model": "base"}
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models={name: {} for name in names},
        merge_method=method,
        parameters=shared,
        shard_size="2MB",
        **base,
    )
    runs = [
        {},
        {},
        {"threads": 1},
        {"threads": 3},
        {"memory": "180MiB", "threads": 2},
        {"memory": "170MiB"},
        {"memory": "4GiB"},
    ]
    written = [
        contents(run_recipe(recipe, tmp_path / f"out{i}", **options).folder)
        for i, options in enumerate(runs)
    ]
    assert all(files == written[0] for files in written)
    assert len(models) == 3


# -- what must not be touched ----------------------------------------------------------------------


def stamps(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in (folder, *folder.rglob("*"))}


def test_a_finished_output_is_verified_and_not_rewritten(recipe: Path) -> None:
    out = run_recipe(recipe, recipe.parent / "out").folder
    before = stamps(out)
    result = run_recipe(recipe, out)
    assert result.existed
    assert result.verified["digests"] == "all equal"
    assert stamps(out) == before
    assert not out.with_name("out.partial").exists()


def test_a_finished_output_of_another_recipe_is_refused(recipe: Path) -> None:
    out = run_recipe(recipe, recipe.parent / "out").folder
    before = contents(out)
    ties_recipe(recipe, {n: recipe.parent / n for n in ("base", "a")})
    with pytest.raises(OutputError, match=r"finished merge of another recipe.*--overwrite"):
        run_recipe(recipe, out)
    assert contents(out) == before
    assert not out.with_name("out.partial").exists()


def test_a_finished_output_of_models_that_changed_is_refused(recipe: Path) -> None:
    out = run_recipe(recipe, recipe.parent / "out").folder
    write_model(recipe.parent / "a", typed(drawn(99)))  # of the same name and size
    with pytest.raises(OutputError, match="of other models"):
        run_recipe(recipe, out)
    result = run_recipe(recipe, out, overwrite=True)
    assert not result.existed
    assert run_recipe(recipe, out).existed


def test_a_foreign_folder_is_refused_and_not_touched(recipe: Path) -> None:
    out = recipe.parent / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"was not made by mergetool; choose another output$"):
        run_recipe(recipe, out)
    assert contents(out).keys() == {"diary.txt"}
    with pytest.raises(OutputError, match=r"holds no model"):
        run_recipe(recipe, out, overwrite=True)
    assert contents(out).keys() == {"diary.txt"}


def test_overwrite_never_takes_the_folder_of_the_recipe_or_the_current_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_recipe(recipe, recipe.parent / "out").folder
    inside = out / "recipe.yaml"
    inside.write_text(recipe.read_text().replace("model: ", "model: ../"))
    inside.write_text(inside.read_text().replace("base_model: ../", "base_model: ../"))
    with pytest.raises(OutputError, match="holds the recipe"):
        run_recipe(inside, out, overwrite=True)
    monkeypatch.chdir(out)
    with pytest.raises(OutputError, match="holds the current folder"):
        run_recipe(recipe, out, overwrite=True)
    assert inside.is_file()


def test_another_template_of_the_donor_is_another_merge(recipe: Path) -> None:
    base = recipe.parent / "base"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (base / "chat_template.jinja").write_text(template)
    out = run_recipe(recipe, recipe.parent / "out").folder
    assert run_recipe(recipe, out).existed
    (base / "chat_template.jinja").write_text(template + "\n")
    with pytest.raises(OutputError, match="another recipe or of other models"):
        run_recipe(recipe, out)
    run_recipe(recipe, out, overwrite=True)
    assert (out / "chat_template.jinja").read_text() == template + "\n"


def test_the_old_output_stays_until_the_new_one_is_whole(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run_recipe(recipe, recipe.parent / "out").folder
    before = contents(out)
    ties_recipe(recipe, {n: recipe.parent / n for n in ("base", "a")})
    seen = []
    publish = PartialFolder.publish

    def looking(self: PartialFolder) -> None:
        verify_folder(self.model)
        seen.append(contents(out))
        publish(self)

    monkeypatch.setattr(PartialFolder, "publish", looking)
    run_recipe(recipe, out, overwrite=True)
    assert seen == [before]
    assert contents(out) != before


def test_an_output_that_is_a_file_is_refused(recipe: Path) -> None:
    (recipe.parent / "file").write_text("mine")
    for out in ("file", "file/out"):
        with pytest.raises(OutputError, match="file: is a file"):
            run_recipe(recipe, recipe.parent / out, overwrite=True)
    assert (recipe.parent / "file").read_text() == "mine"
    assert not list(recipe.parent.glob("*.partial"))


def test_an_empty_folder_and_a_link_to_one_are_filled(recipe: Path) -> None:
    place = recipe.parent / "elsewhere"
    place.mkdir()
    (recipe.parent / "out").symlink_to(place)
    run_recipe(recipe, recipe.parent / "out")
    assert (recipe.parent / "out").is_symlink()
    verify_folder(place)


# -- failures --------------------------------------------------------------------------------------


def damaged(folder: Path, value: float) -> Path:
    """A recipe one of whose models holds `value` in one place."""
    models = family(folder, "a", "b")
    values = drawn(5)
    values["model.layers.1.mlp.up_proj.weight"][9, 4] = value
    write_model(folder / "b", typed(values))
    return ties_recipe(folder / "r.yaml", models)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_named_with_its_place(tmp_path: Path, value: float) -> None:
    recipe = damaged(tmp_path, value)
    with pytest.raises(NonFiniteError) as caught:
        run_recipe(recipe, tmp_path / "out")
    assert caught.value.exit_code == 1
    assert f"b: tensor 'model.layers.1.mlp.up_proj.weight' holds {value} at [9, 4]" in str(
        caught.value
    )
    assert not (tmp_path / "out").exists()
    assert not looks_whole(tmp_path / "out.partial")
    models = {n: tmp_path / n for n in ("base", "a", "b")}
    run_recipe(ties_recipe(recipe, models, allow_nonfinite=True), tmp_path / "out", restart=True)


def test_an_overflow_of_a_narrow_output_is_named_with_its_place(tmp_path: Path) -> None:
    values = drawn(1)
    values["lm_head.weight"][3, 2] = 70_000
    write_model(tmp_path / "big", typed(values))
    recipe = write_recipe(
        tmp_path / "r.yaml",
        models={"big": {"weight": 1.0}},
        merge_method="linear",
        out_dtype="float16",
    )
    with pytest.raises(
        NonFiniteError, match=r"'lm_head\.weight' overflows F16 at \[3, 2\].*out_dtype"
    ):
        run_recipe(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_input_is_refused_before_anything_is_written(
    recipe: Path, command: Callable[..., Ran]
) -> None:
    file = recipe.parent / "b" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    ran = command("run", recipe, "-o", "out")
    assert ran.code == 2
    assert "b/model.safetensors" in ran.error
    assert "cut off" in ran.error
    assert not list(recipe.parent.glob("out*"))


def test_an_input_cut_off_during_the_run_is_named(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Ran]
) -> None:
    enter = PartialFolder.__enter__

    def meanwhile(self: PartialFolder) -> PartialFolder:
        file = recipe.parent / "b" / "model.safetensors"
        os.truncate(file, file.stat().st_size - 100)
        return enter(self)

    monkeypatch.setattr(PartialFolder, "__enter__", meanwhile)
    ran = command("run", recipe, "-o", "out")
    assert ran.code == 1
    assert "b/model.safetensors: ends inside tensor" in ran.error
    assert not (recipe.parent / "out").exists()


@pytest.mark.parametrize("call", ["pwritev", "ftruncate", "pwrite", "write"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_after(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Ran], call: str
) -> None:
    real, calls = getattr(os, call), 0

    def refusing(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > (3 if call in ("pwritev", "write") else 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refusing)
        ran = command("run", recipe, "-o", "out", "--threads", "1")
    assert ran.code == 1
    assert "the disk is full; free some room and run the same command" in ran.error
    assert not (recipe.parent / "out").exists()
    assert command("run", recipe, "-o", "out").code == 0
    assert contents(recipe.parent / "out") == contents(
        run_recipe(recipe, recipe.parent / "whole").folder
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_meanwhile_is_one_line_and_the_run_goes_on_after(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Ran]
) -> None:
    recipe = ties_recipe(
        tmp_path / "r.yaml", family(tmp_path, "a", like={"w": (300, 500), "v": (100, 200)})
    )
    (small_disk / "ballast").write_bytes(bytes(600_000))
    ran = command("run", recipe, "-o", small_disk / "out")
    assert ran.code == 2
    assert "0.68 MB and the disk has" in ran.error
    assert not list(small_disk.glob("out*"))
    with monkeypatch.context() as patch:
        patch.setattr(
            "merge.pipeline.check_disk", lambda *_: None
        )  # as if there had been room a moment ago
        ran = command("run", recipe, "-o", small_disk / "out")
    assert ran.code == 1
    assert "the disk is full" in ran.error
    (small_disk / "ballast").unlink()
    assert command("run", recipe, "-o", small_disk / "out").code == 0
    verify_folder(small_disk / "out")


def test_a_limit_on_file_sizes_is_one_line(recipe: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    ran = subprocess.run(
        [sys.executable, "-m", "merge.cli", "run", str(recipe), "-o", "out"],
        cwd=recipe.parent,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        preexec_fn=limited,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert len(ran.stderr.splitlines()) == 1
    assert "cannot be written" in ran.stderr
    assert not (recipe.parent / "out").exists()
    shutil.rmtree(recipe.parent / "out.partial")


def test_a_tensor_that_is_not_stored_as_it_was_merged_stops_the_run(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., Ran]
) -> None:
    """A disk that loses a bit is found while the merge runs, and the next run repairs it."""
    real = os.pwritev

    def damaging(descriptor: int, buffers: Any, position: int, *flags: int) -> int:
        first = bytearray(buffers[0])
        first[0] ^= 1
        return real(descriptor, [first, *buffers[1:]], position, *flags)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", damaging)
        ran = command("run", recipe, "-o", "out")
    assert ran.code == 1
    assert "is not stored as it was merged, from row 0 on; check the disk" in ran.error
    assert not (recipe.parent / "out").exists()
    assert command("run", recipe, "-o", "out").code == 0
    assert contents(recipe.parent / "out") == contents(
        run_recipe(recipe, recipe.parent / "whole").folder
    )
