"""What the training of routers makes small: the loss of predicted tokens, uneven use, large scores."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from merge.experts.training.batches import IGNORED


def prediction_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed cross-entropy of the tokens that count, float32. logits: [rows, tokens, vocabulary]; targets:
    [rows, tokens], each token itself, so that the logits before it predict it."""
    scores, wanted = logits[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten()
    return cross_entropy(scores, wanted, ignore_index=IGNORED, reduction="sum")


def counted(targets: Tensor) -> int:
    """How many tokens count."""
    return int((targets[:, 1:] != IGNORED).sum())


def balance_loss(scores: Sequence[Tensor], kept: Tensor, top_k: int) -> Tensor:
    """The mean over routers of E Σ f_i p_i (arXiv 2101.03961): of E experts, f_i is the share of choices that
    fall on expert i and p_i its mean probability. 1 where both are even, E where one expert gets all.

    scores: [tokens, experts] float32 of each router. kept: [tokens] bool; others do not count.
    """
    return torch.stack([_unevenness(s[kept], top_k) for s in scores]).mean()


def _unevenness(scores: Tensor, top_k: int) -> Tensor:
    experts = scores.shape[-1]
    chosen = scores.topk(min(top_k, experts), dim=-1).indices
    share = one_hot(chosen, experts).float().mean(dim=(0, 1))
    return experts * (share * scores.softmax(-1).mean(0)).sum()


def size_loss(scores: Sequence[Tensor], kept: Tensor) -> Tensor:
    """The mean over routers and tokens of log(Σ exp score)², which keeps scores small (arXiv 2202.08906)."""
    return torch.stack([s[kept].logsumexp(-1).square().mean() for s in scores]).mean()
