"""``cka-hooks run`` and ``cka-hooks layers``: a plan, the run, and what it found."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from cka_hooks.command import data as data_spec
from cka_hooks.command.models import LoadedModel, SpecError, load_model
from cka_hooks.compare import compare
from cka_hooks.errors import CKAWarning, MissingExtraError, NonFiniteError, OptionError
from cka_hooks.recording.batches import sample_count
from cka_hooks.recording.recorder import LayerRecorder
from cka_hooks.results.result import CKAResult

SAMPLES = 2048
# A trial shorter than this is repeated: what the first call of a kernel costs would drown it.
_SHORT = 2.0


def run(arguments: argparse.Namespace) -> int:
    """Plan, compare, summarise, write; the exit code."""

    def say(text: str) -> None:
        print(text, file=sys.stderr if arguments.json else sys.stdout, flush=True)

    device = _device(arguments.device)
    loaded = _models(arguments)
    models = {one.name: one.model.to(device) for one in loaded} if len(loaded) > 1 else loaded[0].model.to(device)
    loader = data_spec.load_data(
        arguments.data,
        transform=loaded[0].transform,
        batch_size=arguments.batch_size,
        samples=_samples(arguments),
        seed=arguments.seed,
        workers=arguments.workers,
        download=arguments.download,
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    batch, loader = data_spec.first_batch(loader)
    options = _options(arguments)

    def measured(loader: Iterable[Any], progress: bool, **bounds: Any) -> CKAResult:
        torch.manual_seed(arguments.seed)
        return compare(models, loader, layers=arguments.layers, progress=progress, **options, **bounds)

    bounds = {
        "max_samples": _samples(arguments),
        "tolerance": arguments.tolerance,
        "checkpoint": arguments.checkpoint,
    }
    if not arguments.quiet:
        say(_plan(arguments, loaded, loader, batch, device, measured))
    code = 0
    try:
        result = measured(loader, not arguments.quiet, **bounds)
    except NonFiniteError as error:
        if error.partial is None:
            raise
        print(f"cka-hooks: {error}", file=sys.stderr)
        result, code = error.partial, 1
    result = dataclasses.replace(result, settings={**result.settings, **_provenance(arguments, device)})
    paths = _written(result, arguments.out)
    if arguments.json:
        print(json.dumps(_report(result, paths, complete=code == 0), indent=2))
    else:
        say(f"\n{result.summary()}\n")
        for name, path in paths.items():
            say(f"{name:<10}{path}")
    return code


def list_layers(arguments: argparse.Namespace) -> int:
    """Print the table of :meth:`LayerRecorder.describe`; the exit code."""
    loaded = load_model(arguments.model, arguments.weights)
    if arguments.data:
        batch, _ = data_spec.first_batch(
            data_spec.load_data(arguments.data, transform=loaded.transform, batch_size=4, samples=4)
        )
    else:
        batch = _random_batch(loaded, arguments.input)
    print(LayerRecorder(loaded.model, arguments.layers).describe(batch))
    return 0


def _random_batch(loaded: LoadedModel, shape: str | None) -> Any:
    if shape is not None:
        try:
            return torch.randn(4, *(int(size) for size in shape.split(",")))
        except ValueError:
            raise SpecError(f"--input {shape} is no shape: give sizes with commas, such as 3,224,224") from None
    if loaded.input_shape is not None:
        return torch.randn(4, *loaded.input_shape)
    vocabulary = getattr(getattr(loaded.model, "config", None), "vocab_size", None)
    if isinstance(vocabulary, int):
        return {"input_ids": torch.randint(vocabulary, (4, 16))}
    raise SpecError(f"what {loaded.name} takes is not known: give --input C,H,W or --data")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def _models(arguments: argparse.Namespace) -> list[LoadedModel]:
    """One model, or two with names that differ."""
    first = load_model(arguments.model, arguments.weights, seed=arguments.seed)
    if arguments.against is None:
        if arguments.against_weights is not None:
            raise OptionError("--against-weights is for a second model: name it with --against")
        return [first]
    second = load_model(arguments.against, arguments.against_weights, seed=arguments.seed + 1)
    if first.name != second.name:
        return [first, second]
    stems = [Path(w).stem if w else "default" for w in (arguments.weights, arguments.against_weights)]
    if stems[0] == stems[1]:
        stems = ["1", "2"]
    return [
        dataclasses.replace(one, name=f"{one.name}-{stem}") for one, stem in zip((first, second), stems, strict=True)
    ]


def _samples(arguments: argparse.Namespace) -> int | None:
    if arguments.samples == "all":
        return None
    if arguments.samples is None:
        return None if arguments.tolerance is not None else SAMPLES
    return int(arguments.samples)


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {
        name: getattr(arguments, name) for name in ("minibatch", "kernel", "estimator", "features")
    }
    return {**options, "seed": arguments.seed}


def _plan(
    arguments: argparse.Namespace,
    loaded: list[LoadedModel],
    loader: Iterable[Any],
    batch: Any,
    device: torch.device,
    measured: Callable[..., CKAResult],
) -> str:
    """What will be done and how long it will take, found out on one batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CKAWarning)
        for _ in range(2):
            started = time.perf_counter()
            try:
                trial = measured([batch], False)
            except NonFiniteError as error:
                if error.partial is None:
                    raise
                trial = error.partial
            seconds = time.perf_counter() - started
            if seconds > _SHORT:
                break
    size = sample_count(batch[0] if isinstance(batch, tuple | list) and batch else batch) or arguments.batch_size
    bound = _samples(arguments)
    total = _total(loader, bound)
    count = len(trial.rows)
    lines = [
        f"models     {' and '.join(f'{one.name} ({type(one.model).__name__})' for one in loaded)} on {device}",
        f"layers     {count}, from {trial.rows[0]} to {trial.rows[-1]}: {count * (count - 1) // 2:,} pairs",
        f"data       {data_spec.described(arguments.data, loader)}",
        f"estimates  from minibatches of {min(arguments.minibatch, size)} in batches of {size}, "
        f"{arguments.estimator}, {arguments.kernel} kernel",
    ]
    if total is None:
        lines.append(f"cost       {seconds / size * 1000:.3g} ms a sample; the loader does not say how many it has")
    else:
        about = "at most " if arguments.tolerance is not None else "about "
        lines.append(
            f"cost       {about}{_duration(seconds / size * total)} for {total:,} samples, by one batch of {size}, "
            "without reading the data"
        )
    return "\n".join([*lines, ""])


def _total(loader: Iterable[Any], bound: int | None) -> int | None:
    """How many samples the run will see, None where the loader does not say."""
    sampler = getattr(loader, "sampler", None)
    try:
        there = len(sampler if sampler is not None else loader.dataset)  # type: ignore[attr-defined]
    except (AttributeError, TypeError):
        return None
    return there if bound is None else min(there, bound)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def _provenance(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the command was asked for, for the result's file."""
    names = ("model", "weights", "against", "against_weights", "data", "seed", "batch_size")
    return {"command": {**{name: getattr(arguments, name) for name in names}, "device": str(device)}}


def _written(result: CKAResult, out: Path) -> dict[str, Path]:
    """What was written into `out`: a short name -> the path. Pictures need their extras, the result does not."""
    paths = {"result": out / "cka.json"}
    result.save(paths["result"])
    pictures: list[tuple[str, Path, Callable[[Path], Any]]] = [("heatmap", out / "cka.png", result.plot)]
    if len(result.models) == 2:
        pictures.append(("between", out / "between.png", result.between(*result.models).plot))
    pictures.append(("page", out / "cka.html", result.to_html))
    for name, path, write in pictures:
        try:
            write(path)
        except MissingExtraError as error:
            print(f"cka-hooks: no {name}: {error}", file=sys.stderr)
        else:
            paths[name] = path
    return paths


def _report(result: CKAResult, paths: dict[str, Path], *, complete: bool) -> dict[str, Any]:
    """What ``--json`` prints."""
    errors = result.stderr[~result.stderr.isnan()]
    return {
        "complete": complete,
        "files": {name: str(path) for name, path in paths.items()},
        "layers": list(result.layers),
        "samples": result.samples,
        "minibatches": result.minibatches,
        "largest_stderr": float(errors.max()) if len(errors) else None,
        "summary": result.summary().splitlines(),
        "skipped": result.skipped,
        "degenerate": result.degenerate,
    }
