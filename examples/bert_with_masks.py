"""
A BERT, with padding left out
=============================


Sentences of different lengths are padded to the same length. With an ``attention_mask`` in the batch,
``features="mean"`` averages over the tokens that are not padding. The network is small, and its weights are random.

Run ``python examples/bert_with_masks.py``. It needs ``pip install transformers "cka-hooks[plot]"``.
"""

import sys

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

import cka_hooks


def sentences(count: int, vocabulary: int, longest: int) -> list[dict[str, torch.Tensor]]:
    """Made-up token ids, each sentence padded to `longest`, with its attention mask."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        length = int(torch.randint(4, longest + 1, (1,), generator=generator))
        ids = torch.zeros(longest, dtype=torch.long)
        ids[:length] = torch.randint(1, vocabulary, (length,), generator=generator)
        made.append({"input_ids": ids, "attention_mask": (torch.arange(longest) < length).long()})
    return made


def main(quick: bool = False) -> cka_hooks.CKAResult:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=500,
        hidden_size=64,
        num_hidden_layers=2 if quick else 6,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.2,  # of trained networks; with BERT's 0.02 all layers are alike
    )
    model = BertModel(config)
    loader = DataLoader(sentences(48 if quick else 512, 500, 24), batch_size=16 if quick else 32)

    result = cka_hooks.compare(
        model,
        loader,
        layers=["embeddings", "encoder.layer.*", "pooler"],
        features={"pooler": "flatten", "**": "mean"},  # the mean over tokens that are not padding
        progress=not quick,
    )
    print(result)
    print(result.summary())
    if not quick:
        result.plot("bert.png", values=True)
        print("bert.png")
    return result


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
