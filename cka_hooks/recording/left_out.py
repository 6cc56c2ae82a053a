"""Say why chosen layers are not in a result, where no forward hook of theirs has run to say it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cka_hooks.recording.layers import ROOT, Selection
from cka_hooks.recording.routes import Tap


def twice_named(taps: Iterable[Tap]) -> dict[str, str]:
    """Further names of modules that were asked for under several names, and the reason for leaving them out."""
    return {
        selection.label(1, other): f"is the same module as {selection.name!r}"
        for tap in taps
        for selection in tap.selections
        for other in selection.also
    }


def silent(taps: Mapping[int, Tap], names: Mapping[str, nn.Module], *, by_default: bool) -> dict[str, str]:
    """Layers that have not run in any forward pass so far, and the reason for each.

    Args:
        taps: a tap for each module, by the module's id.
        names: the model's modules.
        by_default: whether nobody asked for these layers. Modules that contain others are then not expected to run.
    """
    skipped = {}
    for tap in taps.values():
        for selection in tap.selections:
            if tap.ran:
                if selection.calls is not None and not selection.calls & set(range(1, tap.calls + 1)):
                    skipped[selection.label(min(selection.calls))] = f"was called {tap.calls} time(s)"
            elif not by_default or (next(tap.module.children(), None) is None and selection.name != ROOT):
                skipped[selection.label(1)] = _why(selection, tap, taps, names)
    return skipped


def _why(selection: Selection, tap: Tap, taps: Mapping[int, Tap], names: Mapping[str, nn.Module]) -> str:
    if tap.elsewhere:
        return (
            "ran in a different thread from the one that entered the recorder, which records its own calls only "
            "(nn.DataParallel runs its replicas in threads: call model.module)"
        )
    first_names = {id(module): name for name, module in reversed(list(names.items())) if name != ROOT}
    above = [
        first_names[key]
        for key, other in taps.items()
        if other.ran and key in first_names and any(part is selection.module for part in other.module.modules())
    ]
    did_its_work = max(above, key=len, default=None)
    parent, _, own = selection.name.rpartition(".")
    if did_its_work is None and own == "out_proj" and isinstance(selection.module, NonDynamicallyQuantizableLinear):
        did_its_work = parent
    if not did_its_work:
        return "did not run in the forward pass"
    return f"did not run: {did_its_work!r} did its work without calling it"
