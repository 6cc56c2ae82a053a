"""Peak memory of a run above that of the bare forward pass, in a process of its own."""

from __future__ import annotations

import processes
import pytest

MEASURE = """
import resource, sys, warnings
import torch, torchvision
import cka_hooks

warnings.simplefilter("ignore")
torch.set_num_threads(1)
name, pixels, size, minibatch = sys.argv[1], *map(int, sys.argv[2:5])
torch.manual_seed(0)
model = getattr(torchvision.models, name)().eval()
batch = torch.randn(size, 3, pixels, pixels)

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

# A small run first: code that is loaded on first use is no part of what a run needs.
cka_hooks.compare(model, [batch[:4, :, :32, :32]], progress=False)
with torch.no_grad():
    model(batch)
    model(batch)
before = peak()
result = cka_hooks.compare(model, [batch, batch], minibatch=minibatch or None, progress=False)
print(len(result.layers), before, peak() - before)
"""


def measured(name: str, pixels: int, size: int, minibatch: int = 0) -> tuple[int, float, float]:
    done = processes.finished("-c", MEASURE, name, str(pixels), str(size), str(minibatch), seconds=900)
    assert done.returncode == 0, done.stderr
    layers, before, above = done.stdout.split()
    print(f"{name}, {pixels} pixels, batch {size}, {layers} layers: {before} MB bare, {above} MB above")
    return int(layers), float(before), float(above)


def test_small() -> None:
    """All activations of this run would be 200 MB, twice that where they are copied."""
    layers, _, above = measured("resnet18", 64, 128)
    assert layers > 50
    assert above < 60


@pytest.mark.slow
def test_resnet50_at_224_pixels() -> None:
    """Its activations are 8 GB a batch of 64."""
    layers, _, above = measured("resnet50", 224, 64)
    assert layers > 150
    assert above < 150


CAREFUL = """
import resource, torch
from cka_hooks.similarity.products import reference as gram

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

torch.set_num_threads(1)
x = torch.randn(1, 32, 1, 800_000)
gram.shifted(x[..., :5000], torch.float64)
before = peak()
gram.shifted(x, torch.float64)
print(peak() - before)
"""


def test_the_most_careful_product_widens_a_piece_at_a_time() -> None:
    """The layer is 102 MB, and widened it would be 205."""
    done = processes.finished("-c", CAREFUL)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40
