"""
Tensors in hand
===============


No model, no loader: what CKA ignores, and what it does not.

Run ``python examples/tensors.py``.
"""

# sphinx_gallery_thumbnail_path = "figures/invariances.png"
import sys

import torch

import cka_hooks


def main(quick: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200 if quick else 1000, 20, generator=generator)
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator)).Q
    stretch = torch.diag(torch.linspace(0.1, 3, 20))
    noise = torch.randn(len(x), 20, generator=generator)

    print("x against")
    print(f"  itself, rotated, scaled, shifted  {cka_hooks.cka(x, 5 * x @ rotation + 1):.3f}")
    print(f"  itself, unevenly stretched        {cka_hooks.cka(x, x @ stretch):.3f}")
    print(f"  itself with as much noise         {cka_hooks.cka(x, x + noise):.3f}")
    print(f"  noise alone, unbiased             {cka_hooks.cka(x, noise):+.3f}")
    print(f"  noise alone, biased               {cka_hooks.cka(x, noise, estimator='biased'):+.3f}")
    print(f"  itself with noise, rbf kernel     {cka_hooks.cka(x, x + noise, kernel='rbf'):.3f}")
    some = cka_hooks.cka(x, x + noise, subset=100, generator=torch.Generator().manual_seed(1))
    print(f"  the same of 100 samples, linear   {some:.3f}")

    layers = [x]
    for _ in range(4):
        layers.append(torch.tanh(layers[-1] @ torch.randn(20, 20, generator=generator) / 3))
    matrix = cka_hooks.cka_matrix(layers)
    print("five random tanh layers, each fed by the one before")
    for row in matrix.tolist():
        print("  " + "  ".join(f"{value:.2f}" for value in row))
    return matrix


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
