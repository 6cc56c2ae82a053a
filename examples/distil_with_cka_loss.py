"""
Distillation with CKA as a loss
===============================


``cka_loss`` draws the stages of a ResNet-18 towards those of a ResNet-34. Two students start from the same weights
and see the same digits in the same order, one of them with the loss. CKA does not need layers of equal width. Here,
the ends of all four stages of both networks are compared.

Run ``python examples/distil_with_cka_loss.py``. It needs ``pip install "cka-hooks[demo]"``.
"""

# sphinx_gallery_thumbnail_path = "pictures/distil_with_cka_loss.png"
from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet, resnet18, resnet34

import cka_hooks
from cka_hooks.command.demo import accuracy, digits

# The last block of each stage, of the student and of the teacher.
STAGES = {"layer1.1": "layer1.2", "layer2.1": "layer2.3", "layer3.1": "layer3.5", "layer4.1": "layer4.2"}


def small(build: Callable[..., ResNet]) -> ResNet:
    """For digits of 8 x 8 pixels: one channel, and a stem that leaves something of them."""
    torch.manual_seed(0)
    network = build(num_classes=10)
    network.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network


def train(network: nn.Module, data: TensorDataset, epochs: int, teacher: nn.Module | None = None) -> nn.Module:
    loader = DataLoader(data, 64, shuffle=True, drop_last=True, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.02, momentum=0.9)
    network.train()
    mine: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        if teacher is not None:
            hooks.enter_context(cka_hooks.LayerRecorder(network, list(STAGES), mine.__setitem__, detach=False))
            hooks.enter_context(cka_hooks.LayerRecorder(teacher, list(STAGES.values()), theirs.__setitem__))
        for _ in range(epochs):
            for images, classes in loader:
                loss = nn.functional.cross_entropy(network(images), classes)
                if teacher is not None:
                    with torch.no_grad():
                        teacher(images)
                    apart = [cka_hooks.cka_loss(mine[layer], theirs[other]) for layer, other in STAGES.items()]
                    loss = loss + torch.stack(apart).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network.eval()


def draw(found: dict[str, list[float]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.add_subplot()
    for name, values in found.items():
        axes.plot(list(STAGES), values, "o-", label=name)
    axes.set(ylim=(0, 1), xlabel="block of the student", ylabel="CKA with the teacher's block")
    axes.legend(loc="lower left")
    figure.savefig("distil_with_cka_loss.png", dpi=150)
    print("distil_with_cka_loss.png")


def main(quick: bool = False) -> dict[str, list[float]]:
    training, held_out = digits()
    if quick:
        training, held_out = (TensorDataset(*data[:256]) for data in (training, held_out))
    epochs = 1 if quick else 4
    teacher = train(small(resnet34), training, 2 * epochs)
    print(f"teacher, ResNet-34           {accuracy(teacher, held_out):.1%} right")

    students = {"without the loss": train(small(resnet18), training, epochs)}
    students["with the loss"] = train(small(resnet18), training, epochs, teacher)

    found = {}
    for name, student in students.items():
        result = cka_hooks.compare(
            {"student": student, "teacher": teacher},
            DataLoader(held_out, 64, shuffle=True, generator=torch.Generator().manual_seed(2)),
            layers={"student": list(STAGES), "teacher": list(STAGES.values())},
            progress=False,
        )
        found[name] = [result[f"student/{layer}", f"teacher/{other}"] for layer, other in STAGES.items()]
        values = "  ".join(f"{value:.3f}" for value in found[name])
        right = accuracy(student, held_out)
        print(f"student {name:<20} {right:.1%} right, CKA of its stages to the teacher's  {values}")
    if not quick:
        draw(found)
    return found


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
