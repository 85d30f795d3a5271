"""A mixture loaded by transformers: its routers by their names in the files, and what they say of tokens."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, logsigmoid

from merge.apart import available_memory
from merge.errors import RequestError, VerifyError
from merge.experts.checks.loading import loaded_model
from merge.experts.routers.gates import Gates
from merge.output import shown_bytes
from merge.score import FLOAT32_LIMIT
from merge.sources.model import Model, class_names


@dataclass(frozen=True)
class Running:
    """`routers`: name in the files -> the parameter, which alone asks for gradients."""

    model: Any
    tokenizer: Any
    routers: dict[str, torch.nn.Parameter]
    gates: Gates

    @property
    def padding(self) -> int:
        return self.tokenizer.pad_token_id or 0

    @contextmanager
    def watched(self) -> Iterator[Callable[[], Sequence[Tensor]]]:
        """Within it, a call gives the scores that each router gave to all tokens of the last forward pass:
        [rows * tokens, experts] float32, whose softmax are the probabilities. A bias that counts for
        choosing alone, and groups of experts, are not in them."""
        if self.gates.routed:
            code = sys.modules[type(self.model).__module__]
            self.model.config.output_router_logits = True
            try:
                yield lambda: [s.flatten(0, -2) for s in code.mixture_scores(self.model)]
            finally:
                self.model.config.output_router_logits = False
            return
        seen: dict[str, Tensor] = {}
        hooks = [
            self._owner(weight).register_forward_pre_hook(
                _noting(seen, name, weight, self.gates.sigmoid)
            )
            for name, weight in self.routers.items()
        ]
        try:
            yield lambda: [seen[name] for name in self.routers]
        finally:
            for hook in hooks:
                hook.remove()

    def _owner(self, weight: torch.nn.Parameter) -> Any:
        return next(m for m in self.model.modules() if getattr(m, "weight", None) is weight)


def _noting(
    seen: dict[str, Tensor], name: str, weight: Tensor, sigmoid: bool
) -> Callable[..., None]:
    def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
        scores = linear(inputs[0].flatten(0, -2).float(), weight.float())
        seen[name] = logsigmoid(scores) if sigmoid else scores

    return note


def opened(model: Model, gates: Gates, device: str, trusted: bool) -> Running:
    """The mixture on `device`, without dropout, everything frozen but its routers. Raises RequestError where
    it does not predict tokens, VerifyError where a router is not what the files hold."""
    from transformers import AutoTokenizer

    kind = next(iter(class_names(model.config)), "")
    if not kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise RequestError(
            f"{model.label}: is a {kind or 'model of no class'}; routers are trained on models that predict "
            "the next token"
        )
    _check_memory(model)
    loaded = loaded_model(model.folder, trusted=trusted).to(device)
    if (
        not gates.routed
    ):  # a fused product of experts also computes gradients of their frozen weights
        loaded.set_experts_implementation("eager")
    loaded.requires_grad_(False)
    parameters = dict(loaded.named_parameters())
    routers = {}
    for name, candidates in gates.names.items():
        found = next((parameters[c] for c in candidates if c in parameters), None)
        if found is None:
            raise VerifyError(f"{model.label}: transformers has no place for router {name!r}")
        if not torch.equal(
            found.detach().cpu().float(), _stored(model, name).to(found.dtype).float()
        ):
            raise VerifyError(f"{model.label}: router {name!r} is not loaded as the files hold it")
        routers[name] = found.requires_grad_(True)
    tokenizer = AutoTokenizer.from_pretrained(
        model.folder, local_files_only=True, trust_remote_code=False
    )
    if not tokenizer.is_fast:
        raise RequestError(
            f"{model.folder}: its tokenizer tells no places of tokens in a text; it needs a tokenizer.json"
        )
    return Running(loaded, tokenizer, routers, gates)


def _check_memory(model: Model) -> None:
    infos = model.source.tensors.values()
    needed = sum(info.nbytes for info in infos)
    if needed <= FLOAT32_LIMIT:
        needed = sum(4 * info.rows * info.cols for info in infos)
    if needed > (free := available_memory()):
        raise RequestError(
            f"{model.label}: takes {shown_bytes(needed)} of memory, of which {shown_bytes(free)} are free; "
            "training needs all of it at once"
        )


def _stored(model: Model, name: str) -> Tensor:
    """A tensor of the files in float32."""
    info = model.source.tensors[name]
    rows = model.source.rows(name, 0, info.rows)
    return torch.from_numpy(rows.reshape(info.shape))
