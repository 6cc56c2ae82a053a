"""An independent float64 reference for CKA, straight from the formulas; it shares no code with the package.

Recording is torch (plain forward hooks that clone), all algebra is numpy in float64. Slow and readable.

Sources: Song et al. 2012, "Feature selection via dependence maximization", JMLR 13 (unbiased HSIC);
Gretton et al. 2005, "Measuring statistical dependence with Hilbert-Schmidt norms" (biased HSIC);
Székely & Rizzo 2013, "The distance correlation t-test of independence in high dimension" (distance kernel);
Kornblith et al. 2019, "Similarity of neural network representations revisited" (CKA, kernels);
Nguyen, Raghu & Kornblith 2021, "Do wide and deep networks learn the same things?" (minibatch CKA).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

Array = np.ndarray
Gram = Callable[[Array], Array]
Call = Callable[[nn.Module, Any], Any]
Taken = TypeVar("Taken")

MIN_SAMPLES = 4


# Features and Gram matrices


def flatten(activation: torch.Tensor | Array) -> Array:
    """Features (n, d) in float64: everything after the first dimension in one row (Kornblith et al. 2019)."""
    tensor = torch.as_tensor(activation).detach().cpu().to(torch.float64)
    return tensor.reshape(tensor.shape[0], -1).numpy()


def centre_columns(x: Array) -> Array:
    """X - 1 mean(X)^T, so that X X^T becomes H X X^T H with H = I - 11^T/n."""
    x = x - x.mean(axis=0)
    # Again, because the rounding of a large mean is itself a common vector.
    return x - x.mean(axis=0)


def centre_gram(gram: Array) -> Array:
    """H K H with H = I - 11^T/n (Gretton et al. 2005)."""
    gram = gram - gram.mean(axis=0, keepdims=True)
    return gram - gram.mean(axis=1, keepdims=True)


def _feature_chunks(x: Array, columns: int = 1 << 16) -> Iterator[Array]:
    for start in range(0, x.shape[1], columns):
        yield x[:, start : start + columns]


def linear_gram(x: Array) -> Array:
    """K_ij = <x_i - m, x_j - m>, m the mean sample (Kornblith et al. 2019).

    HSIC does not depend on m; taking it out first keeps a large common component from cancelling later.
    """
    gram = np.zeros((len(x), len(x)))
    for chunk in _feature_chunks(x):
        centred = centre_columns(chunk)
        gram += centred @ centred.T
    return gram


def squared_distances(x: Array) -> Array:
    """D_ij = sum_k (x_ik - x_jk)^2, from the differences and not from the expanded square."""
    distances = np.zeros((len(x), len(x)))
    for chunk in _feature_chunks(x):
        for i, row in enumerate(chunk):
            difference = chunk - row
            distances[i] += (difference * difference).sum(axis=1)
    return distances


def rbf_gram(x: Array, bandwidth: float = 1.0, sigma: float | None = None) -> Array:
    """K = exp(-D / (2 sigma^2)), sigma^2 = bandwidth^2 median(D) unless given (Kornblith et al. 2019, demo).

    The median is of all n*n squared distances, zeros included, the mean of the middle two of an even count.
    Where it is 0, K is the limit for a small sigma: 1 where D is 0, else 0.
    """
    distances = squared_distances(x)
    variance = bandwidth**2 * float(np.median(distances)) if sigma is None else sigma**2
    if variance == 0:
        return (distances == 0).astype(np.float64)
    return np.exp(-distances / (2 * variance))


def distance_gram(x: Array) -> Array:
    """K_ij = -|x_i - x_j| (Székely & Rizzo 2013: U-centred, the bias-corrected distance covariance)."""
    return -np.sqrt(squared_distances(x))


def cosine_gram(x: Array) -> Array:
    """K_ij = <x_i, x_j> / (|x_i| |x_j|), and 0 for a sample that is 0."""
    norms = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, norms, out=np.zeros_like(x), where=norms != 0)
    return unit @ unit.T


def polynomial_gram(x: Array, degree: int = 3, gamma: float | None = None, coef0: float = 1.0) -> Array:
    """K_ij = (gamma <x_i, x_j> + coef0)^degree, gamma = 1/d unless given (scikit-learn's convention)."""
    scale = 1 / x.shape[1] if gamma is None else gamma
    return (scale * (x @ x.T) + coef0) ** degree


KERNELS: dict[str, Gram] = {
    "linear": linear_gram,
    "rbf": rbf_gram,
    "distance": distance_gram,
    "cosine": cosine_gram,
    "polynomial": polynomial_gram,
}


# HSIC of one minibatch


def _without_diagonal(gram: Array) -> Array:
    gram = np.array(gram, dtype=np.float64)
    np.fill_diagonal(gram, 0.0)
    return gram


def hsic_unbiased(k: Array, el: Array) -> float:
    """HSIC_1, Song et al. 2012 eq. 5, K and L with their diagonals set to 0.

    [tr(KL) + (1'K1)(1'L1) / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)).
    """
    n = len(k)
    k, el = _without_diagonal(k), _without_diagonal(el)
    ones = np.ones(n)
    trace = np.sum(k * el.T)
    totals = (ones @ k @ ones) * (ones @ el @ ones) / ((n - 1) * (n - 2))
    rows = 2 / (n - 2) * ((ones @ k) @ (el @ ones))
    return float((trace + totals - rows) / (n * (n - 3)))


def hsic_biased(k: Array, el: Array) -> float:
    """HSIC_0 = tr(K H L H) / (n-1)^2, H = I - 11^T/n (Gretton et al. 2005)."""
    n = len(k)
    h = np.eye(n) - np.full((n, n), 1 / n)
    return float(np.sum((h @ k @ h) * el.T) / (n - 1) ** 2)


def hsic_pairs(grams: Sequence[Array], estimator: str = "unbiased") -> Array:
    """HSIC of every pair of the L Gram matrices of one minibatch, (L, L): the formulas above for a stack.

    The Gram matrices are double-centred first: neither HSIC changes when a_i + a_j is added to K_ij (off
    the diagonal, in the unbiased case), and the terms of Song's formula then do not cancel.
    """
    stack = np.stack([centre_gram(np.asarray(gram, dtype=np.float64)) for gram in grams])
    layers, n, _ = stack.shape
    if estimator == "biased":
        flat = stack.reshape(layers, -1)
        return flat @ flat.T / (n - 1) ** 2
    if estimator != "unbiased":
        raise ValueError(f"estimator is 'unbiased' or 'biased', not {estimator!r}")
    stack = np.stack([_without_diagonal(gram) for gram in stack])
    flat = stack.reshape(layers, -1)
    rows = stack.sum(axis=2)
    totals = rows.sum(axis=1)
    traces = flat @ flat.T
    return (traces + np.outer(totals, totals) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (rows @ rows.T)) / (n * (n - 3))


# CKA over minibatches


def hsic_minibatches(
    grams: Sequence[Sequence[Array]],
    estimator: str = "unbiased",
    weight: Callable[[int], float] | None = None,
) -> Array:
    """w_b HSIC(K_b, L_b) for every minibatch and pair: (B, L, L).

    w_b = weight(n_b); unless given n_b - 3 for the unbiased and n_b - 1 for the biased estimator.
    """
    if weight is None:
        weight = (lambda n: n - 3) if estimator == "unbiased" else (lambda n: n - 1)
    return np.stack([weight(len(layers[0])) * hsic_pairs(layers, estimator) for layers in grams])


def cka_of_values(values: Array) -> Array:
    """CKA_ij = S_ij / sqrt(S_ii S_jj), S = sum_b values_b; NaN where S_ii or S_jj is not positive."""
    total = values.sum(axis=0)
    root = _roots(total)
    return total / np.outer(root, root)


def _roots(total: Array) -> Array:
    own = np.diagonal(total)
    return np.sqrt(np.where(own > 0, own, np.nan))


def cka_minibatch(
    grams: Sequence[Sequence[Array]],
    estimator: str = "unbiased",
    weight: Callable[[int], float] | None = None,
) -> Array:
    """CKA of every pair of layers, (L, L): `grams` is a list over minibatches of lists over layers.

    sum_b w_b HSIC(K_b, L_b) / sqrt(sum_b w_b HSIC(K_b, K_b) sum_b w_b HSIC(L_b, L_b)) (Nguyen et al. 2021).
    """
    return cka_of_values(hsic_minibatches(grams, estimator, weight))


def stderr_minibatch(values: Array) -> Array:
    """Standard error of the CKA that weighted minibatch HSICs (B, L, L) give: the delta method for a ratio.

    u_ij,b = h_ij,b / sqrt(S_ii S_jj); e_b = u_ij,b - theta_ij / 2 (u_ii,b + u_jj,b), which sums to 0 over b;
    stderr_ij = sqrt(B / (B-1) sum_b e_b^2). All NaN where B < 3; 0 on the diagonal; NaN where CKA is.
    """
    count, layers, _ = values.shape
    if count < 3:
        return np.full((layers, layers), np.nan)
    root = _roots(values.sum(axis=0))
    theta = cka_of_values(values)
    squares = np.zeros((layers, layers))
    for minibatch in values:
        u = minibatch / np.outer(root, root)
        own = np.diagonal(u)
        error = u - theta / 2 * (own[:, None] + own[None, :])
        squares += error**2
    stderr = np.sqrt(count / (count - 1) * squares)
    np.fill_diagonal(stderr, np.where(np.isnan(root), np.nan, 0.0))
    return stderr


def traces(activation: torch.Tensor, features: Callable[[torch.Tensor], Array] = flatten) -> tuple[float, float]:
    """(tr(H X X^T H), tr(X X^T)): how much the samples differ, and how large they are."""
    x = features(activation)
    return float(np.sum(centre_columns(x) ** 2)), float(np.sum(x**2))


def _is_degenerate(centred: float, raw: float, dtype: torch.dtype) -> bool:
    return centred <= (8 * torch.finfo(dtype).eps) ** 2 * raw


def _features_differ(activation: torch.Tensor, features: Callable[[torch.Tensor], Array]) -> bool:
    """Whether a feature's variance is above (8 eps)^2 times its mean square, or times the median one if larger."""
    x = features(activation[:32])
    squares = (x**2).mean(0)
    usual = np.median(squares[squares > 0]) if (squares > 0).any() else np.inf
    return bool((x.var(0) > (8 * torch.finfo(activation.dtype).eps) ** 2 * np.maximum(squares, usual)).any())


def degenerate(activations: Sequence[torch.Tensor], features: Callable[[torch.Tensor], Array] = flatten) -> bool:
    """Whether the samples of a layer do not differ: sum_b tr(H K_b H) <= (8 eps)^2 sum_b tr(K_b).

    K_b is the linear Gram matrix of minibatch b (whatever kernel is compared) and eps that of the
    activations' own dtype. That no single feature differs in the first minibatch is the other condition.
    """
    centred, raw = np.sum([traces(activation, features) for activation in activations], axis=0)
    return _is_degenerate(centred, raw, activations[0].dtype) and not _features_differ(activations[0], features)


# Recording


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor in nested mappings, sequences and dataclasses, depth first."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _tensors(getattr(value, field.name))


def _activation(output: Any) -> torch.Tensor | None:
    """The first floating tensor of an output, or None; None behind a packed sequence, where states stand."""
    if isinstance(output, nn.utils.rnn.PackedSequence):
        return None
    if isinstance(output, tuple | list) and output and isinstance(output[0], nn.utils.rnn.PackedSequence):
        return None
    return next((tensor for tensor in _tensors(output) if tensor.is_floating_point()), None)


def _size(batch: Any) -> int:
    """The number of samples: entries of a list of images or dicts, else of the first tensor."""
    first = batch[0] if isinstance(batch, tuple | list) else batch
    is_listed = isinstance(batch, list) and (
        isinstance(first, Mapping) or (torch.is_tensor(first) and first.ndim == 3)
    )
    return len(batch) if is_listed else next(tensor for tensor in _tensors(batch) if tensor.ndim > 0).shape[0]


def _one_less(batch: Any, samples: int) -> Any:
    """A batch without its last sample."""
    if isinstance(batch, torch.Tensor):
        return batch[:-1] if batch.ndim > 0 and batch.shape[0] == samples else batch
    if isinstance(batch, Mapping):
        return {key: _one_less(value, samples) for key, value in batch.items()}
    if isinstance(batch, list) and len(batch) == samples and _size(batch) == samples:
        return batch[:-1]
    if isinstance(batch, tuple | list):
        return type(batch)(_one_less(value, samples) for value in batch)
    return batch


def _rows(model: nn.Module, batch: Any, call: Call, names: Sequence[str]) -> dict[str, int]:
    """Sizes of dimension 0 of the activations of one forward pass: label -> rows."""
    rows: dict[str, int] = {}
    calls: Counter[str] = Counter()

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] += 1
            activation = _activation(output)
            if activation is not None and activation.ndim > 0:
                rows[name if calls[name] == 1 else f"{name}#{calls[name]}"] = activation.shape[0]

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return rows


def _default_call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(batch[0] if isinstance(batch, tuple | list) else batch)


def _eligible(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name, without a `parametrizations` ModuleDict and what is under one."""
    modules = dict(model.named_modules())
    hidden = [
        name
        for name, module in modules.items()
        if name.split(".")[-1] == "parametrizations" and isinstance(module, nn.ModuleDict)
    ]
    return {
        name: module
        for name, module in modules.items()
        if not any(name == prefix or name.startswith(prefix + ".") for prefix in hidden)
    }


def _leaves(model: nn.Module, batch: Any, call: Call) -> list[str]:
    """Names of the modules that `call` calls without calling any of their descendants."""
    eligible = _eligible(model)
    called: set[nn.Module] = set()

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        called.add(module)

    handles = [module.register_forward_hook(hook) for module in eligible.values()]
    try:
        call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [
        name
        for name, module in eligible.items()
        if module in called and not any(child in called for child in module.modules() if child is not module)
    ]


def _observe(
    model: nn.Module,
    batches: Iterable[Any],
    take: Callable[[torch.Tensor], Taken],
    layers: Sequence[str] | None,
    call: Call | None,
) -> tuple[list[str], list[dict[str, Taken]]]:
    """`take` of every layer's output, inside the hook: labels, and a dict for each batch."""
    batches = list(batches)
    call = _default_call if call is None else call
    training = {module: module.training for module in model.modules()}
    model.eval()
    handles = []
    taken: dict[str, Taken] = {}
    calls: Counter[str] = Counter()
    samples = 0

    def hook_for(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] += 1
            activation = _activation(output)
            label = name if calls[name] == 1 else f"{name}#{calls[name]}"
            if activation is not None and label in follows and activation.shape[0] == samples:
                taken[label] = take(activation.detach())

        return hook

    observed = []
    try:
        with torch.no_grad():
            names = _leaves(model, batches[0], call) if layers is None else layers
            # Samples are in dimension 0 where it has n entries, and one less of a batch of one less.
            samples = _size(batches[0])
            whole = _rows(model, batches[0], call, names)
            less = _rows(model, _one_less(batches[0], samples), call, names)
            follows = {label for label, rows in whole.items() if (rows, less.get(label)) == (samples, samples - 1)}
            for name in names:
                handles.append(model.get_submodule(name).register_forward_hook(hook_for(name)))
            for batch in batches:
                samples = _size(batch)
                calls.clear()
                taken = {}
                call(model, batch)
                observed.append(taken)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    labels = [label for label in observed[0] if all(label in seen for seen in observed)]
    return labels, [{label: seen[label] for label in labels} for seen in observed]


def record(
    model: nn.Module,
    batches: Iterable[Any],
    layers: Sequence[str] | None = None,
    call: Call | None = None,
) -> tuple[list[str], list[dict[str, torch.Tensor]]]:
    """Clones of what the layers return, made in the hook: labels in order of execution, a dict per batch.

    `layers` are module names; None is every module that runs without one of its descendants running.
    Second and later calls in one forward are `name#2`, `name#3`. `call(model, batch)` runs the model; by
    default a mapping is passed as keywords and of a tuple or list the first entry. Only labels that every
    batch has are kept.
    """
    return _observe(model, batches, torch.Tensor.clone, layers, call)


def minibatch_slices(samples: int, minibatch: int | None) -> list[slice]:
    """Consecutive groups of `minibatch` (None: one), the remainder its own, under 4 samples left out."""
    size = samples if minibatch is None else minibatch
    if minibatch is not None and minibatch < MIN_SAMPLES:
        raise ValueError(f"a minibatch needs at least {MIN_SAMPLES} samples, not {minibatch}")
    starts = range(0, samples, size) if samples else ()
    return [slice(start, start + size) for start in starts if min(size, samples - start) >= MIN_SAMPLES]


def grams_of_model(
    model: nn.Module,
    batches: Iterable[Any],
    kernel: str | Gram = "linear",
    minibatch: int | None = None,
    features: Callable[[torch.Tensor], Array] = flatten,
    call: Call | None = None,
    layers: Sequence[str] | None = None,
) -> tuple[list[str], list[list[Array]], Array]:
    """Float64 Gram matrices taken inside the hook: labels, minibatches of layers of (n, n), degenerate flags.

    Lists of two models over the same batches can be joined layer by layer to compare the models.
    """
    gram = KERNELS[kernel] if isinstance(kernel, str) else kernel

    def take(activation: torch.Tensor) -> list[tuple[Array, tuple[float, float], torch.dtype, bool]]:
        parts = [activation[part] for part in minibatch_slices(len(activation), minibatch)]
        differ = _features_differ(activation, features)
        return [(gram(features(part)), traces(part, features), part.dtype, differ) for part in parts]

    labels, observed = _observe(model, batches, take, layers, call)
    minibatches = [
        [seen[label][index] for label in labels] for seen in observed for index in range(len(seen[labels[0]]))
    ]
    if not minibatches:
        raise ValueError(f"no minibatch has {MIN_SAMPLES} samples")
    grams = [[entry[0] for entry in entries] for entries in minibatches]
    flags = []
    for layer in range(len(labels)):
        centred, raw = np.sum([entries[layer][1] for entries in minibatches], axis=0)
        flags.append(_is_degenerate(centred, raw, minibatches[0][layer][2]) and not minibatches[0][layer][3])
    return labels, grams, np.array(flags)


def cka_of_grams(
    grams: Sequence[Sequence[Array]],
    flags: Array,
    estimator: str = "unbiased",
    weight: Callable[[int], float] | None = None,
) -> tuple[Array, Array]:
    """CKA and its standard error, both (L, L), NaN in the rows and columns of layers flagged degenerate."""
    values = hsic_minibatches(grams, estimator, weight)
    cka, stderr = cka_of_values(values), stderr_minibatch(values)
    for matrix in (cka, stderr):
        matrix[flags, :] = np.nan
        matrix[:, flags] = np.nan
    return cka, stderr


def cka_of_model(
    model: nn.Module,
    batches: Iterable[Any],
    estimator: str = "unbiased",
    kernel: str | Gram = "linear",
    minibatch: int | None = None,
    features: Callable[[torch.Tensor], Array] = flatten,
    call: Call | None = None,
    forward: Call | None = None,
    layers: Sequence[str] | None = None,
) -> tuple[list[str], Array, Array]:
    """Labels, CKA (L, L) and standard error (L, L) of a model's layers; NaN for degenerate layers.

    `forward` is another name of `call` (the package's keyword). The matrix is in order of execution.
    """
    if call is not None and forward is not None:
        raise ValueError("give call or forward, not both")
    labels, grams, flags = grams_of_model(model, batches, kernel, minibatch, features, call or forward, layers)
    return labels, *cka_of_grams(grams, flags, estimator)
