"""
Clean against corrupted images
==============================


Where does noise stop being visible, and where does it start to matter? Two names for one model, each with its own
view of the batch, give two sets of layers over the same samples.

Run ``python examples/clean_and_corrupted.py``. It needs ``pip install "cka-hooks[demo]"``.
"""

# sphinx_gallery_thumbnail_path = "pictures/clean_and_corrupted.png"
import sys

import torch
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.command.demo import BLOCKS, accuracy, digits, trained


def main(quick: bool = False) -> cka_hooks.CKAResult:
    train, held_out = digits()
    if quick:
        train = torch.utils.data.TensorDataset(*(tensor[:128] for tensor in train.tensors))
    model = trained(train, seed=0, epochs=1 if quick else 5, progress=not quick)
    print(f"{accuracy(model, held_out):.1%} of the clean held-out digits right")

    def clean(model, batch):
        return model(batch[0])

    def noisy(model, batch):
        return model(batch[0] + 0.7 * torch.randn_like(batch[0]))

    result = cka_hooks.compare(
        {"clean": model, "noisy": model},
        DataLoader(held_out, batch_size=64, shuffle=True),
        layers=["conv1", BLOCKS, "fc"],
        forward={"clean": clean, "noisy": noisy},
        progress=not quick,
    )
    print("CKA of each layer's clean and noisy representation")
    for label in result.between("clean", "noisy").rows:
        layer = result.layer_of(label)
        value = result[f"clean/{layer}", f"noisy/{layer}"]
        print(f"{layer:>10} {value:.3f} {'#' * round(40 * max(value, 0))}")
    if not quick:
        result.between("clean", "noisy").plot("clean_and_corrupted.png")
        print("clean_and_corrupted.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
