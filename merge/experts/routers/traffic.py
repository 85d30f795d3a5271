"""Where a mixture sends the tokens of texts: how often each expert is chosen, and how probable it is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.anatomy import layer_of
from merge.errors import RequestError, RunError
from merge.experts.names import expert_names
from merge.experts.texts import Text
from merge.sources.inside import is_routed

TOP_K = ("num_experts_per_tok", "moe_k")  # in the config.json of a stock MoE
GATES = ("gate", "router")  # what a stock MoE calls its routers
MOST = 2048  # tokens of a text where the model does not say how many it takes
TOGETHER = 2048  # tokens of texts that run side by side, padding included


@dataclass(frozen=True)
class Load:
    """What routers did with tokens, `tokens` in all (of several routers each counts its own). `chosen`
    [experts] int64: how many each expert was chosen for; `mass` [experts] float64: sums of probabilities."""

    tokens: int
    chosen: NDArray[np.int64]
    mass: NDArray[np.float64]

    def __add__(self, other: "Load") -> "Load":
        return Load(self.tokens + other.tokens, self.chosen + other.chosen, self.mass + other.mass)

    @property
    def share(self) -> NDArray[np.float64]:
        """[experts]: fractions of all places with experts that tokens have; they add up to 1."""
        return self.chosen / max(1, int(self.chosen.sum()))

    @property
    def probability(self) -> NDArray[np.float64]:
        """[experts]: means over tokens; they add up to 1."""
        return self.mass / max(1, self.tokens)

    @property
    def imbalance(self) -> float:
        """The largest share in fair shares: 1 where all experts have the same."""
        return float(self.share.max() * len(self.share))

    @property
    def entropy(self) -> float:
        """Of the shares, in bits: log2(experts) where all have the same, 0 where one has everything."""
        return math.fsum(-p * math.log2(p) for p in self.share.tolist() if p)

    def as_json(self) -> dict[str, Any]:
        return {
            "share": self.share.tolist(),
            "probability": self.probability.tolist(),
            "largest_over_fair": self.imbalance,
            "entropy_bits": self.entropy,
        }


@dataclass(frozen=True)
class Traffic:
    """`loads`: name of a set of texts -> router, by the part of the model that it belongs to -> its load."""

    experts: tuple[str, ...]
    top_k: int
    loads: Mapping[str, Mapping[str, Load]]

    def by_layer(self, texts: str) -> dict[str, Load]:
        """The routers of each layer together; those outside of layers by their own names."""
        found: dict[str, Load] = {}
        for site, load in self.loads[texts].items():
            layer = layer_of(site)
            key = f"layer {layer[1]}" if layer else site
            found[key] = found[key] + load if key in found else load
        return found

    def tokens(self, texts: str) -> int:
        """How many tokens the texts have."""
        return max(load.tokens for load in self.loads[texts].values())

    def whole(self, texts: str) -> Load:
        """All routers together."""
        first, *rest = self.loads[texts].values()
        return sum(rest, first)

    def as_json(self) -> dict[str, Any]:
        return {
            "experts": list(self.experts),
            "top_k": self.top_k,
            "texts": [
                {
                    "name": name,
                    "tokens": self.tokens(name),
                    "all": self.whole(name).as_json(),
                    "layers": {k: v.as_json() for k, v in self.by_layer(name).items()},
                    "routers": {k: v.as_json() for k, v in loads.items()},
                }
                for name, loads in self.loads.items()
            ],
        }


def traffic_of(
    folder: Path,
    texts: Mapping[str, Sequence[Text]],
    *,
    trusted: bool = False,
    progress: Callable[[int], None] = lambda _: None,
) -> Traffic:
    """What the routers of the mixture in `folder` do with sets of texts, each in full or up to the model's
    last position. Texts of about one length run side by side.

    trusted: modelling code of the folder may run that is not ours. Raises RequestError where there are no
    routers, RunError where the model does not run.
    """
    from merge.experts.checks.loading import loaded_model

    model = loaded_model(folder, trusted=trusted)
    routers, top_k = routers_of(model, folder), _top_k(model)
    encoded = _encoder(folder, model)
    loads = {}
    for name, listed in texts.items():
        with _watching(routers, top_k) as watched:
            for batch in _batches([encoded(text) for text in listed], model):
                _run(model, watched, batch, [text.place for text in listed])
                progress(len(batch))
        loads[name] = found = watched.loads
    count = len(next(iter(found.values())).share)
    return Traffic(tuple(expert_names(folder, count)), top_k, loads)


# -- watching --------------------------------------------------------------------------------------


def routers_of(model: Any, folder: Path) -> dict[str, Any]:
    """The routers of a mixture loaded from `folder`, by the part of the model that they belong to; raises
    RequestError where there are none.

    Of a mixture of adapters the shipped code's; of a stock MoE what is called as routers are, beside experts.
    """
    named = dict(model.named_modules())
    if is_routed({"model_type": model.config.model_type}):
        found = {name for name, module in named.items() if type(module).__name__ == "Router"}
    else:
        places = (name.rpartition(".") for name in named)
        found = {
            f"{at}.{leaf}" for at, _, leaf in places if leaf in GATES and f"{at}.experts" in named
        }
    if not found:
        raise RequestError(
            f"{folder}: is a {model.config.model_type}, which is no mixture; none of its parts is a router"
        )
    return {name.rpartition(".")[0]: named[name] for name in named if name in found}


@dataclass
class _Watched:
    """`loads`: what the routers have done, by the part of the model; `kept`: which tokens of a batch count,
    [rows * tokens] bool."""

    loads: dict[str, Load]
    kept: Any = None


@contextmanager
def _watching(routers: Mapping[str, Any], top_k: int) -> Iterator[_Watched]:
    """What the routers do while in here."""
    watched = _Watched({})

    def note(site: str) -> Callable[..., None]:
        def hook(module: Any, _: Any, output: Any) -> None:
            load = _load_of(module, output, top_k, watched.kept)
            before = watched.loads.get(site)
            watched.loads[site] = before + load if before else load

        return hook

    handles = [router.register_forward_hook(note(site)) for site, router in routers.items()]
    try:
        yield watched
    finally:
        for handle in handles:
            handle.remove()


def _load_of(module: Any, output: Any, top_k: int, kept: Any) -> Load:
    """By what a router gave back: scores [..., experts], in a stock MoE of transformers 5 also the experts
    that it chose, as whole numbers. DeepSeek's later ones score each expert by a sigmoid of its own. kept:
    [tokens] bool, others do not count."""
    import torch

    parts = output if isinstance(output, tuple) else (output,)
    scores = parts[0].detach().float()
    scores = scores.reshape(-1, scores.shape[-1])[kept]
    if hasattr(module, "e_score_correction_bias"):
        shares = scores.sigmoid()
        shares = shares / shares.sum(-1, keepdim=True)
    else:
        shares = scores.softmax(-1)
    told = [part for part in parts[1:] if not part.is_floating_point()]
    chosen = (
        told[0].reshape(len(kept), -1)[kept]
        if told
        else shares.topk(min(top_k, shares.shape[-1]), dim=-1).indices
    )
    counts = torch.bincount(chosen.reshape(-1), minlength=shares.shape[-1])
    return Load(len(scores), counts.cpu().numpy(), shares.double().sum(0).cpu().numpy())


def _top_k(model: Any) -> int:
    """How many experts a token gets."""
    mixture = getattr(model.config, "mixture", None)
    told = mixture.get("top_k") if isinstance(mixture, dict) else None
    config = model.config.get_text_config()
    found = (getattr(config, key, None) for key in TOP_K)
    return int(told or next(filter(None, found), 1))


# -- running ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Texts:
    """Some of a set of texts side by side: their numbers; `ids`, `kept`: [rows, longest], padded on the
    right, where kept is False."""

    numbers: Sequence[int]
    ids: Any
    kept: Any

    def __len__(self) -> int:
        return len(self.numbers)

    def alone(self, row: int) -> "_Texts":
        return _side_by_side(
            [self.numbers[row]], {self.numbers[row]: self.ids[row][self.kept[row]].tolist()}
        )


def _batches(rows: Sequence[Sequence[int]], model: Any) -> Iterator[_Texts]:
    """All texts, those of one length beside one another; each alone where a model may see padding."""
    alone = bool(getattr(model.config, "is_encoder_decoder", False))
    known = dict(enumerate(rows))
    group: list[int] = []
    for number in sorted(known, key=lambda number: len(known[number])):
        if group and (alone or (len(group) + 1) * len(known[number]) > TOGETHER):
            yield _side_by_side(group, known)
            group = []
        group.append(number)
    if group:
        yield _side_by_side(group, known)


def _side_by_side(numbers: Sequence[int], rows: Mapping[int, Sequence[int]]) -> _Texts:
    import torch

    longest = max(len(rows[number]) for number in numbers)
    ids = torch.zeros((len(numbers), longest), dtype=torch.long)
    kept = torch.zeros_like(ids, dtype=torch.bool)
    for row, number in enumerate(numbers):
        ids[row, : len(rows[number])] = torch.tensor(rows[number])
        kept[row, : len(rows[number])] = True
    return _Texts(list(numbers), ids, kept)


def _encoder(folder: Path, model: Any) -> Callable[[Text], list[int]]:
    """Text -> ids, at most as many as the model has positions."""
    from transformers import AutoTokenizer

    from merge.experts.checks.loading import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever a strange file makes the library raise
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"{folder}: its tokenizer cannot be loaded: {reason}") from None
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MOST

    def encoded(text: Text) -> list[int]:
        ids: list[int] = tokenizer(text.whole, truncation=True, max_length=most).input_ids
        if not ids:
            raise RequestError(f"{text.place}: gives no token; leave it out")
        return ids

    return encoded


def _run(model: Any, watched: _Watched, batch: _Texts, places: Sequence[str]) -> None:
    """Raises RunError, which names the text that does not run."""
    import torch

    before = dict(watched.loads)
    watched.kept = batch.kept.flatten()
    try:
        with torch.no_grad():
            mask = (
                {}
                if bool(batch.kept.all())
                else {"attention_mask": batch.kept.long().to(model.device)}
            )
            model(input_ids=batch.ids.to(model.device), **mask)
    except Exception as error:  # whatever a modelling file raises
        watched.loads = before
        if len(batch) > 1:
            for row in range(len(batch)):
                _run(model, watched, batch.alone(row), places)
            return
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"{places[batch.numbers[0]]}: the model does not run on it: {reason}"
        ) from None
