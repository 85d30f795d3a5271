"""What a plan and a card say of a mixture: its experts, where they come from, how tokens find them."""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from merge.carry import parents_of, resolved
from merge.experts.routing import default_mode
from merge.plan import Plan
from merge.sources.inside import is_routed
from merge.sources.model import class_names
from merge.verify import PROVENANCE

EACH = {"module": "each adapted module", "layer": "each layer", "model": "the model"}
TOP_K = "num_experts_per_tok"


def names_of(plan: Plan) -> list[str]:
    """The experts of the result, in their order."""
    config = plan.config
    told = config.get("mixture") if is_routed(config) else None
    named = told["experts"] if told else config.get("expert_names")
    listed = plan.recipe.sections.experts or ()
    return list(named or (_last(entry.name or entry.label) for entry in listed))


def _last(label: str) -> str:
    return label.rpartition("+")[2].rstrip("/").rpartition("/")[2].rpartition(":")[2]


def told_routing(plan: Plan) -> str:
    """How many experts a token gets, of which routers, in one line."""
    config, section = plan.config, plan.recipe.sections.router
    count = len(names_of(plan))
    told: Mapping[str, Any] = config.get("mixture") or {}
    top_k = told.get("top_k") or config.get(TOP_K) or config.get("top_k_lora") or count
    temperature = told.get("temperature") or (section.temperature if section else 1.0)
    of_stock = "the model" if "adapters" in config else "each layer with experts"
    facts = [f"one for {EACH[told['per']] if told else of_stock}"]
    if mode := default_mode(plan.recipe):
        facts.insert(0, mode)
    if temperature != 1.0:
        facts.append(f"temperature {temperature:g}")
    if not told.get("normalise", config.get("norm_topk_prob", True)):
        facts.append("shares of the chosen experts as they are")
    return f"{top_k} of {count} experts for each token; routers: {', '.join(facts)}"


# -- the card --------------------------------------------------------------------------------------


def mixture_card(plan: Plan) -> str:
    """README.md with the hub's metadata: how the mixture is loaded, its experts, the recipe."""
    names, parents = names_of(plan), parents_of(plan)
    meta = {
        "library_name": "transformers",
        "tags": ["mergetool", "merge", "mixture-of-loras" if is_routed(plan.config) else "moe"],
        "base_model": parents,
        "base_model_relation": "merge",
    }
    recipe = yaml.safe_dump_all(resolved(plan), sort_keys=False, allow_unicode=True)
    title = (
        plan.recipe.sections.name or f"A mixture of {len(names)} expert{'s' * (len(names) != 1)}"
    )
    listed = "\n".join(f"- {name}" for name in parents)
    return (
        f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---\n\n"
        f"# {title}\n\n"
        f"Experts: {', '.join(names)}{_changed(plan)}. {told_routing(plan)}.\n\n"
        f"```python\n{loading_code(plan.config)}```\n\n"
        f"{_about_dora(plan)}"
        f"Made with mergetool as a mixture of experts from\n\n{listed}\n\n"
        f"Recipe:\n\n```yaml\n{recipe}```\n\n"
        f"Digests of all inputs and outputs are in `{PROVENANCE}`; `mergetool verify` compares them.\n"
    )


def _changed(plan: Plan) -> str:
    """Which of the experts are new, where a mixture was changed."""
    sections = plan.recipe.sections
    if not sections.mixture:
        return ""
    count = len(sections.experts or ())
    names = names_of(plan)
    added = f"{', '.join(names[-count:])} added" if count else "none added"
    dropped = f", {', '.join(map(str, sections.drop))} dropped" if sections.drop else ""
    return f" ({added}{dropped}; the others are copies, bit for bit)"


def loading_code(config: Mapping[str, Any]) -> str:
    """How a mixture with that config.json is loaded, as Python."""
    kinds = class_names(config)
    auto = next(
        (
            auto
            for auto, path in (config.get("auto_map") or {}).items()
            # former mixtures may have any keys
            if re.fullmatch(r"AutoModel\w*", auto) and str(path).rpartition(".")[2] in kinds
        ),
        "AutoModelForCausalLM",
    )
    code = ", trust_remote_code=True" if is_routed(config) else ""
    runs = "  # modeling_mixture.py" if code else ""
    asks = ", trust_remote_code=False" if code else ""
    never = "  # else it asks" if code else ""
    return (
        f"from transformers import {auto}, AutoTokenizer\n\n"
        f'model = {auto}.from_pretrained("this/folder"{code}){runs}\n'
        f'tokenizer = AutoTokenizer.from_pretrained("this/folder"{asks}){never}\n'
    )


def _about_dora(plan: Plan) -> str:
    modules = (plan.config.get("mixture") or {}).get("modules") if is_routed(plan.config) else None
    if not any(facts["dora"] for facts in (modules or {}).values()):
        return ""
    return (
        "Some experts are DoRA's. On a base that is quantised as it is loaded, they keep the lengths of rows "
        "that the base had before.\n\n"
    )
