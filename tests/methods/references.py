"""Every method once more, written from its paper for whole tensors in float64; slow and plain."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merge.numerics import Counter, random_key

Tensor = NDArray[np.float64]
Reference = Callable[..., Tensor]


def linear(
    x: list[Tensor], base: Tensor | None, name: str, *, weight: list[float], normalize: bool
) -> Tensor:
    total = sum(w * m for w, m in zip(weight, x, strict=True))
    return np.asarray(total / sum(weight) if normalize else total)


def passthrough(x: list[Tensor], base: Tensor | None, name: str, *, scale: list[float]) -> Tensor:
    return x[0] * scale[0]


def slerp(x: list[Tensor], base: Tensor | None, name: str, *, t: float) -> Tensor:
    """Shoemake's formula on the flattened tensors; the chord where they are parallel."""
    a, b = (m.ravel() for m in x)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = a @ b / norms if norms else 1.0
    if abs(cosine) > 0.9995:
        return ((1 - t) * a + t * b).reshape(x[0].shape)
    angle = np.arccos(cosine)
    out = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.asarray(out.reshape(x[0].shape))


def task_arithmetic(
    x: list[Tensor], base: Tensor, name: str, *, weight: list[float], normalize: bool, **rest: Any
) -> Tensor:
    divisor = sum(map(abs, weight)) if normalize else 1.0
    total = sum(w * (m - base) for w, m in zip(weight, x, strict=True))
    return np.asarray(base + rest["lambda"] * total / (divisor or 1.0))


def trimmed(delta: Tensor, density: float) -> Tensor:
    """The k largest magnitudes, k = floor(density n), with everything equal to the smallest of them."""
    k = max(1, int(density * delta.size))
    threshold = np.sort(np.abs(delta).ravel())[-k]
    return np.where(np.abs(delta) >= threshold, delta, 0.0)


def elect_and_merge(
    deltas: list[Tensor], *, weight: list[float], normalize: bool, **rest: Any
) -> Tensor:
    """Sections 3.2 and 3.3 of the TIES paper, with a weight per model."""
    votes = (
        [w * d for w, d in zip(weight, deltas, strict=True)]
        if rest["weights_in_election"]
        else deltas
    )
    sign = np.sign(sum(votes))
    total, divisor = np.zeros_like(deltas[0]), np.zeros_like(deltas[0])
    for vote, delta, w in zip(votes, deltas, weight, strict=True):
        agree = (np.sign(vote) == sign) & (sign != 0)
        total += np.where(agree, w * delta, 0.0)
        divisor += np.where(agree, w if rest["signed_divisor"] else abs(w), 0.0)
    if normalize:
        total = np.divide(total, divisor, out=total, where=np.abs(divisor) > 1e-8)
    return rest["lambda"] * total


def ties(x: list[Tensor], base: Tensor, name: str, *, density: list[float], **rest: Any) -> Tensor:
    # the engine's task vectors are float32, so which magnitudes are equal is decided there
    deltas = [(m.astype(np.float32) - base.astype(np.float32)).astype(np.float64) for m in x]
    kept = [trimmed(d, p) for d, p in zip(deltas, density, strict=True)]
    return np.asarray(base + elect_and_merge(kept, **rest))


def dropped(
    x: list[Tensor], base: Tensor, name: str, density: list[float], rescale: bool, seed: int
) -> list[Tensor]:
    """Section 3.1 of the DARE paper with the documented masks: kept where random < density 2**32."""
    out = []
    for i, (model, p) in enumerate(zip(x, density, strict=True)):
        counter = Counter.of(0, (1, model.size))
        random = counter.random(random_key(seed, name, i)).reshape(model.shape)
        mask = random < p * 2**32 if p < 1 else np.ones(model.shape, bool)
        out.append(np.where(mask, model - base, 0.0) / (p if rescale else 1.0))
    return out


def dare_linear(
    x: list[Tensor], base: Tensor, name: str, *, weight: list[float], density: list[float],
    normalize: bool, rescale: bool, seed: int, **rest: Any,
) -> Tensor:  # fmt: skip
    kept = [d + base for d in dropped(x, base, name, density, rescale, seed)]
    return task_arithmetic(kept, base, name, weight=weight, normalize=normalize, **rest)


def dare_ties(
    x: list[Tensor],
    base: Tensor,
    name: str,
    *,
    density: list[float],
    rescale: bool,
    seed: int,
    **rest: Any,
) -> Tensor:
    kept = dropped(x, base, name, density, rescale, seed)
    return np.asarray(base + elect_and_merge(kept, **rest))


def crumbs(x: list[Tensor], base: Tensor, density: list[float], gamma: list[float]) -> list[Tensor]:
    """Section 3 of the Breadcrumbs paper: what is left between the two masks, ties included."""
    out = []
    for model, d, g in zip(x, density, gamma, strict=True):
        # which magnitudes are equal is decided in the engine's float32
        delta = (model.astype(np.float32) - base.astype(np.float32)).astype(np.float64)
        sizes = np.sort(np.abs(delta).ravel())[::-1]
        kept = max(1, int(d * delta.size))
        above = min(int(g * delta.size), delta.size - kept)
        stays = (np.abs(delta) <= sizes[above]) & (np.abs(delta) >= sizes[above + kept - 1])
        out.append(np.where(stays, delta, 0.0))
    return out if any(d < 1 for d in density) else [m - base for m in x]


def breadcrumbs(
    x: list[Tensor], base: Tensor, name: str, *, density: list[float], gamma: list[float], **rest: Any
) -> Tensor:  # fmt: skip
    kept = [d + base for d in crumbs(x, base, density, gamma)]
    return task_arithmetic(kept, base, name, **rest)


def breadcrumbs_ties(
    x: list[Tensor], base: Tensor, name: str, *, density: list[float], gamma: list[float], **rest: Any
) -> Tensor:  # fmt: skip
    return np.asarray(base + elect_and_merge(crumbs(x, base, density, gamma), **rest))


def chances(delta: Tensor, density: float, epsilon: float) -> Tensor:
    """Section 3.1 of the DELLA paper in terms of keeping: rank in the row, equal magnitudes by their
    mean; which are equal is decided in the engine's float32."""
    sizes = np.abs(delta.astype(np.float32))
    below = (sizes[:, None, :] < sizes[:, :, None]).sum(axis=2)
    upto = (sizes[:, None, :] <= sizes[:, :, None]).sum(axis=2)
    share = (below + upto - 1) / 2 / (delta.shape[1] - 1)
    return np.asarray(density - epsilon + 2 * epsilon * share)


def pruned(
    x: list[Tensor], base: Tensor, name: str, density: list[float], epsilon: list[float],
    rescale: bool, seed: int,
) -> list[Tensor]:  # fmt: skip
    out = []
    for i, (model, p, e) in enumerate(zip(x, density, epsilon, strict=True)):
        delta = model - base
        if p < 1:
            chance = chances(delta, p, e)
            random = Counter.of(0, (1, model.size)).random(random_key(seed, name, i))
            kept = random.reshape(model.shape) < chance * 2**32
            delta = np.where(kept, delta, 0.0) / (chance if rescale else 1.0)
        out.append(delta)
    return out


def della(
    x: list[Tensor], base: Tensor, name: str, *, density: list[float], epsilon: list[float],
    rescale: bool, seed: int, **rest: Any,
) -> Tensor:  # fmt: skip
    kept = pruned(x, base, name, density, epsilon, rescale, seed)
    return np.asarray(base + elect_and_merge(kept, **rest))


def della_linear(
    x: list[Tensor], base: Tensor, name: str, *, density: list[float], epsilon: list[float],
    rescale: bool, seed: int, **rest: Any,
) -> Tensor:  # fmt: skip
    kept = [d + base for d in pruned(x, base, name, density, epsilon, rescale, seed)]
    return task_arithmetic(kept, base, name, **rest)


def sce(
    x: list[Tensor], base: Tensor, name: str, *, select_topk: float, uniform_below: float
) -> Tensor:
    """Section 3.3 of the FuseChat paper: select, calculate, erase; then, as mergekit does, divided by
    the weights of the models that are left."""
    deltas = np.stack([m.astype(np.float32) - base.astype(np.float32) for m in x]).astype(float)
    if select_topk < 1:
        variance = deltas.var(axis=0)
        variance[(deltas == deltas[0]).all(axis=0)] = 0.0
        k = int(select_topk * np.count_nonzero(variance))
        least = np.sort(variance.ravel())[-k] if k else np.inf
        deltas *= variance >= least * (1 - 1e-6)  # equal ones, differently rounded
    energies = (deltas**2).mean(axis=(1, 2))
    uniform = energies.sum() < uniform_below
    weights = np.full(len(x), 1 / len(x)) if uniform else energies / (energies.sum() or 1.0)
    sign = np.sign(deltas.sum(axis=0))
    agree = (np.sign(deltas) == sign) & (sign != 0)
    shares = weights[:, None, None] * agree
    divisor = shares.sum(axis=0)
    return np.asarray(base + (shares * deltas).sum(axis=0) / np.where(divisor > 0, divisor, 1.0))


def ram(x: list[Tensor], base: Tensor, name: str, *, epsilon: float) -> Tensor:
    return ramplus_tl(x, base, name, r=0.0, alpha=0.0, epsilon=epsilon)


def ramplus_tl(
    x: list[Tensor], base: Tensor, name: str, *, r: float, alpha: float, epsilon: float
) -> Tensor:
    """The RAM paper's three kinds of positions, one after the other."""
    deltas = [(m.astype(np.float32) - base.astype(np.float32)).astype(float) for m in x]
    changes = np.stack([np.abs(d) > np.float32(epsilon) for d in deltas])
    count = changes.sum(axis=0)
    merged = np.zeros_like(base)
    for delta, change in zip(deltas, changes, strict=True):
        shared, alone = change & (count > 1), change & (count == 1)
        rho = shared.sum() / alone.sum() if alone.any() else np.inf * (shared.any() or np.nan)
        scale = 1 + r * np.clip(np.nan_to_num(rho, posinf=alpha), 0, alpha)
        merged[shared] += delta[shared] / count[shared]
        merged[alone] += scale * delta[alone]
    return np.asarray(base + merged)


def arcee_fusion(x: list[Tensor], base: Tensor | None, name: str) -> Tensor:
    """Importance scoring, dynamic threshold, selective integration, as Arcee describe them."""
    origin, model = x
    p, q = (np.exp(m) / np.exp(m).sum(axis=1, keepdims=True) for m in (model, origin))
    importance = np.abs(model - origin) * (p * np.log(p / q)).sum(axis=1, keepdims=True)
    ordered = np.sort(importance.ravel())
    low, median, high = (ordered[int(f * (ordered.size - 1))] for f in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), model, origin)


def by_rows(reference: Callable[..., Tensor], x: list[Tensor], base: Tensor | None) -> Tensor:
    """A whole-tensor reference on each row alone."""
    rows = []
    for i in range(len(x[0])):
        origin = None if base is None else base[i : i + 1]
        rows.append(reference([m[i : i + 1] for m in x], origin))
    return np.concatenate(rows)


def model_stock(x: list[Tensor], base: Tensor, name: str, *, filter_wise: bool = False) -> Tensor:
    """Equation 4 of the Model Stock paper, its angle averaged over all pairs."""
    if filter_wise:
        return by_rows(lambda *row: model_stock(*row, name), x, base)
    deltas = [(m - base).ravel() for m in x]
    units = [d / np.linalg.norm(d) for d in deltas]
    n = len(x)
    cosine = np.mean([units[i] @ units[j] for i in range(n) for j in range(i)])
    t = n * cosine / (1 + (n - 1) * cosine)
    return np.asarray(base + t * np.mean(deltas, axis=0).reshape(base.shape))


def karcher(
    x: list[Tensor], base: Tensor | None, name: str, *, max_iter: int, tol: float
) -> Tensor:
    """Gradient steps on the sphere with the vectors themselves."""
    norms = [np.linalg.norm(m) for m in x]
    units = [m.ravel() / n for m, n in zip(x, norms, strict=True)]
    mean = np.sum(units, axis=0)
    mean /= np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            angle = np.arccos(np.clip(unit @ mean, -1, 1))
            tangent = unit - (unit @ mean) * mean
            length = np.linalg.norm(tangent)
            step += angle * tangent / length / len(x) if length > 1e-12 else 0.0
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
    return np.asarray(np.mean(norms) * mean.reshape(x[0].shape))


def nearswap(x: list[Tensor], base: Tensor, name: str, *, t: float) -> Tensor:
    """(1 - w) base + w x with w = t / |x - base|, at most 1."""
    delta = x[0] - base
    weight = np.minimum(1.0, t / np.maximum(np.abs(delta), 1e-300))
    return np.asarray((1 - weight) * base + weight * x[0])


def nuslerp(
    x: list[Tensor], base: Tensor | None, name: str, *, weight: list[float],
    nuslerp_flatten: bool, nuslerp_row_wise: bool = False,
) -> Tensor:  # fmt: skip
    if nuslerp_row_wise and not nuslerp_flatten:
        turned = (None if base is None else base.T, name)
        return nuslerp([m.T for m in x], *turned, weight=weight, nuslerp_flatten=False).T
    if not nuslerp_flatten:
        options: dict[str, Any] = {"weight": weight, "nuslerp_flatten": True}
        return by_rows(lambda *row: nuslerp(*row, name, **options), x, base)
    origin = np.zeros_like(x[0]) if base is None else base
    a, b = ((m - origin).ravel() for m in x)
    t = weight[1] / sum(weight)
    angle = np.arccos(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
    point = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    return np.asarray(origin + point.reshape(x[0].shape))


def multislerp(
    x: list[Tensor], base: Tensor | None, name: str, *, weight: list[float],
    normalize_weights: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Mean direction of unit vectors times the mean of the lengths."""
    origin = np.zeros_like(x[0]) if base is None else base
    shares = np.array(weight) / (sum(weight) if normalize_weights else 1.0)
    vectors = [(m - origin).ravel() for m in x]
    norms = [np.linalg.norm(v) for v in vectors]
    mean = sum(w * v / n for w, v, n in zip(shares, vectors, norms, strict=True))
    mean = mean / np.linalg.norm(mean) * (shares @ norms)
    return np.asarray(origin + mean.reshape(x[0].shape))


REFERENCES: Mapping[str, Reference] = {
    f.__name__: f
    for f in (
        linear,
        passthrough,
        slerp,
        task_arithmetic,
        ties,
        dare_linear,
        dare_ties,
        breadcrumbs,
        breadcrumbs_ties,
        della,
        della_linear,
        sce,
        ram,
        ramplus_tl,
        arcee_fusion,
        model_stock,
        karcher,
        nearswap,
        nuslerp,
        multislerp,
    )
}
