"""What to keep of a network that was measured, so that it can be compared later without the network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from cka_hooks.errors import OptionError
from cka_hooks.results.result import CKAResult
from cka_hooks.run.comparison import Comparison
from cka_hooks.run.in_turn import kept_on_cpu, refuse_other_positions
from cka_hooks.run.outcome import finished
from cka_hooks.similarity.batch import Minibatches, Step
from cka_hooks.similarity.estimate import too_few
from cka_hooks.similarity.state import DECLARED, State


@dataclass(frozen=True)
class Footprint:
    """The centred Gram matrices of a network's layers over a loader, on the CPU.

    Attributes:
        state: the sums of its run.
        steps: what each batch added.
        type: the class of the network.
        settings: settings of its run, plain JSON values.
        places: see :attr:`Comparison.places`.
    """

    state: State
    steps: list[Step]
    type: str
    settings: dict[str, Any]
    places: int | None = None

    @classmethod
    def left_by(cls, comparison: Comparison, loader: Iterable[Any]) -> Footprint:
        """The footprint of a comparison's network, from one pass over a loader.

        Raises:
            TooFewSamplesError: there is no batch, or no minibatch of at least 4 samples.
            CKAError: see :meth:`Comparison.update`.
        """
        steps: list[Step] = []
        keep = kept_on_cpu(steps)
        with comparison:
            for batch in loader:
                if not comparison.passes_over(batch):
                    comparison.observe(batch)
                    keep(comparison.step())
            if (rest := comparison.flush()) is not None:
                keep(rest)
        if not comparison.state.minibatches:
            raise too_few(comparison.state)
        (kind,) = comparison.types.values()
        return cls(comparison.state.to("cpu"), steps, kind, comparison.settings, comparison.places)

    def named(self, name: str) -> tuple[State, list[Step]]:
        """Its state and steps with labels ``name/layer``."""

        def label(of_layers: Any) -> Any:
            if isinstance(of_layers, tuple):
                return tuple(f"{name}/{layer}" for layer in of_layers)
            return {f"{name}/{layer}": value for layer, value in of_layers.items()}

        fields = ["layers", *(field for field, it in DECLARED.items() if it.of_layers)]
        state = dataclasses.replace(self.state, **{field: label(getattr(self.state, field)) for field in fields})
        steps = []
        for step in self.steps:
            groups = [group._replace(layers=label(group.layers)) for group in step.groups]
            steps.append(step._replace(dtypes=label(step.dtypes), groups=groups))
        return state, steps

    def state_dict(self) -> dict[str, Any]:
        """The footprint as numbers, text, lists and mappings of these, and tensors."""
        steps = [
            {**step._asdict(), "groups": [{**it._asdict(), "layers": list(it.layers)} for it in step.groups]}
            for step in self.steps
        ]
        kept = {name: getattr(self, name) for name in ("type", "settings", "places")}
        return {"state": self.state.state_dict(), "steps": steps, **kept}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Footprint:
        """Restore what :meth:`state_dict` returned.

        Raises:
            OptionError: this is anything else.
        """
        try:
            steps = []
            for step in state["steps"]:
                groups = [Minibatches(**{**it, "layers": tuple(it["layers"])}) for it in step["groups"]]
                steps.append(Step(**{**step, "groups": groups}))
            own = State.from_state_dict(state["state"])
            return cls(own, steps, state["type"], dict(state["settings"]), state.get("places"))
        except (KeyError, TypeError) as error:
            raise OptionError(
                f"this is not the CKA of a network in training: {type(error).__name__} {error}"
            ) from error


def compared(parts: Mapping[str, Footprint], settings: Mapping[str, Any]) -> CKAResult:
    """The result of several networks, as if they had run together.

    Args:
        parts: the footprint of each network by name. The settings are those of the first.
        settings: further settings.

    Raises:
        OptionError: the networks were measured with different options.
        SampleCountError: they were measured on different numbers of samples, or other positions.
        NonFiniteError: a layer has NaN or infinity. `.partial` has the result of all others.
    """
    first, ours = next(iter(parts.items()))
    for name, part in parts.items():
        for option, value in ours.settings.items():
            if option not in ("layers", "forward") and part.settings.get(option) != value:
                raise OptionError(
                    f"{name!r} was measured with {option}={part.settings.get(option)!r}, and {first!r} with "
                    f"{value!r}: go on with the options of the run that wrote the checkpoint"
                )
    refuse_other_positions({name: part.places for name, part in parts.items()})
    named = {name: part.named(name) for name, part in parts.items()}
    steps = {name: its for name, (_, its) in named.items()}
    state = State.joined({name: its for name, (its, _) in named.items()}, steps, keep=False)
    types = {name: part.type for name, part in parts.items()}
    return finished(state, types, {**ours.settings, **settings})
