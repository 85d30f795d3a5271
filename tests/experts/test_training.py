"""Laws of training routers: nothing else changes, a kill loses nothing, what cannot learn is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import contents
from ran import Ran
from safetensors.torch import load_file
from stock_moe import mixtral, outputs, qwen3, stock, texts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from merge.errors import OutputError, RequestError, RunError
from merge.experts.routers.gates import gates_of
from merge.experts.texts import Text, read_texts
from merge.experts.training.batches import IGNORED, Order, batch_of, divided, encoded
from merge.experts.training.learning import Course, train_router
from merge.experts.training.losses import balance_loss, counted, prediction_loss, size_loss
from merge.experts.training.running import Running, opened
from merge.experts.training.state import State
from merge.sources.opening import open_model

ROOT = Path(__file__).parents[2]
SHORT = Course(steps=6, rate=0.05, batch=8)
EAGER = Course(steps=60, rate=0.1, balance=0.0)
GATE = "block_sparse_moe.gate.weight"


class CutOffError(Exception):
    """A run ends here, as if it were killed."""


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    return mixtral(tmp_path / "mix")


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    return texts(tmp_path / "texts.jsonl")


def cut_at(step: int) -> Callable[[int, float, float], None]:
    def told(done: int, loss: float, balance: float) -> None:
        if done == step:
            raise CutOffError

    return told


# -- what changes ------------------------------------------------------------------------------------


def test_only_the_routers_change_and_held_out_texts_are_predicted_better(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    done = train_router(mixture, [lines], tmp_path / "out", Course(steps=40, rate=0.1))
    before, after = (
        load_file(mixture / "model.safetensors"),
        load_file(done.folder / "model.safetensors"),
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.{GATE}" for i in range(2)}
    first, last = done.told["held_out_loss"]
    assert last < first - 0.05
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (mixture / name).read_bytes() == (done.folder / name).read_bytes()
    assert done.verified["compared"]


def test_the_loss_told_is_that_of_the_written_model(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    done = train_router(mixture, [lines], tmp_path / "out", SHORT)
    _, held = divided(read_texts([lines]))
    tokenizer = AutoTokenizer.from_pretrained(done.folder)
    model = AutoModelForCausalLM.from_pretrained(done.folder, dtype=torch.float32)
    total, count = 0.0, 0
    for text in held:  # one at a time: no padding
        asked = tokenizer(text.prompt)["input_ids"]
        ids = torch.tensor([[*tokenizer(text.whole)["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            known = model(ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
        total -= float(known[len(asked) - 1 :].sum())
        count += ids.shape[1] - len(asked)
    assert done.told["held_out_loss"][1] == pytest.approx(total / count, rel=1e-5)
    assert done.told["texts"] == {"learned": 40 - len(held), "held_out": len(held)}


def test_routers_are_rounded_into_the_stored_dtype(lines: Path, tmp_path: Path) -> None:
    folder = mixtral(tmp_path / "mix")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    done = train_router(folder, [lines], tmp_path / "out", SHORT)
    assert {t.dtype for t in load_file(done.folder / "model.safetensors").values()} == {
        torch.bfloat16
    }


def test_the_provenance_tells_what_was_trained_on_what(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    train_router(mixture, [lines], tmp_path / "out", SHORT)
    told = json.loads((tmp_path / "out" / "mergetool.json").read_text())["training"]
    assert told["asked"]["steps"] == 6
    assert told["asked"]["texts"][0][0] == "texts.jsonl"
    assert told["machine"]["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(told)
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()


# -- the same bytes ----------------------------------------------------------------------------------


def test_cut_off_at_any_step_it_ends_with_the_same_bytes(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    whole = train_router(mixture, [lines], tmp_path / "whole", SHORT, save_every=2).folder
    for step in range(1, SHORT.steps + 1):
        out = tmp_path / f"cut-{step}"
        with pytest.raises(CutOffError):
            train_router(mixture, [lines], out, SHORT, save_every=2, told=cut_at(step))
        assert not out.exists()
        done = train_router(mixture, [lines], out, SHORT, save_every=2)
        assert done.taken_up == (step - 1) // 2 * 2
        assert contents(out) == contents(whole)
        assert not out.with_name(out.name + ".partial").exists()


def test_how_often_the_state_is_saved_changes_nothing(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    folders = [
        train_router(mixture, [lines], tmp_path / f"{n}", SHORT, save_every=n).folder
        for n in (1, 50)
    ]
    assert contents(folders[0]) == contents(folders[1])


def test_killed_as_it_saves_it_goes_on(mixture: Path, lines: Path, tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
import merge.experts.training.state as state
rename = Path.rename
def killed(self, target):
    if self.name.endswith(".growing") and b'"step":"4"' in self.read_bytes():
        self.write_bytes(self.read_bytes()[:500])
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = killed
from merge.experts.training.learning import Course, train_router
course = Course(steps=6, rate=0.05, batch=8)
mixture, lines, out = map(Path, {[str(mixture), str(lines), str(tmp_path / "out")]!r})
train_router(mixture, [lines], out, course, save_every=2)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    done = train_router(mixture, [lines], tmp_path / "out", SHORT, save_every=2)
    assert done.taken_up == 2
    whole = train_router(mixture, [lines], tmp_path / "whole", SHORT).folder
    assert contents(done.folder) == contents(whole)


def test_the_same_command_again_finds_its_result(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    first = train_router(mixture, [lines], tmp_path / "out", SHORT)
    again = train_router(mixture, [lines], tmp_path / "out", SHORT)
    assert again.existed
    assert not first.existed
    assert again.told["held_out_loss"] == first.told["held_out_loss"]


@pytest.mark.parametrize("change", [{"rate": 0.02}, {"seed": 1}, {"z_loss": 0.1}, {"balance": 1.0}])
def test_settings_decide_about_the_result(
    mixture: Path, lines: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    train_router(mixture, [lines], tmp_path / "a", SHORT)
    other = Course(**(vars(SHORT) | change))
    train_router(mixture, [lines], tmp_path / "b", other)
    assert outputs(tmp_path / "a") != outputs(tmp_path / "b")


# -- what is refused ---------------------------------------------------------------------------------


def test_an_unfinished_training_with_other_settings_is_not_gone_on_with(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(CutOffError):
        train_router(mixture, [lines], out, SHORT, save_every=2, told=cut_at(5))
    other = Course(**(vars(SHORT) | {"rate": 0.02}))
    with pytest.raises(OutputError, match=r"training with rate 0.05, not 0.02; .*--restart"):
        train_router(mixture, [lines], out, other)
    with pytest.raises(OutputError, match="training of other files"):
        train_router(mixture, [texts(tmp_path / "more.jsonl", 30)], out, SHORT)
    done = train_router(mixture, [lines], out, other, restart=True)
    assert done.taken_up == 0


def test_another_model_in_the_output_is_replaced_only_when_asked(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    out = mixtral(tmp_path / "out", experts=2)
    before = contents(out)
    with pytest.raises(OutputError, match="--overwrite"):
        train_router(mixture, [lines], out, SHORT)
    assert contents(out) == before
    train_router(mixture, [lines], out, SHORT, overwrite=True)
    assert outputs(out)


def test_a_damaged_state_is_told(mixture: Path, lines: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CutOffError):
        train_router(mixture, [lines], out, SHORT, save_every=2, told=cut_at(5))
    state = tmp_path / "out.partial" / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-20])
    with pytest.raises(
        OutputError, match=r"state\.safetensors: is no state of a training .*--restart"
    ):
        train_router(mixture, [lines], out, SHORT)


@pytest.mark.parametrize("make", [mixtral, qwen3])
def test_one_expert_with_the_whole_share_is_refused(
    make: Callable[..., Path], lines: Path, tmp_path: Path
) -> None:
    folder = make(tmp_path / "mix", top_k=1)
    with pytest.raises(RequestError, match=r"top_k is 1 .* gradient of every router is exactly 0"):
        train_router(folder, [lines], tmp_path / "out", SHORT)
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(("normalise", "zero"), [(True, True), (False, False)])
def test_that_gradient_is_zero_only_where_shares_are_renormalised(
    tmp_path: Path, normalise: bool, zero: bool
) -> None:
    running = opened_for_test(qwen3(tmp_path / "mix", top_k=1, normalise=normalise))
    ids = torch.tensor([[1, 5, 9, 30, 12]])
    loss = prediction_loss(running.model(ids).logits, ids)
    gradients = torch.autograd.grad(loss, list(running.routers.values()))
    assert all(bool((g == 0).all()) == zero for g in gradients)


def test_one_expert_a_token_learns_where_its_share_is_not_renormalised(
    lines: Path, tmp_path: Path
) -> None:
    folder = qwen3(tmp_path / "mix", top_k=1, normalise=False)
    done = train_router(folder, [lines], tmp_path / "out", Course(steps=40, rate=0.02, balance=0.0))
    first, last = done.told["held_out_loss"]
    assert last < first


def test_a_dense_model_is_no_mixture(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="is a llama; routers are known of"):
        train_router(ROOT / "evals" / "zoo" / "base", [lines], tmp_path / "out", SHORT)


def test_a_loss_that_is_not_finite_is_an_error(mixture: Path, lines: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"the loss of step .* --restart"):
        train_router(mixture, [lines], tmp_path / "out", Course(steps=3, rate=1e38))


def test_routers_that_the_last_step_ruins_are_not_saved(
    mixture: Path, lines: Path, tmp_path: Path
) -> None:
    """3e38 times a step of 1 is finite, and no float16."""
    AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float16).save_pretrained(mixture)
    with pytest.raises(RunError, match=r"NaN or infinity in the routers after step 1; .*--restart"):
        train_router(mixture, [lines], tmp_path / "out", Course(steps=1, rate=3e38))
    assert not (tmp_path / "out").exists()


def test_what_is_told_of_texts_is_what_was_read(
    mixture: Path, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is read once cannot change in between."""
    opened: list[str] = []
    plain = Path.open

    def counted(self: Path, *arguments: Any, **more: Any) -> Any:
        opened.append(self.name)
        return plain(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", counted)
    train_router(mixture, [lines], tmp_path / "out", SHORT)
    assert opened.count("texts.jsonl") == 1


@pytest.mark.parametrize("kind", ["glm4_moe", "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_routers_of_every_stock_mixture_are_trained(kind: str, lines: Path, tmp_path: Path) -> None:
    folder = stock(kind, tmp_path)
    losses: list[float] = []
    done = train_router(
        folder, [lines], tmp_path / "trained", EAGER, told=lambda step, loss, _: losses.append(loss)
    )
    before, after = (load_file(f / "model.safetensors") for f in (folder, done.folder))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"model.layers.{i}.mlp.gate.weight" for i in range(2)}
    assert sum(losses[-10:]) < sum(losses[:10])


def test_the_command_tells_in_one_document_and_refuses_in_one_line(
    command: Callable[..., Ran], mixture: Path, lines: Path, tmp_path: Path
) -> None:
    asked = (
        "train-router",
        mixture,
        "--text",
        lines,
        "--output",
        "out",
        "--steps",
        2,
        "--batch",
        4,
    )
    report = json.loads(command(*asked, "--json").out)
    assert report["steps"] == 2
    assert report["held_out_loss"].keys() == {"before", "after"}
    assert "is this training's result already" in command(*asked).out
    ran = command(*asked, "--lr", "0.5")
    assert ran.code == 2
    assert "--overwrite" in ran.error


# -- parts -------------------------------------------------------------------------------------------


def opened_for_test(folder: Path) -> Running:
    model = open_model(str(folder))
    return opened(model, gates_of(model), "cpu", False)


def test_nothing_but_the_routers_asks_for_gradients(mixture: Path) -> None:
    running = opened_for_test(mixture)
    asking = [name for name, p in running.model.named_parameters() if p.requires_grad]
    assert len(asking) == 2
    assert {id(running.model.get_parameter(name)) for name in asking} == {
        id(p) for p in running.routers.values()
    }


def test_watched_scores_are_those_that_the_model_itself_tells(mixture: Path) -> None:
    running = opened_for_test(mixture)
    ids = torch.tensor([[1, 5, 9, 30], [1, 7, 8, 9]])
    with running.watched() as scores:
        told = running.model(ids, output_router_logits=True).router_logits
        found = scores()
    for ours, theirs in zip(found, told, strict=True):
        torch.testing.assert_close(ours, theirs.reshape(ours.shape))


def test_padding_counts_in_no_loss(mixture: Path, lines: Path) -> None:
    running = opened_for_test(mixture)
    many = [Text("", "a", "x:1"), Text("ab=", "abcabcabcabc", "x:2")]
    rows = encoded(many, running.tokenizer, 64, 2)

    def sums(*chosen: int) -> list[torch.Tensor]:
        batch = batch_of([rows[i] for i in chosen], 0, "cpu")
        with running.watched() as scores, torch.no_grad():
            logits = running.model(batch.ids, attention_mask=batch.kept.long()).logits
            kept = [s[batch.kept.flatten()] for s in scores()]
        return [prediction_loss(logits, batch.targets), *kept]

    both, first, second = sums(0, 1), sums(0), sums(1)
    torch.testing.assert_close(both[0], first[0] + second[0])
    for together, *apart in zip(both[1:], first[1:], second[1:], strict=True):
        torch.testing.assert_close(together, torch.cat(apart))
    assert counted(batch_of(rows, 0, "cpu").targets) == sum(len(r.ids) - r.first for r in rows)


def test_balance_is_one_where_even_and_the_number_of_experts_where_one_gets_all() -> None:
    even = torch.eye(4) * 100  # each expert is chosen by one of four tokens, with probability 1
    kept = torch.ones(4, dtype=torch.bool)
    assert balance_loss([even], kept, 1) == pytest.approx(1.0)
    alone = torch.zeros(4, 4)
    alone[:, 2] = 100
    assert balance_loss([alone], kept, 1) == pytest.approx(4.0)
    # half of the choices are expert 2 at probability 1, half expert 0 (the first of equals) at none
    assert balance_loss([alone], kept, 2) == pytest.approx(2.0)
    assert balance_loss([even, alone], kept, 1) == pytest.approx(2.5)
    assert balance_loss([alone], torch.tensor([True, False, False, False]), 1) == pytest.approx(4.0)


def test_the_size_loss_is_the_squared_log_of_summed_exponentials() -> None:
    kept = torch.tensor([True, True, False])
    scores = torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 0.0]])
    log2 = torch.tensor(2.0).log()
    wanted = (log2**2 + (1 + log2) ** 2) / 2
    torch.testing.assert_close(size_loss([scores], kept), wanted)


def test_a_step_is_a_step_of_adam() -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(3, 5))
    state = State.begun({"x": parameter.detach().clone()}, {})
    adam = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-8)
    for _ in range(20):
        gradient = torch.randn(3, 5)
        parameter.grad = gradient.clone()
        adam.step()
        state.descend({"x": gradient}, 0.01)
    torch.testing.assert_close(state.values["x"], parameter.detach(), rtol=1e-5, atol=1e-6)


def test_every_text_comes_once_a_round_and_a_batch_needs_nothing_before_it() -> None:
    order = Order(10, 4, seed=3)
    batches = [order.at(step) for step in range(5)]  # two rounds
    flat = [i for batch in batches for i in batch]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert [Order(10, 4, seed=3).at(step) for step in (4, 1)] == [batches[4], batches[1]]
    assert [Order(10, 4, seed=4).at(step) for step in range(5)] != batches


def test_equal_texts_are_on_the_same_side_and_about_a_tenth_is_held_out() -> None:
    many = [Text("", f"text {i % 500}", f"x:{i}") for i in range(1000)]
    learned, held = divided(many)
    assert not {t.completion for t in learned} & {t.completion for t in held}
    assert 60 <= len(held) <= 140
    few, one = divided(many[:3])
    assert few
    assert one
    with pytest.raises(RequestError, match="only text"):
        divided([many[0], many[500]])


def test_what_is_given_is_not_predicted_and_a_text_ends_with_its_token() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "evals" / "zoo" / "base")
    asked, plain = Text("sort ba=", "ab", "f:1"), Text("", "ab", "f:2")
    rows = encoded([asked, plain], tokenizer, 64, tokenizer.eos_token_id)
    targets = batch_of(rows, 0, "cpu").targets
    told = [tokenizer.decode(t[t != IGNORED]) for t in targets]
    assert told == ["ab</s>", "ab</s>"]
    assert tokenizer.decode(rows[0].ids) == "<s>sort ba=ab</s>"
    (short,) = encoded([plain], tokenizer, 2, None)
    assert tokenizer.decode(short.ids) == "<s>a"
    with pytest.raises(
        RequestError, match=r"f:1: no token is left to predict: 12 tokens, of which 9 .*--length"
    ):
        encoded([asked], tokenizer, 9, tokenizer.eos_token_id)


def test_texts_are_lines_or_json_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo {\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"prompt": "p=", "completion": "four"}\n')
    found = read_texts([tmp_path / "a.txt", tmp_path / "b.jsonl"])
    assert [(t.prompt, t.completion) for t in found] == [
        ("", "one"),
        ("", "two {"),
        ("", "three"),
        ("p=", "four"),
    ]
    assert found[1].place == f"{tmp_path / 'a.txt'}:3"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no texts"),
        ('{"text": "a"}\n{"txt": "b"}', ":2: holds no text; a line is"),
        ('{"prompt": "a"}', ":1: holds no text; a line is"),
        ('{"prompt": "a", "completion": ""}', ":1: holds no text; a line is"),
        ('{"text": 3}', ":1: holds no text; a line is"),
        ("[]", ":1: holds no text; a line is"),
        ("{", ":1: is not JSON"),
    ],
)
def test_what_is_no_text_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(text)
    with pytest.raises(RequestError) as error:
        read_texts([file])
    assert str(error.value).startswith(str(file))
    assert told in str(error.value)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.txt: cannot be read"):
        read_texts([tmp_path / "none.txt"])
