"""Mixtures of adapters in PEFT's own format, against PEFT with one adapter and against sums made by hand."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from families import contents
from peft import PeftModel
from peft_models import MODELS, WIDE, adapter, merged_by_peft, saved
from peft_models import loaded as plain
from ran import Ran
from real import LLAMA
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from merge.errors import OutputError, PlanError, VerifyError
from merge.experts.assembly import Routing
from merge.experts.xlora.folder import BIAS, WEIGHT, shares
from merge.experts.xlora.loading import check_loading, checked, loaded
from merge.experts.xlora.writing import run_peft
from merge.pipeline import budget_of, plan_recipe, run_recipe
from merge.sources.opening import open_model
from merge.verify import verify_folder

IDS = torch.tensor([[1, 5, 9, 13, 17, 4, 22, 31]])
ADAPTERS: dict[str, dict[str, Any]] = {
    "a": {"r": 3, "target_modules": ["q_proj", "v_proj"]},
    "b": {
        "r": 5,
        "lora_alpha": 7,
        "use_rslora": True,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"down_proj": 9},
    },
    "c": {"r": 4, "target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]},
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama `base`, and adapters a, b and c of it, of other ranks and on other layers."""
    folder = tmp_path_factory.mktemp("family")
    saved(MODELS["llama"](), folder / "base")
    for name, config in ADAPTERS.items():
        adapter(folder / "base", folder / name, **config)
    return folder


def recipe(folder: Path, at: Path, names: str = "abc", **keys: Any) -> Path:
    """A recipe in `at` for the mixture of adapters in `folder`."""
    experts = [{"adapter": str(folder / name)} for name in names]
    file = at / "mixture.yaml"
    told = {"base_model": str(folder / "base"), "format": "peft", "experts": experts}
    file.write_text(yaml.safe_dump(told | {"router": {"mode": "uniform"}} | keys))
    return file


def here(folder: Path, base: Any) -> dict[str, Any]:
    """The check of what was written, in this process."""
    found = checked(folder, base.folder)
    assert "problem" not in found, found
    return found


def made(folder: Path, at: Path, names: str = "abc", **keys: Any) -> Path:
    run_peft(plan_recipe(recipe(folder, at, names, **keys)), at / "out", check=here)
    return at / "out"


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_close(found: Any, expected: Any) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- fixed shares ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chosen", range(3))
def test_all_of_one_adapter_is_peft_with_that_adapter(
    family: Path, tmp_path: Path, chosen: int
) -> None:
    weights = [float(i == chosen) for i in range(3)]
    out = made(family, tmp_path, router={"weights": weights, "top_k": 1})
    alone = PeftModel.from_pretrained(plain(family / "base"), family / "abc"[chosen])
    assert_close(logits(loaded(out, family / "base")), logits(alone))
    assert (logits(alone) - logits(plain(family / "base"))).abs().max() > 0.1


def test_fixed_shares_are_the_weighted_sum_of_what_the_adapters_add(
    family: Path, tmp_path: Path
) -> None:
    given = dict(zip("abc", (0.5, 0.3, 0.2), strict=True))
    router = {"weights": list(given.values()), "top_k": 3}
    model = plain(family / "base", torch.float64)
    base = {name: values.numpy().copy() for name, values in model.state_dict().items()}
    total = dict(base)
    for name, share in given.items():
        whole = merged_by_peft(family / "base", family / name, into=tmp_path / name)
        total = {n: total[n] + share * (whole[n] - base[n]) for n in whole}
    model.load_state_dict({name: torch.from_numpy(values) for name, values in total.items()})
    out = made(family, tmp_path, router=router)
    assert_close(logits(loaded(out, family / "base")).double(), logits(model))


def routing(**keys: Any) -> Routing:
    told = {"mode": "weights", "top_k": 2, "normalise": True, "weights": (1.0, 3.0, 2.0)} | keys
    return Routing(temperature=1.0, per="module", seed=0, where="", **told)


def test_of_fixed_shares_the_largest_are_taken() -> None:
    assert shares(routing(), 3) == [0.0, 0.6, 0.4]
    assert shares(routing(normalise=False), 3) == [0.0, 0.5, 2.0 / 6.0]
    assert shares(routing(top_k=1), 3) == [0.0, 1.0, 0.0]
    assert shares(routing(mode="uniform", weights=None), 3) == [0.5, 0.5, 0.0]
    assert shares(routing(weights=(0.0, 0.0, 1.0)), 3) == [0.0, 0.0, 1.0]


# -- shares of each token ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys",
    [
        {"top_k": 3},
        {"top_k": 3, "temperature": 0.5},
        {"top_k": 2},
        {"top_k": 2, "temperature": 4.0},
        {"top_k": 2, "normalise": False, "temperature": 4.0},
        {"top_k": 1},
    ],
    ids=str,
)
def test_every_token_gets_the_shares_that_the_router_gives_it(
    family: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    out = made(family, tmp_path, router={"mode": "random", "seed": 5} | keys)
    router = load_file(out / "adapter_model.safetensors")[WEIGHT]
    router = router / router.norm(dim=1, keepdim=True)  # the temperature may be in it
    base = plain(family / "base")
    with torch.no_grad():
        seen = base(IDS, output_hidden_states=True).hidden_states[-1]
    given = by_definition(seen @ router.T / keys.get("temperature", 1.0), **keys)
    mixed = loaded(out, family / "base")
    found = logits(mixed)
    assert_close(mixed_by_hand(base, family, given), found)
    if keys["top_k"] == 3:
        latest = mixed.base_model.get_latest_scalings()[:, :, 0]
        assert (latest - given).abs().max() < 1e-5
        assert latest.var(dim=1).max() > 1e-4  # tokens do differ


def by_definition(scores: Any, *, top_k: int, normalise: bool = True, **_: Any) -> Any:
    """Softmax over the top_k, or over all of which the top_k stay."""
    best = scores.topk(top_k, dim=-1).indices
    kept = torch.zeros_like(scores).scatter(-1, best, 1.0)
    if normalise:
        return scores.masked_fill(kept == 0, float("-inf")).softmax(-1)
    return scores.softmax(-1) * kept


def mixed_by_hand(base: Any, family: Path, given: Any) -> Any:
    """Logits of the base where every adapted layer adds the products of all adapters by their shares."""
    modules = dict(base.named_modules())

    def adding(a: Any, b: Any, scale: float, share: Any) -> Callable[..., Any]:
        return lambda module, inputs, out: out + share * scale * (inputs[0] @ a.T @ b.T)

    for i, (name, config) in enumerate(ADAPTERS.items()):
        factors = load_file(family / name / "adapter_model.safetensors")
        for key, a in factors.items():
            if key.endswith("lora_A.weight"):
                module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                alpha = config.get("alpha_pattern", {}).get(module.split(".")[-1])
                alpha = alpha or config.get("lora_alpha", 5)
                scale = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
                b = factors[key.replace("lora_A", "lora_B")]
                hook = adding(a, b, scale, given[:, :, i : i + 1])
                modules[module].register_forward_hook(hook)
    return logits(base)


def test_prompts_find_their_adapters_on_a_real_model(tmp_path: Path) -> None:
    if not LLAMA.is_dir():
        pytest.skip(f"{LLAMA} is not there")
    (tmp_path / "base").symlink_to(LLAMA)
    prompts = {
        "a": ["Once upon a time there was a dog", "The dog ran to the park"],
        "b": ["Mom said no.", "Lily was sad because her toy broke"],
    }
    experts = [
        {"adapter": str(adapter(LLAMA, tmp_path / name, target_modules=["q_proj"]))}
        | {"positive_prompts": texts}
        for name, texts in prompts.items()
    ]
    out = made(tmp_path, tmp_path, experts=experts, router={"mode": "hidden", "top_k": 1})
    model, tokenizer = loaded(out, LLAMA), AutoTokenizer.from_pretrained(LLAMA)
    for expert, texts in enumerate(prompts.values()):
        for text in texts:
            with torch.no_grad():
                model(**tokenizer(text, return_tensors="pt"))
            assert model.base_model.get_latest_scalings()[0, -1, 0].argmax() == expert


def test_generation_goes_on_as_forward_passes_do(family: Path, tmp_path: Path) -> None:
    out = made(family, tmp_path, router={"mode": "random", "top_k": 2})
    model = loaded(out, family / "base")
    with torch.no_grad():
        found = model.generate(input_ids=IDS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        ids = IDS
        for _ in range(6):
            last = model(input_ids=ids).logits[:, -1]
            last[:, model.config.eos_token_id] = float("-inf")  # as min_new_tokens has it
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(found, ids)


# -- the folder --------------------------------------------------------------------------------------


def test_tensors_of_the_adapters_are_copied_bit_for_bit(family: Path, tmp_path: Path) -> None:
    """Of bfloat16 too, and from PyTorch's format."""
    (tmp_path / "base").symlink_to(family / "base")
    adapter(tmp_path / "base", tmp_path / "a", torch.bfloat16, target_modules=["q_proj"])
    shutil.copytree(family / "b", tmp_path / "b")
    stored = load_file(tmp_path / "b" / "adapter_model.safetensors")
    torch.save(stored, tmp_path / "b" / "adapter_model.bin")
    (tmp_path / "b" / "adapter_model.safetensors").unlink()
    out = made(tmp_path, tmp_path, "ab")
    for name, wanted in (
        ("0-a", load_file(tmp_path / "a" / "adapter_model.safetensors")),
        ("1-b", stored),
    ):
        found = load_file(out / "experts" / name / "adapter_model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(found[key].equal(wanted[key]) for key in wanted)
        assert {v.dtype for v in found.values()} == {v.dtype for v in wanted.values()}


def test_nothing_in_the_folder_tells_a_path(family: Path, tmp_path: Path) -> None:
    out = made(family, tmp_path)
    for file in out.rglob("*"):
        if file.is_file():
            assert str(family).encode() not in file.read_bytes(), file
            assert str(tmp_path).encode() not in file.read_bytes(), file


def card_code(folder: Path, base: str, at: str) -> str:
    """What the card says, with the places that its reader puts in."""
    text = (folder / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    assert '"base"' in code[1]
    return code[1].replace('"base"', repr(base)).replace('"this/folder"', repr(at))


SHOW = """
import json, torch
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor(%s)).logits.tolist()))
"""


def test_moved_elsewhere_it_loads_as_the_card_says(family: Path, tmp_path: Path) -> None:
    out = made(family, tmp_path, router={"weights": [0.2, 0.5, 0.3], "top_k": 3})
    wanted = logits(loaded(out, family / "base"))
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    out.rename(moved)
    (tmp_path / "mixture.yaml").unlink()
    code = card_code(moved, str(family / "base"), "elsewhere/moved") + SHOW % IDS.tolist()
    command = [sys.executable, "-c", code]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=offline, capture_output=True, text=True, check=True
    )
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert_close(found, wanted)


def test_from_within_no_line_is_needed_and_from_elsewhere_it_fails_loudly(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = made(family, tmp_path)

    def plainly(folder: str) -> Any:
        base = plain(family / "base")
        base.config.use_cache = False
        return PeftModel.from_pretrained(base, folder)

    wanted = logits(loaded(out, family / "base"))
    with pytest.raises(ValueError, match=r"adapter_config\.json' at '\./experts/0-a'"):
        plainly(str(out))
    monkeypatch.chdir(out)
    assert torch.equal(logits(plainly(".")), wanted)


def test_the_command_writes_verifies_and_finds_it_done(
    family: Path, tmp_path: Path, command: Callable[..., Ran]
) -> None:
    file = recipe(family, tmp_path, output=str(tmp_path / "out"))
    planned = command("plan", file, "--json")
    assert planned.code == 0, planned.err
    ran = command("run", file, "--json")
    assert ran.code == 0, ran.err
    report = json.loads(ran.out)
    assert not report["existed"]
    assert report["verified"]["loads_as"] == "X-LoRA of 3 adapters"
    assert report["plan"] == json.loads(planned.out)["plan"]
    before = contents(tmp_path / "out")
    again = json.loads(command("run", file, "--json").out)
    assert again["existed"]
    assert contents(tmp_path / "out") == before
    told = json.loads(command("verify", tmp_path / "out", "--json").out)
    assert told["digests"] == "all equal"
    assert told["tensors"] == json.loads(planned.out)["steps"]
    assert told["bytes"] == json.loads(planned.out)["write_bytes"]
    assert "is a folder of adapters" in command("run", file, "--score").error
    recipe(family, tmp_path, output=str(tmp_path / "out"), router={"weights": [1, 2, 3]})
    assert "exists and is not this adapter" in command("run", file).error
    assert contents(tmp_path / "out") == before


RUN = """
import os, signal, sys
from pathlib import Path
from merge.adapters.file import GrowingFile
from merge.experts.xlora.writing import run_peft
from merge.pipeline import plan_recipe
recipe, out, after = sys.argv[1:]
add, left = GrowingFile.add, [int(after)]
def counted(self, *arguments):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    add(self, *arguments)
GrowingFile.add = counted
def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)
run_peft(plan_recipe(recipe), Path(out), check=killed)
"""


def test_killed_anywhere_it_goes_on_to_the_same_bytes(family: Path, tmp_path: Path) -> None:
    file = recipe(family, tmp_path)
    run_peft(plan_recipe(file), tmp_path / "once", check=here)
    wanted = contents(tmp_path / "once")
    for after in (0, 5, 9, 21, 22):
        out = tmp_path / "out"
        done = subprocess.run([sys.executable, "-c", RUN, str(file), str(out), str(after)])
        assert done.returncode == -9
        assert not out.exists()
        run_peft(plan_recipe(file), out, check=lambda *_: {})
        assert contents(out) == wanted
        assert not list(tmp_path.glob("*.partial"))
        shutil.rmtree(out)


def test_an_unfinished_mixture_of_another_recipe_is_not_taken_up(
    family: Path, tmp_path: Path
) -> None:
    def stopped(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_peft(plan_recipe(recipe(family, tmp_path)), tmp_path / "out", check=stopped)
    other = recipe(family, tmp_path, "ab")
    with pytest.raises(OutputError, match="unfinished merge of another recipe"):
        run_recipe(other, tmp_path / "out")


def test_the_projected_memory_does_not_grow_with_the_adapters(tmp_path: Path) -> None:
    config = {"hidden_size": 512, "intermediate_size": 1024}
    saved(LlamaForCausalLM(LlamaConfig(**WIDE | config)), tmp_path / "base")
    for name in "abcd":
        adapter(tmp_path / "base", tmp_path / name, r=64, target_modules="all-linear")
    budgets = [
        budget_of(plan_recipe(recipe(tmp_path, tmp_path, names)), "512MiB", 1)
        for names in ("ab", "abcd")
    ]
    of_names = 1 << 20  # what the names of more tensors take
    assert budgets[1].peak <= budgets[0].peak + of_names


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("part", ["", "experts/1-b"])
def test_a_changed_byte_is_found(family: Path, tmp_path: Path, part: str, file: str) -> None:
    out = made(family, tmp_path)
    changed = out / part / file
    data = bytearray(changed.read_bytes())
    data[-2] ^= 1
    changed.write_bytes(data)
    with pytest.raises(VerifyError, match=r"its bytes changed|not readable as JSON"):
        verify_folder(out)


def test_an_expert_that_is_gone_is_found(family: Path, tmp_path: Path) -> None:
    out = made(family, tmp_path)
    shutil.rmtree(out / "experts" / "2-c")
    with pytest.raises(VerifyError, match="2-c"):
        verify_folder(out)


# -- whether PEFT loads it ---------------------------------------------------------------------------


def renamed(file: Path, old: str, new: str) -> None:
    save_file({name.replace(old, new): v for name, v in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("part", "old", "new", "message"),
    [
        ("", WEIGHT, "base_model.router.weight", "missing, which PEFT then draws at random"),
        ("experts/1-b", "layers.1.mlp", "layers.7.mlp", "does not load it|is not found"),
    ],
)
def test_a_renamed_tensor_is_found_by_loading(
    family: Path, tmp_path: Path, part: str, old: str, new: str, message: str
) -> None:
    out = made(family, tmp_path)
    renamed(out / part / "adapter_model.safetensors", old, new)
    with pytest.raises(VerifyError, match=message):
        check_loading(out, open_model(str(family / "base")))


def test_a_router_that_gives_nan_is_found_by_loading(family: Path, tmp_path: Path) -> None:
    out = made(family, tmp_path)
    file = out / "adapter_model.safetensors"
    save_file(load_file(file) | {BIAS: torch.full((3,), float("nan"))}, file)
    assert "problem" in checked(out, family / "base")


def test_nan_in_an_adapter_is_an_error_and_nothing_is_written(family: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(family / "base")
    shutil.copytree(family / "a", tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, file)
    with pytest.raises(Exception, match="holds nan at"):
        run_recipe(recipe(tmp_path, tmp_path, "a"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# -- which adapters and bases ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mistral", "phi3", "qwen2"])
def test_other_bases_and_their_layers(tmp_path: Path, kind: str) -> None:
    saved(MODELS[kind](), tmp_path / "base")
    layers = ["qkv_proj", "gate_up_proj"] if kind == "phi3" else ["q_proj", "gate_proj"]
    adapter(tmp_path / "base", tmp_path / "a", target_modules=layers)
    adapter(tmp_path / "base", tmp_path / "b", r=2, target_modules=["o_proj", "down_proj"])
    out = made(tmp_path, tmp_path, "ab", router={"weights": [0, 1]})
    alone = PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "b")
    assert_close(logits(loaded(out, tmp_path / "base")), logits(alone))


def test_of_many_layers_each_is_found(tmp_path: Path) -> None:
    """PEFT shortens long lists of modules."""
    saved(LlamaForCausalLM(LlamaConfig(**WIDE | {"num_hidden_layers": 12})), tmp_path / "base")
    even = {"target_modules": ["q_proj", "o_proj", "up_proj", "k_proj"]}
    adapter(tmp_path / "base", tmp_path / "a", layers_to_transform=[*range(0, 12, 2)], **even)
    adapter(tmp_path / "base", tmp_path / "b", r=2, **even)
    out = made(tmp_path, tmp_path, "ab", router={"weights": [1, 0]})
    alone = PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "a")
    assert_close(logits(loaded(out, tmp_path / "base")), logits(alone))


def forget_base_layers(folder: Path) -> None:
    """As save_embedding_layers=False has PEFT save it."""
    file = folder / "adapter_model.safetensors"
    save_file({n: v for n, v in load_file(file).items() if "base_layer" not in n}, file)


def test_an_adapter_of_the_embedding(family: Path, tmp_path: Path) -> None:
    (tmp_path / "base").symlink_to(family / "base")
    shutil.copytree(family / "b", tmp_path / "b")
    adapter(tmp_path / "base", tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(PlanError, match=r"keeps whole tensors \(model\.embed_tokens\.base_layer"):
        plan_recipe(recipe(tmp_path, tmp_path, "ab"))
    forget_base_layers(tmp_path / "a")
    out = made(tmp_path, tmp_path, "ab", router={"weights": [1, 0]})
    alone = PeftModel.from_pretrained(plain(tmp_path / "base"), tmp_path / "a")
    assert_close(logits(loaded(out, tmp_path / "base")), logits(alone))


def test_the_same_adapter_under_other_names(family: Path, tmp_path: Path) -> None:
    experts = [
        {"adapter": str(family / "a"), "name": "Größe / 1"},
        {"adapter": str(family / "b"), "name": ".."},
        {"adapter": str(family / "a")},
        {"adapter": str(family / "a")},
    ]
    file = recipe(family, tmp_path, experts=experts, router={"mode": "uniform", "top_k": 4})
    run_peft(plan_recipe(file), tmp_path / "out", check=here)
    found = sorted(folder.name for folder in (tmp_path / "out" / "experts").iterdir())
    assert found == ["0-Gr-e-1", "1-..", "2-a-2", "3-a-3"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "is a DoRA adapter .*write format: routed"),
        ({"modules_to_save": ["lm_head"]}, "keeps whole tensors"),
        ({"trainable_token_indices": [3]}, "changes rows of tokens"),
        ({"target_modules": ["lm_head", "q_proj"]}, "adapts 'lm_head'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_xlora_has_no_place_for_is_refused_by_name(
    family: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    (tmp_path / "base").symlink_to(family / "base")
    shutil.copytree(family / "a", tmp_path / "a")
    adapter(tmp_path / "base", tmp_path / "b", **{"target_modules": ["q_proj"]} | config)
    forget_base_layers(tmp_path / "b")
    with pytest.raises(PlanError, match=rf"mixture\.yaml:\d+: b {message}"):
        plan_recipe(recipe(tmp_path, tmp_path, "ab"))


@pytest.mark.parametrize(
    ("config", "message"),
    [({"bias": "lora_only"}, "a keeps whole tensors"), ({"lora_bias": True}, "a adds biases")],
    ids=str,
)
def test_an_adapter_of_biases_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    saved(MODELS["qwen2"](), tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a", target_modules=["q_proj"], **config)
    with pytest.raises(PlanError, match=message):
        plan_recipe(recipe(tmp_path, tmp_path, "a"))


@pytest.mark.parametrize(("kind", "layer"), [("gpt2", "c_attn"), ("bert", "query")])
def test_bases_that_xlora_does_not_load_are_refused(tmp_path: Path, kind: str, layer: str) -> None:
    saved(MODELS[kind](), tmp_path / "base")
    adapter(tmp_path / "base", tmp_path / "a", target_modules=[layer])
    with pytest.raises(PlanError, match=r"format: routed$"):
        plan_recipe(recipe(tmp_path, tmp_path, "a"))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"router": {"mode": "arrow"}}, "arrow looks at the input of every adapted layer"),
        ({"router": None}, "arrow looks at"),
        ({"router": {"mode": "uniform", "per": "layer"}}, "one router for the model"),
        ({"dtype": "bfloat16"}, "format peft and dtype are both given"),
        ({"tokenizer_source": "base"}, "format peft and tokenizer_source are both given"),
        ({"layers": [0]}, "format peft and layers are both given"),
        ({"score": {}}, "format peft and score are both given"),
    ],
    ids=str,
)
def test_recipes_that_it_cannot_be_are_refused(
    family: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_recipe(recipe(family, tmp_path, **keys))


def test_noise_on_an_adapter_is_refused(family: Path, tmp_path: Path) -> None:
    experts = [{"adapter": str(family / "a"), "noise_scale": 0.1}]
    with pytest.raises(PlanError, match="noise_scale is of models as experts"):
        plan_recipe(recipe(family, tmp_path, experts=experts))


def test_a_base_with_an_adapter_and_adapters_in_a_row_are_refused(
    family: Path, tmp_path: Path
) -> None:
    base = {"base_model": f"{family / 'base'}+{family / 'b'}"}
    with pytest.raises(PlanError, match="has no folder of its own"):
        plan_recipe(recipe(family, tmp_path, "a", **base))
    experts = [{"adapter": f"{family / 'a'}+{family / 'b'}"}]
    with pytest.raises(PlanError, match="several adapters in a row"):
        plan_recipe(recipe(family, tmp_path, experts=experts))


def test_xlora_runs_with_no_other_names_than_numbers(family: Path, tmp_path: Path) -> None:
    """Why the adapters are called 0, 1, ..."""
    out = made(family, tmp_path)
    file = out / "adapter_config.json"
    told = json.loads(file.read_text())
    told["adapters"] = dict(zip("xyz", told["adapters"].values(), strict=True))
    file.write_text(json.dumps(told))
    model = loaded(out, family / "base")
    with pytest.raises(KeyError):
        logits(model)
