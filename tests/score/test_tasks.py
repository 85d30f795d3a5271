"""Tasks by name: of the harness's own, of a folder, with what counts of them and which way it counts."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from harness_tasks import choices_in, generated_in, perplexity_in, task_in
from ran import Ran

from merge.errors import RequestError, ScoreError
from merge.pipeline import run_recipe
from merge.score import Conditions, score_models, table, tasks_by_name
from merge.score.harness import leaves, tree_of
from merge.score.models import candidate, loaded
from merge.score.running import check_direction
from merge.shipped import shipped

BASE = shipped("evals/zoo/base")
ADAPTED = "zoo:base+zoo:adapters/roman-attention"
Command = Callable[..., Ran]


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_score_is_the_mean_of_the_samples_that_are_kept(command: Command, tmp_path: Path) -> None:
    choices_in(tmp_path / "mine")
    ran = command(
        "score", "zoo:base", "zoo:reverser", "zoo:base", "--tasks", "letters", "--include", "mine",
        "--samples", "kept.jsonl", "--json",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    rows = rows_of(tmp_path / "kept.jsonl")
    scored = json.loads(ran.out)["models"]
    assert [model["model"] for model in scored] == ["zoo:base", "zoo:reverser"], "each once"
    for model in scored:
        mine = [row["metrics"]["acc"] for row in rows if row["model"] == model["model"]]
        assert len(mine) == 12 == model["tasks"]["letters"]["documents"]
        assert model["tasks"]["letters"]["value"] == pytest.approx(sum(mine) / 12)
    assert command(
        "score", "zoo:base", "--tasks", "letters", "--include", "mine", "--samples", "kept.jsonl"
    ).error.startswith("kept.jsonl: is there already")
    assert rows == rows_of(tmp_path / "kept.jsonl")


def test_the_metric_that_is_named_counts(tmp_path: Path) -> None:
    folder = choices_in(tmp_path / "mine")
    first, _ = tasks_by_name(["letters"], [folder])
    named, _ = tasks_by_name(["letters=acc_norm"], [folder])
    assert [t.metric for t in (*first.tasks, *named.tasks)] == ["acc,none", "acc_norm,none"]
    with pytest.raises(RequestError, match="letters has no metric 'f1'; it has acc, acc_norm"):
        tasks_by_name(["letters=f1"], [folder])
    with pytest.raises(RequestError, match="task letters is named twice"):
        tasks_by_name(["letters=acc", "letters=acc_norm"], [folder])


def test_less_is_better_where_the_harness_says_so(tmp_path: Path) -> None:
    suite, harness = tasks_by_name(["texts"], [perplexity_in(tmp_path / "mine")])
    (task,) = suite.tasks
    assert not task.higher_is_better
    folders = [BASE, shipped("evals/zoo/scribe")]
    scores = score_models(folders, suite, labels=["base", "scribe"], harness=harness)
    values = [m.tasks["texts"].value for m in scores.models]
    assert all(value > 1 and math.isfinite(value) for value in values)  # perplexities
    better = min(scores.models, key=lambda m: m.tasks["texts"].value)
    assert better.mean == max(m.mean for m in scores.models) == -min(values)
    (marked,) = [line for line in table(scores).splitlines() if line.endswith("*")]
    assert marked.startswith(better.label)
    assert "texts (less is better)" in table(scores)


def test_a_task_that_is_made_may_say_that_less_is_better(tmp_path: Path) -> None:
    """Of tasks in code nothing is listed that could say it before."""
    from lm_eval.tasks import get_task_dict

    suite, harness = tasks_by_name(["texts"], [perplexity_in(tmp_path / "mine")])
    (task,), (made,) = suite.tasks, leaves(get_task_dict(["texts"], harness))
    check_direction(made, task)
    check_direction(made, replace(task, metric="unheard_of,none"))
    with pytest.raises(ScoreError, match=r"less is better by its code; .* higher_is_better: false"):
        check_direction(made, replace(task, higher_is_better=True))


def test_solved_examples_stand_before_each_document_unless_the_task_says_none(
    command: Command, tmp_path: Path
) -> None:
    choices_in(tmp_path / "mine", fewshot_split="train")
    choices_in(tmp_path / "mine", "bare", fewshot_split="train", num_fewshot=0)
    for count in (0, 3):
        command(
            "score", "zoo:base", "--tasks", "letters,bare", "--include", "mine", "--num-fewshot", count,
            "--samples", f"{count}.jsonl",
        )  # fmt: skip
    prompts = {
        (count, task): [
            r["prompt_hash"] for r in rows_of(tmp_path / f"{count}.jsonl") if r["task"] == task
        ]
        for count in (0, 3)
        for task in ("letters", "bare")
    }
    assert not set(prompts[0, "letters"]) & set(prompts[3, "letters"])
    assert prompts[0, "bare"] == prompts[3, "bare"]


def test_a_model_with_an_adapter_scores_as_what_run_writes(tmp_path: Path) -> None:
    """To the bit: the same likelihoods of every choice."""
    suite, harness = tasks_by_name(["letters"], [choices_in(tmp_path / "mine")])
    (tmp_path / "r.yaml").write_text(f"model: '{ADAPTED}'\n")
    written = run_recipe(tmp_path / "r.yaml", tmp_path / "out").folder
    kept = tmp_path / "kept.jsonl"
    score_models(
        [candidate(ADAPTED), written, BASE],
        suite,
        labels=["memory", "written", "base"],
        harness=harness,
        samples=kept,
    )
    found: dict[str, list[Any]] = {}
    for row in rows_of(kept):
        found.setdefault(row["model"], []).append(row["answers"])
    assert found["memory"] == found["written"] != found["base"]


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_model_with_an_adapter_is_in_memory_what_is_loaded_where_dtypes_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, told: bool
) -> None:
    """As on a GPU, whether config.json names the dtype or not."""
    from safetensors.torch import load_file, save_file

    monkeypatch.setattr("merge.score.models.FLOAT32_LIMIT", 0)
    shutil.copytree(BASE, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = {k: v.to(getattr(torch, dtype)) for k, v in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    config = json.loads((BASE / "config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    config |= {"dtype": dtype} if told else {}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    adapted = f"{tmp_path / 'base'}+zoo:adapters/roman-attention"
    (tmp_path / "r.yaml").write_text(f"model: '{adapted}'\n")
    written = run_recipe(tmp_path / "r.yaml", tmp_path / "out").folder
    live, read = (
        loaded(found, "m", Conditions(device="cpu"))[0].state_dict()
        for found in (candidate(adapted), written)
    )
    assert live.keys() == read.keys()
    for name, value in read.items():
        assert value.dtype == getattr(torch, dtype)
        assert live[name].dtype == value.dtype
        assert torch.equal(live[name], value)


def test_an_adapter_alone_is_refused(command: Command) -> None:
    ran = command("score", "zoo:adapters/roman-attention")
    assert ran.code == 2
    assert "is an adapter" in ran.error


def test_prompts_are_put_as_chats_where_the_model_has_a_template(
    command: Command, tmp_path: Path
) -> None:
    choices_in(tmp_path / "mine")
    asked = ("--tasks", "letters", "--include", "mine", "--apply-chat-template", "--samples")
    assert command("score", "zoo:clerk", *asked, "chat.jsonl").code == 0
    plain = command("score", "zoo:clerk", *asked[:4], "--samples", "plain.jsonl")
    assert plain.code == 0
    chats, plains = (
        {row["prompt_hash"] for row in rows_of(tmp_path / f"{name}.jsonl")}
        for name in ("chat", "plain")
    )
    assert len(chats) == 12
    assert not chats & plains


def test_that_a_model_has_no_template_is_found_before_it_is_loaded(
    command: Command, tmp_path: Path
) -> None:
    choices_in(tmp_path / "mine")
    asked = (
        "--tasks",
        "letters",
        "--include",
        "mine",
        "--apply-chat-template",
        "--samples",
        "none.jsonl",
    )
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BASE, tmp_path / "weightless", ignore=ignored)
    for model in ("weightless", ADAPTED):
        ran = command("score", model, *asked)
        assert ran.code == 2
        assert ran.error.startswith(f"{model}: has no chat template")
    shutil.copytree(shipped("evals/zoo/clerk"), tmp_path / "chatting", ignore=ignored)
    assert "chatting: cannot be loaded" in command("score", "chatting", *asked).error


def test_code_of_others_is_not_run_unasked(command: Command, tmp_path: Path) -> None:
    shutil.copytree(BASE, tmp_path / "strange")
    config = json.loads((BASE / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "architectures": ["StrangeForCausalLM"],
        "auto_map": {
            "AutoConfig": "strange.StrangeConfig",
            "AutoModelForCausalLM": "strange.StrangeForCausalLM",
        },
    }
    (tmp_path / "strange" / "config.json").write_text(json.dumps(config))
    (tmp_path / "strange" / "strange.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
        "class StrangeForCausalLM(LlamaForCausalLM):\n    config_class = StrangeConfig\n"
    )
    asked = ("score", "strange", "zoo:base", "--limit", 4, "--json")
    ran = command(*asked)
    assert ran.code == 2
    assert "strange: brings modelling code of its own (AutoConfig, AutoModel" in ran.error
    assert not (tmp_path / "ran").exists()
    trusted = command(*asked, "--trust-remote-code")
    assert trusted.code == 0, trusted.err
    assert (tmp_path / "ran").exists()
    strange, base = json.loads(trusted.out)["models"]
    assert strange["tasks"] == base["tasks"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--backend", "vllm", "--device", "cuda:1"), "--device is not for --backend vllm"),
        (("--euroeval", "bin/euroeval"), "--euroeval is for --backend euroeval"),
    ],
)
def test_options_that_would_not_count_are_refused(
    command: Command, options: tuple[str, ...], told: str
) -> None:
    ran = command("score", "zoo:base", *options)
    assert ran.code == 2
    assert told in ran.error


def test_vllm_is_asked_for_by_name_where_it_is_not_there(command: Command) -> None:
    pytest.importorskip("lm_eval")
    try:
        import vllm  # noqa: F401
    except ImportError:
        ran = command("score", "zoo:base", "--backend", "vllm")
        assert ran.code == 2
        assert "vLLM, which is not installed" in ran.error


def test_prompts_that_do_not_fit_and_empty_answers_are_told(
    command: Command, tmp_path: Path
) -> None:
    """The window of the tiny family is 64 tokens, each a letter."""
    prompts = ["roman 3=", *[f"reverse {'ab' * 40}{i}=" for i in range(29)]]
    generated_in(tmp_path / "mine", "long", prompts, max_gen_toks=8)
    from safetensors.torch import load_file, save_file

    shutil.copytree(BASE, tmp_path / "mute")
    tensors = load_file(BASE / "model.safetensors")
    save_file({k: 0 * v for k, v in tensors.items()}, tmp_path / "mute" / "model.safetensors")
    asked = ("score", "mute", "--tasks", "long", "--include", "mine")
    found = json.loads(command(*asked, "--json").out)
    answers = found["models"][0]["answers"]["long"]
    assert answers["count"] == 30
    assert answers["cut_prompts"] == pytest.approx(29 / 30)
    assert answers["empty"] == answers["alike"] == 1
    notes = command(*asked).err.splitlines()
    assert [note.removeprefix("note: ") for note in notes] == found["notes"]
    assert found["notes"][0].startswith("mute: long: 97 % of the prompts do not fit")
    assert any("say nothing" in note for note in found["notes"])


def test_conditions_reach_the_harness(tmp_path: Path) -> None:
    suite, harness = tasks_by_name(["letters"], [choices_in(tmp_path / "mine")])
    (model,) = score_models(
        [BASE], suite, labels=["base"], harness=harness,
        conditions=Conditions(limit=5, batch_size=2, device="cpu"),
    ).models  # fmt: skip
    assert model.tasks["letters"].documents == 5


def test_a_recipe_scores_on_tasks_by_name_and_its_parents_with_adapters(
    command: Command, tmp_path: Path
) -> None:
    choices_in(tmp_path / "mine")
    (tmp_path / "r.yaml").write_text(
        f"model: '{ADAPTED}'\nscore: {{tasks: [letters], include: mine, limit: 6}}\n"
    )
    ran = command("run", "r.yaml", "-o", "out", "--json")
    assert ran.code == 0, ran.err
    result, parent = json.loads(ran.out)["scores"]["models"]
    assert (result["model"], parent["model"]) == ("out", ADAPTED)
    assert result["tasks"] == parent["tasks"]
    assert result["tasks"]["letters"]["documents"] == 6


@pytest.mark.parametrize(
    ("score", "what"),
    [
        ("{tasks: [arc_eazy]}", "no task, group or tag 'arc_eazy' in lm-eval (did you mean 'arc_easy'?)"),
        ("{tasks: [arc_easy], suite: german}", "has both suite and tasks; keep one"),
        ("{suite: nonsense}", "no suite 'nonsense'"),
        ("{chat_template: true}", "the result: has no chat template"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_be_scored_writes_nothing(
    score: str, what: str, command: Command, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(f"model: zoo:base\nscore: {score}\n")
    ran = command("run", "r.yaml", "-o", "out")
    assert ran.code == 2
    assert what in ran.error
    assert not list(tmp_path.glob("out*"))


def test_groups_are_aggregated_as_they_say_and_tags_are_means_of_their_tasks(
    tmp_path: Path,
) -> None:
    """A task of 12 documents and one of 4: pooled in the group that says so, else each counts the same."""
    folder = choices_in(tmp_path / "mine", "many", tag="both")
    few = [{"question": "roman 3=", "choices": ["III", "IX"], "answer": i % 2} for i in range(4)]
    settings = yaml.safe_load((folder / "many.yaml").read_text())
    kept = {
        key: settings[key]
        for key in settings
        if key.startswith(("doc_", "output", "target", "metric"))
    }
    task_in(folder, "few", few, tag="both", **kept)
    by_size = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    for name, aggregates in (("pooled", {"aggregate_metric_list": by_size}), ("plain", {})):
        group = {"group": name, "task": ["many", "few"], **aggregates}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(group))
    suite, harness = tasks_by_name(["many", "few", "pooled", "plain", "both"], [folder])
    assert {task.metric for task in suite.tasks} == {"acc,none"}
    (model,) = score_models([BASE], suite, labels=["base"], harness=harness).models
    many, few_, pooled, plain, both = model.tasks.values()
    assert many.value != few_.value == 0.5
    assert (many.documents, few_.documents, pooled.documents) == (12, 4, 16)
    assert pooled.value == pytest.approx((12 * many.value + 4 * few_.value) / 16)
    for found in (plain, both):
        assert found.documents == 16
        assert found.value == pytest.approx((many.value + few_.value) / 2)
        assert found.stderr == pytest.approx(math.hypot(many.stderr, few_.stderr) / 2)


def test_a_suite_in_a_folder_is_checked_before_a_merge(command: Command, tmp_path: Path) -> None:
    choices_in(tmp_path / "mine")
    told = {"tasks": [{"task": "letters", "metric": "acc_nrm,none"}]}
    (tmp_path / "mine" / "suite.yaml").write_text(yaml.safe_dump(told))
    (tmp_path / "r.yaml").write_text("model: zoo:base\nscore: {suite: mine}\n")
    ran = command("run", "r.yaml", "-o", "out")
    assert ran.code == 2
    assert "task letters has no metric 'acc_nrm,none'" in ran.error
    assert not list(tmp_path.glob("out*"))


def test_what_a_task_draws_is_the_same_for_every_model_and_process(tmp_path: Path) -> None:
    """As the order of choices of GPQA, by which a search knows its documents too."""
    folder = choices_in(tmp_path / "mine", process_docs="FUNCTION")
    file = folder / "letters.yaml"
    file.write_text(file.read_text().replace("FUNCTION", "!function drawing.shuffled"))
    (folder / "drawing.py").write_text(
        "import random\nimport numpy\n\ndef drawn(document):\n"
        "    return {'question': f'{random.random()} {numpy.random.random()}'}\n\n"
        "def shuffled(documents):\n    return documents.map(drawn, load_from_cache_file=False)\n"
    )
    suite, harness = tasks_by_name(["letters"], [folder])
    score_models([BASE], suite, labels=["base"], harness=harness, limit=1)
    first, second = (
        [[*task.eval_docs] for task in leaves(tree_of(["letters"], harness))] for _ in range(2)
    )
    assert first == second
