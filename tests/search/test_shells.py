"""What live models are made with beside their values: the files of their own donor, and no code of others."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from merge.errors import ScoreError
from merge.pipeline import plan_parsed
from merge.plan import Plan
from merge.recipe import parse_recipe
from merge.search.live import Shells
from merge.shipped import shipped

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def plan_of(model: Path) -> Plan:
    return plan_parsed(parse_recipe(yaml.safe_dump({"model": str(model)}), "recipe.yaml"))


def changed(folder: Path, **config: Any) -> Path:
    """The tiny base in that folder, with such values in config.json."""
    shutil.copytree(shipped("evals/zoo/base"), folder)
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(told | config))
    return folder


def test_folders_of_one_name_keep_their_own_files(tmp_path: Path) -> None:
    shells = Shells(torch.float32, "cpu")
    for run in ("a", "b"):
        folder = changed(tmp_path / run / "checkpoint")
        template = TEMPLATE + f"{{# {run} #}}"
        (folder / "chat_template.jinja").write_text(template)
        assert shells.of(plan_of(folder)).tokenizer.chat_template == template


def test_code_of_a_model_is_not_run_whatever_is_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"AutoConfig": "strange.StrangeConfig", "AutoModelForCausalLM": "strange.Strange"}
    folder = changed(tmp_path / "strange", model_type="strange", auto_map=code)
    (folder / "strange.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM as Strange\n"
        f"Path({str(tmp_path / 'ran')!r}).touch()\n"
        "class StrangeConfig(LlamaConfig):\n    model_type = 'strange'\n"
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(ScoreError, match="cannot be made in memory"):
        Shells(torch.float32, "cpu").of(plan_of(folder))
    assert not (tmp_path / "ran").exists()
