"""The base of a routed mixture may be quantised as it is loaded; adapters and routers stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from routed_models import apart, base, in_one_process, logits, mixture, of, routed, share, three
from transformers import BitsAndBytesConfig

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.mark.parametrize(("bits", "kind"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_experts_on_a_quantised_base_are_what_peft_makes_of_them_there(
    bits: int, kind: str, tmp_path: Path
) -> None:
    """But for DoRA, whose lengths of rows stay those of the base as it was trained."""
    model = base("llama", tmp_path / "base", hidden_size=64, intermediate_size=128)
    adapters = three("llama", model, tmp_path)
    router = {"mode": "weights", "weights": [1, 0, 0], "top_k": 3}
    with in_one_process():
        folder = mixture(tmp_path, model, adapters, router=router)
    options: dict[str, Any] = {
        "quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        "dtype": torch.float32,
        "device_map": {"": "cpu"},
    }
    mixed = routed(folder, **options)
    inner = [m for n, m in mixed.named_modules() if n.endswith("base_layer")]
    assert {type(module).__name__ for module in inner} == {kind}
    assert {p.dtype for n, p in mixed.named_parameters() if "router" in n or "lora" in n} == {
        torch.float32
    }
    for i, name in enumerate(["plain", "stable"]):
        share(mixed, [float(i == other) for other in range(3)])
        wanted = logits(PeftModel.from_pretrained(of(model, **options), adapters[name]).eval())
        assert apart(logits(mixed), wanted) < 1e-5, name
