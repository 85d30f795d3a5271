"""The modelling file that a mixture of adapters brings along, and what config.json says of it."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.experts.lora.classes import Classes

FILE = "modeling_mixture.py"
ROUTED, OF_TYPE = "Routed", "routed_"
APART = ("rope_theta", "partial_rotary_factor")  # of the table of rope, beside it in transformers 4
FACTORS = ("short_factor", "long_factor")
VERBATIM = ("TokenizersBackend", "PreTrainedTokenizerFast")  # tokenizer.json as it stands
BACKEND = "PreTrainedTokenizerFast"  # its name that transformers 4 knows too
IMPORTS = re.compile(r"^from transformers import (\w+(?:, \w+)*)$", re.MULTILINE)
# SHA-256 of shipped/modeling_mixture.py in every version that was released, and in this one: their code runs
# unasked. A digest is taken out only where a version must not be run any more.
SHIPPED = ("c5cf57bd8f12cc4b885c6e02e5518081213fcc8527bb17f7a41fb6b8e97002c0",)
CONFIG = """

class {routed}({base}):
    model_type = "{kind}"
"""
MODEL = """

class {routed}({base}):
    config_class = {config}

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        route(self, config)
"""


def modelling_file(classes: Classes, model_type: str) -> bytes:
    """The file's bytes for a base of these classes, of model_type `model_type`."""
    models = dict.fromkeys([*classes.kinds.values(), classes.model])
    return _file(classes.config, tuple(models), model_type)


def told_classes(classes: Classes, model_type: str) -> dict[str, Any]:
    """The entries of config.json that lead to the file."""
    kinds = {"AutoConfig": classes.config, **classes.kinds}
    return {
        "model_type": OF_TYPE + model_type,
        "architectures": [ROUTED + classes.model],
        "auto_map": {kind: f"{Path(FILE).stem}.{ROUTED}{name}" for kind, name in kinds.items()},
    }


def is_own(content: bytes, config: Mapping[str, Any]) -> bool:
    """Whether a modelling file is, byte for byte, what a version of mergetool writes for some base, and
    `config`, of the same folder, leads to nothing else."""
    found = IMPORTS.findall(content.decode("utf-8", "replace"))
    names, kind = found[-1].split(", ") if found else [], str(config.get("model_type"))
    if len(names) < 2 or not re.fullmatch(rf"{OF_TYPE}[\w-]+", kind):
        return False
    known = {f"{Path(FILE).stem}.{ROUTED}{name}" for name in names}
    led = config.get("auto_map")
    if not isinstance(led, dict) or not known.issuperset(map(str, led.values())):
        return False
    tail = _tail(names[0], tuple(names[1:]), kind.removeprefix(OF_TYPE))
    core = content.removesuffix(tail)
    return core != content and hashlib.sha256(core).hexdigest() in SHIPPED


def core_file() -> bytes:
    """What is the same in all modelling files of this version."""
    return (Path(__file__).parent / "shipped" / FILE).read_bytes()


def _file(config: str, models: tuple[str, ...], model_type: str) -> bytes:
    return core_file() + _tail(config, models, model_type)


def _tail(config: str, models: tuple[str, ...], model_type: str) -> bytes:
    """The classes for one base."""
    routed = ROUTED + config
    tail = f"\n\nfrom transformers import {', '.join((config, *models))}\n"
    tail += CONFIG.format(routed=routed, base=config, kind=OF_TYPE + model_type)
    for model in models:
        tail += MODEL.format(routed=ROUTED + model, base=model, config=routed)
    return tail.encode()


def with_older_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with what transformers 4 calls rope_theta and rope_scaling, where it has only the one table
    that transformers 5 writes; both read the result alike."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        return dict(config)
    older = {key: rope[key] for key in APART if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in APART}
    kind = scaling.get("rope_type")
    if kind == "longrope":  # transformers 4 knows the rest from elsewhere, and allows no more
        older["rope_scaling"] = {"type": kind} | {k: scaling[k] for k in FACTORS if k in scaling}
    elif kind not in (None, "default"):
        older["rope_scaling"] = scaling
    return older | dict(config)


def with_tokenizer(settings: bytes, wanted: str) -> bytes:
    """tokenizer_config.json that names the class `wanted`: transformers goes by model_type for the base, and
    knows none of a mixture."""
    table = json.loads(settings)
    wanted = BACKEND if wanted in VERBATIM else wanted
    if str(table.get("tokenizer_class")).removesuffix("Fast") == wanted.removesuffix("Fast"):
        return settings
    table["tokenizer_class"] = wanted
    return (json.dumps(table, indent=2, ensure_ascii=False) + "\n").encode()
