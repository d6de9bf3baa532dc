"""Several adapters of one module -> one adapter. w are the weights, s LoRA's scalings.

    IA³    linear        l = sum w_i l_i, where an adapter that leaves the module alone has l_i = 1
           interpolate   l = 1 + sum w_i (l_i - 1)
           product       l = prod l_i^w_i
    LoRA   cat           A = [w_i s_i A_i], B = [B_i]: B A is the weighted sum, at the sum of ranks
           svd           the best approximation of that sum at one rank
           linear        A = sum ±sqrt|w_i s_i| A_i, B = sum sqrt|w_i s_i| B_i; B A has cross terms
           magnitude_prune, ties, dare_linear, dare_ties
                         as linear, on pruned factors
           ..._svd       the same on the pruned updates s_i B_i A_i, then factored as in svd

Pruning keeps a share (`density`) of the elements: the largest, or with DARE (Yu et al. 2023,
arXiv 2311.03099) random ones, divided by the density. TIES (Yadav et al. 2023, arXiv 2306.01708)
then takes the mean over the adapters that have the majority's sign. All of it agrees with PEFT,
whose sums these are, but for IA³'s `linear` (PEFT counts an untouched module as 0). It is computed
in float64 and rounded once, to float32 (to float64 where a part is that wide).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeAlias

import torch
from torch import Tensor

from infold.adapters.exact import slices_for
from infold.adapters.settings import Settings
from infold.errors import Refusal
from infold.sizes import plural

__all__ = ["KINDS", "check_options", "check_shapes", "combine", "prunes"]

Parts: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class _Recipe:
    prune: str = ""  # "magnitude", "random" or nothing
    elect: bool = False  # TIES: only elements of the majority's sign count
    svd: bool = False  # works on the updates B A; else on each factor, element by element


_RECIPES = {
    "linear": _Recipe(),
    "svd": _Recipe(svd=True),
    "magnitude_prune": _Recipe("magnitude"),
    "magnitude_prune_svd": _Recipe("magnitude", svd=True),
    "ties": _Recipe("magnitude", elect=True),
    "ties_svd": _Recipe("magnitude", elect=True, svd=True),
    "dare_linear": _Recipe("random"),
    "dare_linear_svd": _Recipe("random", svd=True),
    "dare_ties": _Recipe("random", elect=True),
    "dare_ties_svd": _Recipe("random", elect=True, svd=True),
}
KINDS: dict[str, tuple[str, ...]] = {
    "ia3": ("linear", "interpolate", "product"),
    "lora": ("cat", *_RECIPES),
}


@dataclass(frozen=True, slots=True)
class _Options:
    kind: str
    density: float | None
    majority_sign: str
    svd_rank: int | None
    svd_clamp: float | None
    generator: torch.Generator | None


def prunes(kind: str) -> bool:
    """Whether this kind needs a density."""
    return kind in _RECIPES and _RECIPES[kind].prune != ""


def check_options(
    method: str,
    kind: str,
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
) -> list[str]:
    """The reasons why these options cannot be used together; none if they can."""
    if method not in KINDS:
        return [f"{method}: only {' and '.join(KINDS)} adapters can be combined"]
    problems = []
    if kind not in KINDS[method]:
        problems.append(f"{kind!r} is no way to combine {method}; there are {_listed(method)}")
    if not all(math.isfinite(weight) for weight in weights):
        problems.append(f"weights {', '.join(map(str, weights))}: must be finite numbers")
    if prunes(kind) and density is None:
        problems.append(f"{kind} needs a density: the share of elements to keep, such as 0.5")
    if density is not None and not 0 < density <= 1:
        problems.append(f"density {density} must be above 0 and at most 1")
    if majority_sign not in ("total", "frequency"):
        problems.append(f"majority sign {majority_sign!r} must be 'total' or 'frequency'")
    if svd_rank is not None and svd_rank < 1:
        problems.append(f"SVD rank {svd_rank} must be at least 1")
    if svd_clamp is not None and not 0.5 < svd_clamp <= 1:  # below, the bound would be negative
        problems.append(f"SVD clamp {svd_clamp} must be a quantile above 0.5 and at most 1")
    return problems


def _listed(method: str) -> str:
    return ", ".join(KINDS[method])


def check_shapes(method: str, kind: str, entries: Sequence[Shapes]) -> list[str]:
    """The reasons why parts of these shapes, all of one module, cannot be combined."""
    if method == "ia3":
        shapes = [tuple(entry.get("ia3_l", ())) for entry in entries]
        if () in shapes:
            return ["ia3_l is missing"]
        return [] if len(set(shapes)) == 1 else [f"ia3_l of shapes {_text(shapes)}: they differ"]
    if any("lora_magnitude_vector" in entry for entry in entries):
        return [
            "DoRA magnitudes cannot be combined: each holds lengths of its own base + update. "
            "`infold merge` merges such adapters one after the other"
        ]
    if any(not {"lora_A", "lora_B"} <= entry.keys() for entry in entries):
        return ["lora_A or lora_B is missing"]
    a, b = ([tuple(entry[part]) for entry in entries] for part in ("lora_A", "lora_B"))
    if any(len(x) < 2 or len(y) < 2 or not y[1] or x[0] % y[1] for x, y in zip(a, b, strict=True)):
        return [f"lora_A {_text(a)} and lora_B {_text(b)} do not make updates"]
    if len({x[1:] for x in a}) > 1 or len({(y[0], *y[2:]) for y in b}) > 1:
        return [f"lora_A {_text(a)} and lora_B {_text(b)} do not belong to one module"]
    biases = {math.prod(entry["lora_bias"]) for entry in entries if "lora_bias" in entry}
    if biases - {b[0][0]}:
        return [f"lora_bias has not {b[0][0]} elements"]
    elementwise = kind in _RECIPES and not _RECIPES[kind].svd
    if elementwise and len(set(a)) + len(set(b)) > 2:
        ranks = ", ".join(str(x[0]) for x in a)
        other = "svd" if kind == "linear" else f"{kind}_svd"
        exact = "cat (exact) or " if kind == "linear" else ""
        return [
            f"ranks {ranks}: {kind} works element by element and needs equal ones; "
            f"use {exact}{other}"
        ]
    if not elementwise and any(x[0] != y[1] for x, y in zip(a, b, strict=True)):
        return [f"a grouped convolution: {kind} would mix its groups; use linear"]
    return []


def _text(shapes: Sequence[Sequence[int]]) -> str:
    return ", ".join(str(list(shape)) for shape in shapes)


def combine(
    method: str,
    entries: Sequence[tuple[Parts, Settings]],
    weights: Sequence[float],
    kind: str,
    *,
    density: float | None = None,
    majority_sign: str = "total",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    generator: torch.Generator | None = None,
    untouched: float = 0.0,
) -> tuple[dict[str, Tensor], Settings]:
    """One adapter for one module, of the adapters in `entries`; its scaling is 1 (alpha = rank).

    entries: for each adapter that touches the module its parts, lora_A (r, in[, k...]) and lora_B
    (out, r[, 1...]) with or without lora_bias (out,), or ia3_l in any shape; floats of any dtype.
    An adapter that does not touch the module is left out, with its weight. `untouched` is the sum
    of those weights: IA³'s `linear` counts such an adapter as 1, the other kinds do not need it.
    density: share of elements kept, in (0, 1]. majority_sign: "total" (by the sum of the values)
    or "frequency" (of the signs). svd_rank: rank of the ..svd kinds, exactly; default: the largest
    of the entries. svd_clamp: cuts both factors at this quantile of their elements.
    generator: for DARE, on the parts' device; default: PyTorch's global one.

    Raises Refusal for options or shapes that do not suit, and for a result that is not finite.
    """
    problems = check_options(
        method, kind, weights, density=density, majority_sign=majority_sign, svd_rank=svd_rank,
        svd_clamp=svd_clamp,
    )  # fmt: skip
    if not problems and (not entries or len(entries) != len(weights)):
        problems = [f"{plural('adapter', len(entries))} and {plural('weight', len(weights))}"]
    shapes = [{name: part.shape for name, part in parts.items()} for parts, _ in entries]
    problems = problems or check_shapes(method, kind, shapes)
    if len({settings.side for _, settings in entries}) > 1:
        problems.append("some of the adapters scale the inputs (feed-forward), others the outputs")
    if problems:
        raise Refusal(problems)
    dtype = reduce(
        torch.promote_types,
        (p.dtype for parts, _ in entries for p in parts.values()),
        torch.float32,
    )
    wide = [{n: p.detach().double() for n, p in parts.items()} for parts, _ in entries]
    if method == "ia3":
        result = {"ia3_l": _scales([parts["ia3_l"] for parts in wide], weights, kind, untouched)}
    else:
        options = _Options(kind, density, majority_sign, svd_rank, svd_clamp, generator)
        result = _low_rank(wide, weights, [s.scaling for _, s in entries], options)
    result = {name: part.to(dtype) for name, part in result.items()}
    if not all(part.isfinite().all() for part in result.values()):
        why = "; a negative scale has no fractional power: use interpolate" * (kind == "product")
        raise Refusal(f"the combination is NaN or inf in places{why}")
    settings = replace(entries[0][1], scaling=1.0)
    if method == "lora":
        rank = result["lora_A"].shape[0]
        slices = max(slices_for("BF16", rank), *(s.slices for _, s in entries), 1)
        settings = replace(settings, slices=slices, rank=rank)
    return result, settings


def _scales(
    vectors: Sequence[Tensor], weights: Sequence[float], kind: str, untouched: float
) -> Tensor:
    if kind == "product":
        powers = (v.pow(w) for v, w in zip(vectors, weights, strict=True))
        return reduce(torch.mul, powers, torch.ones_like(vectors[0]))
    if kind == "interpolate":  # 1 stays 1 exactly, whatever the weights
        changes = [v - 1 for v in vectors]
        return 1 + _weighted_sum(changes, weights)
    return untouched + _weighted_sum(vectors, weights)


def _weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = torch.zeros_like(tensors[0])
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor * weight)
    return total


def _low_rank(
    entries: Sequence[Parts], weights: Sequence[float], scalings: Sequence[float], options: _Options
) -> dict[str, Tensor]:
    """The combined parts of LoRA; all in float64."""
    a, b = ([parts[name] for parts in entries] for name in ("lora_A", "lora_B"))
    scaled = [w * s for w, s in zip(weights, scalings, strict=True)]
    result = {}
    if options.kind == "cat":
        result["lora_A"] = torch.cat([x * w for x, w in zip(a, scaled, strict=True)])
        result["lora_B"] = torch.cat(b, 1)
    elif _RECIPES[options.kind].svd:
        result["lora_A"], result["lora_B"] = _by_svd(a, b, weights, scalings, options)
    else:
        roots = [math.sqrt(abs(w)) for w in scaled]
        signed = [math.copysign(root, w) for root, w in zip(roots, scaled, strict=True)]
        result["lora_A"] = _mixed(a, signed, options)
        result["lora_B"] = _mixed(b, roots, options)
    biases = [(p["lora_bias"], w) for p, w in zip(entries, scaled, strict=True) if "lora_bias" in p]
    if biases:
        result["lora_bias"] = _weighted_sum([x for x, _ in biases], [w for _, w in biases])
    return result


def _mixed(tasks: Sequence[Tensor], weights: Sequence[float], options: _Options) -> Tensor:
    """The weighted sum of tensors of one shape, after pruning; or TIES' mean of those that agree.

    As in PEFT the sign is elected before the weights count.
    """
    recipe = _RECIPES[options.kind]
    tasks = [_pruned(task, options) for task in tasks]
    if not recipe.elect:
        return _weighted_sum(tasks, weights)
    votes = [task.sign() if options.majority_sign == "frequency" else task for task in tasks]
    majority = torch.where(_weighted_sum(votes, [1.0] * len(votes)) >= 0, 1.0, -1.0).double()
    agree = [task.sign() == majority for task in tasks]
    total = _weighted_sum([t * mine for t, mine in zip(tasks, agree, strict=True)], weights)
    return total / torch.stack(agree).sum(0).clamp(min=1)


def _pruned(task: Tensor, options: _Options) -> Tensor:
    prune, density = _RECIPES[options.kind].prune, options.density
    if not prune or density is None or density == 1:
        return task
    if prune == "random":
        chances = torch.full(task.shape, density, dtype=torch.float32, device=task.device)
        return task * torch.bernoulli(chances, generator=options.generator) / density
    count = int(density * task.numel())
    largest = task.abs().flatten().argsort(descending=True, stable=True)[:count]
    kept = torch.zeros(task.numel(), dtype=torch.bool, device=task.device)
    kept[largest] = True
    return task * kept.view(task.shape)


def _by_svd(
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    weights: Sequence[float],
    scalings: Sequence[float],
    options: _Options,
) -> tuple[Tensor, Tensor]:
    """lora_A (rank, in...) with orthonormal rows and lora_B (out, rank...) of the mixed update."""
    rank = options.svd_rank or max(x.shape[0] for x in a)
    flat = [(x.flatten(1), y.flatten(1)) for x, y in zip(a, b, strict=True)]
    if options.kind == "svd":
        scaled = [w * s for w, s in zip(weights, scalings, strict=True)]
        left = torch.cat([y * w for (_, y), w in zip(flat, scaled, strict=True)], 1)
        u, v = _factor_product(left, torch.cat([x for x, _ in flat]), rank)
    else:
        updates = [y @ x * s for (x, y), s in zip(flat, scalings, strict=True)]
        u, v = _factor(_mixed(updates, weights, options), rank)
    signs = v.gather(1, v.abs().argmax(1, keepdim=True)).sign()  # an SVD leaves them open
    u, v = u * signs.t(), v * signs
    if options.svd_clamp is not None:
        bound = _quantile(torch.cat([u.flatten(), v.flatten()]), options.svd_clamp)
        u, v = u.clamp(-bound, bound), v.clamp(-bound, bound)
    missing = rank - len(v)  # where the update has not so many dimensions
    u, v = (torch.nn.functional.pad(x, p) for x, p in ((u, (0, missing)), (v, (0, 0, 0, missing))))
    return v.view(rank, *a[0].shape[1:]), u.view(-1, rank, *b[0].shape[2:])


def _factor_product(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The SVD of left (out, r) @ right (r, in) as (U S, V^T), without that product's cost."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.t())
    u, s, v = torch.linalg.svd(r_left @ r_right.t(), full_matrices=False)
    return q_left @ (u * s)[:, :rank], v[:rank] @ q_right.t()


def _factor(update: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest `rank` terms of the SVD of update (out, in), as (U S, V^T).

    By the eigenvectors of the smaller Gram matrix: several times faster than an SVD. In float64
    what it loses is at most 2^-26 of the largest singular value.
    """
    if update.shape[0] < update.shape[1]:
        v, u = _factor(update.t(), rank)
        sizes = v.norm(dim=0)
        return u.t() * sizes, (v / sizes.where(sizes > 0, 1.0)).t()
    right = torch.linalg.eigh(update.t() @ update).eigenvectors.flip(1)[:, :rank]
    return update @ right, right.t()


def _quantile(values: Tensor, share: float) -> Tensor:
    """Linear between neighbours, as torch.quantile, which takes 2^24 elements at most."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))
