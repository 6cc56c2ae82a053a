"""Turn the sums of a run into CKA, standard errors and a `CKAResult`.

CKA_ij = S_ij / sqrt(S_ii S_jj) with S_ij = sum_b h_ij,b and h_ij,b = w_b HSIC(K_i,b, K_j,b) is a ratio of
sums over minibatches. Its standard error follows from the spread of the linearised terms
e_ij,b = u_ij,b - CKA_ij / 2 (u_ii,b + u_jj,b), u_ij,b = h_ij,b / sqrt(S_ii S_jj), (delta method; Cochran 1977,
Sampling Techniques, ch. 6), and needs only the second moments that the state has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cka_hooks.errors import LayerError, NonFiniteError, TooFewSamplesError, warn
from cka_hooks.hsic import MIN_SAMPLES, resolution
from cka_hooks.results.result import CKAResult, Influence
from cka_hooks.similarity.state import State

# `result_of` warns if more than this share of a layer's own HSIC is in pairs of one sample. In a small run the
# largest share is large by chance, so it must also be this many times the 2 / samples that equal samples would have.
INFLUENCE_WARNING = 0.25
INFLUENCE_TIMES_EVEN = 10


def cka(moments: Tensor) -> Tensor:
    """(L, L) S_ij / sqrt(S_ii S_jj) from `State.moments`: NaN if S_ii is not positive, 1 on the diagonal."""
    root, scale = _roots(moments)
    return (moments[0] / scale).diagonal_scatter(torch.where(root.isnan(), root, 1.0))


def stderr(moments: Tensor, minibatches: int, minibatches_per_pass: int) -> Tensor:
    """(L, L) standard errors of `cka`: sqrt(B / (B - 1) sum_b e_ij,b^2), NaN below 3 minibatches.

    Further passes over the same samples are not independent of the first, so the variance between minibatches is
    divided by the number in one pass, B1. The errors e of each pass sum to nearly the same, so each pass has B1 - 1
    of them that vary: sqrt(B / (B1 - 1) sum_b e_ij,b^2).
    """
    if minibatches_per_pass < 3:
        return torch.full_like(moments[0], torch.nan)
    root, scale = _roots(moments)
    values = moments[0] / scale
    # Divide by one root at a time: products of four of them leave the range of float64 too early.
    squares = moments[1] / scale / scale
    cross = moments[2] / scale / root.square().unsqueeze(1)
    own = moments[3] / root.square().unsqueeze(1) / root.square()
    own_squares = own.diagonal()
    total = squares - values * (cross + cross.mT)
    total += values.square() / 4 * (own_squares.unsqueeze(1) + own_squares + 2 * own)
    factor = minibatches / (minibatches_per_pass - 1)
    # Symmetric up to the order of roundings; make it so to the bit.
    errors = ((total + total.mT).clamp_min(0) / 2 * factor).sqrt()
    return errors.diagonal_scatter(torch.where(root.isnan(), root, 0.0))


def _roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) sqrt(S_ii), NaN if S_ii is not positive, and (L, L) sqrt(S_ii S_jj)."""
    own = moments[0].diagonal()
    root = torch.where(own > 0, own, torch.nan).sqrt()
    return root, root.unsqueeze(1) * root


def largest_stderr(state: State) -> float:
    """The largest standard error of a defined pair, infinite before the third minibatch. Waits for the device."""
    if not state.layers or state.minibatches < 3:
        return float("inf")
    state = state.to("cpu")
    left_out = degenerate(state).keys() | irregular(state).keys()
    defined = torch.tensor([layer not in left_out for layer in state.layers], device="cpu") & state.bad.isinf()
    errors = stderr(state.moments, state.minibatches, state.first_minibatches)[defined][:, defined]
    return float(errors.max()) if len(errors) else 0.0


def irregular(state: State) -> dict[str, str]:
    """Layers that did not run in every minibatch, each with how often it did, from a state on the CPU."""
    return {
        layer: f"ran in {count:.0f} of {state.minibatches} minibatches"
        for layer, count in zip(state.layers, state.seen.tolist(), strict=True)
        if count != state.minibatches
    }


def degenerate(state: State) -> dict[str, str]:
    """Layers whose CKA is undefined, each with the reason, from a state on the CPU."""
    found = {}
    for i, layer in enumerate(state.layers):
        level = resolution(getattr(torch, state.dtypes[layer])) * state.size[i]
        if not (state.spread[i] > level or (state.differ[i] > 0 and state.spread[i] > 0)):
            found[layer] = "the samples do not differ, so CKA is undefined"
        elif not state.moments[0, i, i] > 0:
            found[layer] = "the estimate of its own HSIC is not above 0, so CKA is undefined"
    return found


def too_few(state: State) -> TooFewSamplesError:
    """The error for a run in which no minibatch had the samples that an HSIC estimate needs."""
    return TooFewSamplesError(
        f"an HSIC estimate needs at least {MIN_SAMPLES} samples in a minibatch, and "
        + (f"the largest batch had {state.largest}" if state.largest else "nothing was observed")
        + ": use a larger batch_size in the loader, or join_batches=32 and features='mean', which join "
        "the pooled features of consecutive batches"
    )


def result_of(state: State, settings: Mapping[str, Any], models: tuple[str, ...] = ()) -> CKAResult:
    """The result of a run, on the CPU.

    Args:
        state: the sums of the run.
        settings: provenance, plain JSON values. What the state knows is added.
        models: names of the models that the layers belong to.

    Raises:
        TooFewSamplesError: no minibatch had the samples that an HSIC estimate needs.
        NonFiniteError: a layer was NaN or infinite in some minibatch. `.partial` has the result of all others.
        LayerError: no layer ran in every minibatch.
    """
    if not state.minibatches:
        raise too_few(state)
    state = state.to("cpu")
    first_bad = zip(state.layers, state.bad.tolist(), strict=True)
    bad = {layer: int(number) for layer, number in first_bad if number < float("inf")}
    ran_seldom = irregular(state)
    chosen = [layer for layer in state.layers if layer not in bad and layer not in ran_seldom]
    reasons = {layer: f"not finite, first in minibatch {number}" for layer, number in bad.items()}
    skipped = {label: why for label, why in state.skipped.items() if label not in chosen}
    skipped |= ran_seldom | reasons
    result = _result(state, chosen, skipped, settings, models) if chosen else None
    if bad:
        layer, number = min(bad.items(), key=lambda item: item[1])
        others = f", and {len(bad) - 1} more layers" if len(bad) > 1 else ""
        raise NonFiniteError(
            f"layer {layer!r} has NaN or infinity in minibatch {number} (counted from 0){others}: fix the model or "
            "its inputs, or leave these layers out (layers=). The error's `.partial` has the result of all other "
            "layers",
            bad,
            result,
        )
    if result is None:
        raise LayerError(
            "no layer ran in every minibatch: " + "; ".join(f"{layer} {why}" for layer, why in ran_seldom.items())
        )
    return result


def _result(
    state: State, layers: list[str], skipped: dict[str, str], settings: Mapping[str, Any], models: tuple[str, ...]
) -> CKAResult:
    position = {layer: i for i, layer in enumerate(state.layers)}
    index = torch.tensor([position[layer] for layer in layers], device="cpu")
    undefined_layers = {layer: reason for layer, reason in degenerate(state).items() if layer in layers}
    gone = torch.tensor([layer in undefined_layers for layer in layers], device="cpu")
    undefined = gone.unsqueeze(1) | gone

    def chosen(pairs: Tensor) -> Tensor:
        return pairs[..., index[:, None], index]

    def defined(pairs: Tensor) -> Tensor:
        return chosen(pairs).masked_fill(undefined, torch.nan)

    own = state.moments[0].diagonal()
    shares = (state.peak[0] * (state.minibatches / max(state.first_minibatches, 1)) / own).clamp_max(1.0)
    found = map(json.loads, state.identifiers)
    identifiers = [one for batch in found for one in (batch if isinstance(batch, list) else [None] * batch)]
    influence = {}
    for layer, i in zip(layers, index.tolist(), strict=True):
        if layer not in undefined_layers:
            sample = int(state.peak[1, i])
            identifier = identifiers[sample] if sample < len(identifiers) else None
            influence[layer] = Influence(share=float(shares[i]), sample=sample, identifier=identifier)
    _warn(state, influence)
    null: dict[str, Tensor] = {}
    # Later passes bring no new samples.
    if state.passes == 1 and settings.get("estimator") == "unbiased" and settings.get("per", "sample") == "sample":
        # S_ii and S_jj do not depend on the permutation, see `cka_hooks.null`.
        _, scale = _roots(state.moments)
        variance, third = state.null
        null["null_variance"] = defined(variance / scale / scale)
        null["null_skewness"] = defined(third / variance.pow(1.5))
        if len(state.permuted):
            null["permuted"] = chosen(state.permuted / scale)
    kept = torch.cat([chosen(hsic) for hsic in state.kept]) if state.kept else None
    more: dict[str, Any] = {"shapes": state.shapes, "sample_axes": state.sample_axes} if state.shapes else {}
    if state.stopped is not None:
        more["stopped"] = state.stopped
    return CKAResult(
        rows=tuple(layers),
        columns=tuple(layers),
        matrix=defined(cka(state.moments)),
        stderr=defined(stderr(state.moments, state.minibatches, state.first_minibatches)),
        **null,
        samples=state.first_samples,
        minibatches=state.minibatches,
        degrees_of_freedom=max(state.first_minibatches - 1, 0),
        degenerate=undefined_layers,
        skipped=skipped,
        models=models,
        influence=influence,
        minibatch_hsic=kept,
        minibatch_layers=tuple(layers) if kept is not None else (),
        passes=state.passes,
        settings={**settings, "samples_left_out": state.left_out, "torch": torch.__version__, **more},
    )


def _warn(state: State, influence: Mapping[str, Influence]) -> None:
    if state.left_out:
        warn(
            f"{state.left_out} samples at the end of batches were left out: fewer than {MIN_SAMPLES} of them were "
            "left for a minibatch"
        )
    level = max(INFLUENCE_WARNING, INFLUENCE_TIMES_EVEN * 2 / max(state.first_samples, 1))
    heavy = {layer: found for layer, found in influence.items() if found.share > level}
    if heavy:
        layer, found = max(heavy.items(), key=lambda item: item[1].share)
        warn(
            f"one sample decides much of {len(heavy)} layer(s): {found.spelled} alone accounts for "
            f"{found.share:.0%} of HSIC(layer, layer) of {layer!r}: look at it, and see `result.influence`"
        )
