"""Where a mixture sends the tokens of texts: how often each expert is chosen, and how probable it is."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.anatomy import layer_of
from merge.errors import RequestError, RunError, WriteError
from merge.experts.names import expert_names
from merge.experts.texts import Text
from merge.sources.inside import is_routed

TOP_K = ("num_experts_per_tok", "moe_k")  # in the config.json of a stock MoE
GATES = ("gate", "router")  # what a stock MoE calls its routers
MOST = 2048  # tokens of a text where the model does not say how many it takes


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
    """What the routers of the mixture in `folder` do with sets of texts, each text run alone, in full or up
    to the model's last position.

    trusted: modelling code of the folder may run that is not ours. Raises RequestError where there are no
    routers, RunError where the model does not run.
    """
    from merge.experts.loading import loaded_model

    model = loaded_model(folder, trusted=trusted)
    routers, top_k, encoded = routers_of(model), _top_k(model), _encoder(folder, model)
    loads = {}
    for name, listed in texts.items():
        with _watching(routers, top_k) as found:
            for text in listed:
                _run(model, encoded(text), text.place)
                progress(1)
        loads[name] = found
    count = len(next(iter(found.values())).share)
    return Traffic(tuple(expert_names(folder, count)), top_k, loads)


# -- watching --------------------------------------------------------------------------------------


def routers_of(model: Any) -> dict[str, Any]:
    """The routers of a loaded mixture, by the part of the model that they belong to; raises RequestError
    where there are none.

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
            f"{model.config.model_type}: is no mixture; none of its parts is a router"
        )
    return {name.rpartition(".")[0]: named[name] for name in named if name in found}


@contextmanager
def _watching(routers: Mapping[str, Any], top_k: int) -> Iterator[dict[str, Load]]:
    """A table that fills with what the routers do while in here."""
    loads: dict[str, Load] = {}

    def note(site: str) -> Callable[..., None]:
        def hook(module: Any, _: Any, output: Any) -> None:
            load = _load_of(module, output, top_k)
            loads[site] = loads[site] + load if site in loads else load

        return hook

    handles = [router.register_forward_hook(note(site)) for site, router in routers.items()]
    try:
        yield loads
    finally:
        for handle in handles:
            handle.remove()


def _load_of(module: Any, output: Any, top_k: int) -> Load:
    """By what a router gave back: scores [..., experts], in a stock MoE of transformers 5 also the experts
    that it chose, as whole numbers. DeepSeek's later ones score each expert by a sigmoid of its own."""
    import torch

    parts = output if isinstance(output, tuple) else (output,)
    scores = parts[0].detach().float()
    scores = scores.reshape(-1, scores.shape[-1])
    if hasattr(module, "e_score_correction_bias"):
        shares = scores.sigmoid()
        shares = shares / shares.sum(-1, keepdim=True)
    else:
        shares = scores.softmax(-1)
    told = [part for part in parts[1:] if not part.is_floating_point()]
    chosen = told[0] if told else shares.topk(min(top_k, shares.shape[-1]), dim=-1).indices
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


def _encoder(folder: Path, model: Any) -> Callable[[Text], Any]:
    """Text -> ids [1, tokens], at most as many as the model has positions."""
    from transformers import AutoTokenizer

    from merge.experts.loading import quiet

    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # whatever a strange file makes the library raise
        reason = " ".join(str(error).split())[:200]
        raise RequestError(f"{folder}: its tokenizer cannot be loaded: {reason}") from None
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or MOST

    def encoded(text: Text) -> Any:
        ids = tokenizer(text.whole, return_tensors="pt", truncation=True, max_length=most).input_ids
        if not ids.numel():
            raise RequestError(f"{text.place}: gives no token; leave it out")
        return ids

    return encoded


def _run(model: Any, ids: Any, place: str) -> None:
    import torch

    try:
        with torch.no_grad():
            model(input_ids=ids.to(model.device))
    except Exception as error:  # whatever a modelling file raises
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{place}: the model does not run on it: {reason}") from None


# -- showing ---------------------------------------------------------------------------------------


def tables(traffic: Traffic) -> str:
    """Sets of texts side by side, then the layers of each: per cent of the places with experts that tokens
    have, and in brackets the mean probability."""
    names, count = list(traffic.loads), len(traffic.experts)
    heads = [*traffic.experts, "largest/fair", "entropy"]
    whole = [[*_told(n, traffic.whole(n)), str(traffic.tokens(n))] for n in names]
    out = [
        f"per cent of the places that tokens have with experts, {traffic.top_k} of {count} for each router, "
        "and the mean probability in brackets",
        "",
        *_aligned([["texts", *heads, "tokens"], *whole]),
    ]
    for name in names:
        rows = [_told(layer, load) for layer, load in traffic.by_layer(name).items()]
        out += ["", *_aligned([[name, *heads], *rows])]
    return "\n".join(out)


def _told(name: str, load: Load) -> list[str]:
    cells = [
        f"{100 * share:.1f} ({100 * probability:.1f})"
        for share, probability in zip(load.share, load.probability, strict=True)
    ]
    return [name, *cells, f"{load.imbalance:.2f}", f"{load.entropy:.2f} bits"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def check_plot(file: Path) -> None:
    """Raises RequestError where no picture can be drawn into `file`."""
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib; install mergetool[plots]")
    if not file.absolute().parent.is_dir():
        raise RequestError(f"--plot {file}: no such folder; choose one that is there")


def draw(traffic: Traffic, file: Path) -> None:
    """Writes a heat map as PNG: of each set of texts the share that every expert has in every layer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, layers = list(traffic.loads), list(traffic.by_layer(next(iter(traffic.loads))))
    width, height = 1.5 + len(names) * (1 + 0.5 * len(traffic.experts)), 1.8 + 0.28 * len(layers)
    figure = Figure(figsize=(max(4.0, width), max(3.0, height)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(names), squeeze=False, sharey=True)[0]
    for axis, name in zip(axes, names, strict=True):
        shares = np.array([load.share for load in traffic.by_layer(name).values()])
        image = axis.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set_title(name)
        axis.set_xticks(range(len(traffic.experts)), traffic.experts, rotation=60, ha="right")
        axis.set_yticks(range(len(layers)), layers)
    figure.colorbar(image, ax=list(axes), label="share")
    try:
        figure.savefig(file, format="png", dpi=120)
    except OSError as error:
        raise WriteError(f"{file}: cannot be written: {error.strerror}") from None
