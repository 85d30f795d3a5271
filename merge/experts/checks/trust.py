"""Which modelling code of a model folder may run: what mergetool writes, and nothing else unasked."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merge.errors import RequestError
from merge.sources.inside import is_routed
from merge.sources.model import ADAPTER, read_json

CODE = "modeling_mixture.py"
# what leads transformers to other code as it loads a model whose code is trusted: code of its own for
# generating, and an adapter, which may name another folder as its base
ASTRAY = ("custom_generate", ADAPTER)


def may_run_code(folder: Path, *, trusted: bool = False) -> bool:
    """Whether transformers is to run the modelling code in `folder` (its trust_remote_code): only that of a
    mixture of adapters, where it is ours.

    trusted: the user wants it, whatever it is. Raises RequestError where it is needed and is not ours.
    """
    if trusted:
        return True
    config = read_json(folder / "config.json")
    if not is_routed(config):
        return False
    if not is_own_code(folder, config):
        strange = next((name for name in ASTRAY if (folder / name).exists()), CODE)
        raise RequestError(
            f"{folder / strange}: is not what this version of mergetool writes or knows, so it is not run; "
            "read it, then give --trust-remote-code, or make the mixture again"
        )
    return True


def is_own_code(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the modelling code of a mixture is byte for byte what a version of mergetool writes, its
    config.json leads to nothing else, and no other code would run."""
    from merge.experts.lora.modelling import is_own

    try:
        content = (folder / CODE).read_bytes()
    except OSError:
        return False
    return is_own(content, config) and not any((folder / name).exists() for name in ASTRAY)
