"""Masks fall where they belong, or it is said where they do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from test_features import text
from test_models import bert, t5
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import cka_hooks

pytestmark = pytest.mark.filterwarnings("ignore:one sample decides", "ignore:a batch came twice")
LENGTHS = torch.tensor([6, 5, 2, 3, 6, 4, 1, 2])


def mean(x: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        return x.mean(1)
    kept = (mask != 0).to(x.dtype)[..., None]
    return (x * kept).sum(1) / kept.sum(1)


def last(x: Tensor, mask: Tensor | None = None) -> Tensor:
    if mask is None:
        return x[:, -1]
    return torch.stack([row[keep != 0][-1] for row, keep in zip(x, mask, strict=True)])


Take = Callable[[Tensor, Any], Tensor]


def expected(model: nn.Module, batches: Sequence[Any], take: dict[str, Take], call: Any) -> np.ndarray:
    """The oracle's CKA of what `take` makes of each layer's first tensor and the batch."""
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[name] = (output if isinstance(output, Tensor) else output[0]).double()

        return hook

    modules = dict(model.named_modules())
    handles = [modules[name.split(":")[0]].register_forward_hook(hook_for(name)) for name in take]
    grams = []
    with torch.no_grad():
        for batch in batches:
            call(model.eval(), batch)
            grams.append([oracle.linear_gram(function(seen[name], batch).numpy()) for name, function in take.items()])
    for handle in handles:
        handle.remove()
    return oracle.cka_minibatch(grams)


def check(
    model: nn.Module,
    batches: Sequence[Any],
    take: dict[str, Take],
    features: str = "mean",
    call: Any = lambda model, batch: model(**batch),
    **options: Any,
) -> cka_hooks.CKAResult:
    result = cka_hooks.compare(model, batches, layers=list(take), features=features, progress=False, **options)
    matrix = expected(model, batches, take, call)
    order = [list(take).index(layer) for layer in result.layers]
    np.testing.assert_allclose(result.matrix.numpy(), matrix[order][:, order], rtol=0, atol=1e-6)
    return result


def tokens(length: int, count: int = 3, lengths: Tensor = LENGTHS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.arange(length) < lengths[:, None]).long()
    return [
        {"ids": torch.randint(1, 20, (len(lengths), length), generator=generator) * mask, "attention_mask": mask}
        for _ in range(count)
    ]


class Reader(nn.Module):
    """Does nothing with the mask but to take it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.mix = nn.Linear(6, 5)
        self.act = nn.Tanh()

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.act(self.mix(self.embed(ids)))


def masked(how: Callable[..., Tensor], key: str = "attention_mask") -> Take:
    return lambda x, batch: how(x, batch[key])


def unmasked(how: Callable[..., Tensor]) -> Take:
    return lambda x, batch: how(x)


# Whose mask it is


class TwoTowers(nn.Module):
    """A caption of T tokens and a picture of T patches."""

    def __init__(self) -> None:
        super().__init__()
        self.text = Reader()
        self.patches = nn.Linear(4, 5)
        self.picture = nn.Tanh()

    def forward(self, ids: Tensor, picture: Tensor, attention_mask: Tensor) -> Tensor:
        return self.text(ids).mean(1) + self.picture(self.patches(picture)).mean(1)


@pytest.mark.parametrize("features", ["mean", "last"])
def test_a_captions_mask_is_not_a_pictures(features: str) -> None:
    how = {"mean": mean, "last": last}[features]
    generator = torch.Generator().manual_seed(0)
    batches = [{**batch, "picture": torch.randn(8, 6, 4, generator=generator)} for batch in tokens(6)]
    take = {"text.act": masked(how), "text.embed": masked(how), "picture": unmasked(how), "patches": unmasked(how)}
    check(TwoTowers(), batches, take, features)


@pytest.mark.parametrize("length", [17, 20])
def test_clip(length: int) -> None:
    transformers = pytest.importorskip("transformers")
    text_config = {
        "vocab_size": 60,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "eos_token_id": 59,
    }
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text_config, vision_config=vision)).eval()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        ids = torch.randint(3, 58, (8, length), generator=generator)
        mask = (torch.arange(length) < torch.arange(4, 12)[:, None]).long()
        ids[torch.arange(8), torch.arange(4, 12) - 1] = 59
        pixels = torch.randn(8, 3, 32, 32, generator=generator)
        batches.append({"input_ids": ids, "attention_mask": mask, "pixel_values": pixels})
    take = {"text_model.encoder.layers.0": masked(mean), "vision_model.encoder.layers.0": unmasked(mean)}
    check(model, batches, take)


def test_a_mask_whose_length_changes() -> None:
    batches = [batch for length in (6, 9, 7) for batch in tokens(length, 1)]
    check(Reader(), batches, {"embed": masked(mean), "act": masked(mean)})


def test_a_width_that_is_the_length() -> None:
    batches = tokens(6)
    take = {"embed": masked(mean)}
    check(Reader(), batches, {**take, "mix": masked(mean)})


def test_without_zeros_nothing_is_said() -> None:
    batches = tokens(6)
    for batch in batches:
        batch["attention_mask"] = torch.ones(8, 6, dtype=torch.bool)
    check(Reader(), batches, {"embed": unmasked(mean), "act": unmasked(mean)})


@pytest.mark.parametrize("features", ["mean", "last"])
def test_frames_of_speech(features: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        vocab_size=12,
    )
    model = transformers.Wav2Vec2Model(config).eval()
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(900) < torch.tensor([900, 700, 500, 810, 620, 333, 450, 888])[:, None]).long()
    batches = [
        {"input_values": torch.randn(8, 900, generator=generator) * mask, "attention_mask": mask} for _ in range(2)
    ]
    how = {"mean": mean, "last": last}[features]

    def framed(x: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return how(x, model._get_feature_vector_attention_mask(x.shape[1], batch["attention_mask"]))

    check(
        model,
        batches,
        {"feature_projection:0": framed, "encoder.layers.0": framed, "encoder.layers.1": framed},
        features,
    )
    with pytest.warns(cka_hooks.CKAWarning, match="in 'encoder.layers.0'.* counts as data.*features='flatten' keeps"):
        cka_hooks.compare(model, batches, layers="encoder.layers.*", progress=False)


class Prompted(nn.Module):
    """Two virtual tokens stand in front."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6)
        self.prompt = nn.Parameter(torch.randn(2, 6))
        self.mix = nn.Linear(6, 5)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.mix(torch.cat([self.prompt.expand(len(ids), -1, -1), self.embed(ids)], 1))


def test_virtual_tokens() -> None:
    batches = tokens(6)
    with pytest.warns(
        cka_hooks.CKAWarning,
        match=r"padding in 'mix' counts as data: .*attention_mask has zeros and was not used.*mask= names",
    ):
        check(Prompted(), batches, {"embed": masked(mean), "mix": unmasked(mean)})

    def longer(batch: Any) -> Tensor:
        return torch.cat([torch.ones(8, 2), batch["attention_mask"]], 1)

    take = {"embed": masked(mean), "mix": lambda x, batch: mean(x, longer(batch))}
    check(Prompted(), batches, take, mask={"mix": longer})
    # Nobody's mask at all.
    check(Prompted(), batches, {"embed": unmasked(mean), "mix": unmasked(mean)}, mask={"**": None})


# Said by the user


@pytest.mark.parametrize("kind", ["int", "bool", "float", "numpy"])
def test_pairs_of_ids_and_mask(kind: str) -> None:
    as_kind = {"int": lambda m: m, "bool": lambda m: m != 0, "float": lambda m: m * 0.5, "numpy": lambda m: m.numpy()}
    batches = [(batch["ids"], as_kind[kind](batch["attention_mask"])) for batch in tokens(6)]
    take = {
        "embed": lambda x, batch: mean(x, torch.as_tensor(batch[1])),
        "act": lambda x, batch: mean(x, torch.as_tensor(batch[1])),
    }
    call = lambda model, batch: model(batch[0])  # noqa: E731
    check(Reader(), batches, take, call=call, mask=lambda batch: batch[1])
    if kind != "int":
        return
    with pytest.warns(
        cka_hooks.CKAWarning,
        match=r"in 'embed', 'act' .*batch\[1\] looks like a mask.*mask=lambda batch: batch\[1\] uses it",
    ):
        check(Reader(), batches, dict.fromkeys(take, unmasked(mean)), call=call)


def test_classes_of_tokens_are_no_mask() -> None:
    batches = [(batch["ids"], batch["ids"] % 2) for batch in tokens(6)]
    check(Reader(), batches, {"act": unmasked(mean)}, call=lambda model, batch: model(batch[0]))


@pytest.mark.parametrize("key", ["src_key_padding_mask", "pad"])
def test_masks_of_padding_are_inverted(key: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor, **masks: Tensor) -> Tensor:
            return self.head(self.encode(x, src_key_padding_mask=masks[key]))

    generator = torch.Generator().manual_seed(0)
    padding = torch.arange(6) >= LENGTHS[:, None]
    batches = [{"x": torch.randn(8, 6, 6, generator=generator), key: padding} for _ in range(2)]
    take = {"encode": lambda x, batch: mean(x, ~batch[key])}
    take["head"] = take["encode"]
    check(Encoder(), batches, take, mask=lambda batch: ~batch[key])
    with pytest.warns(cka_hooks.CKAWarning, match=rf"mask=lambda batch: ~batch\['{key}'\] uses it"):
        check(Encoder(), batches, dict.fromkeys(take, unmasked(mean)))


def test_a_named_mask_is_not_put_on_other_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [
        (batch["ids"], torch.randn(8, 6, 4, generator=generator), batch["attention_mask"]) for batch in tokens(6)
    ]
    take = {"text.act": lambda x, batch: mean(x, batch[2]), "picture": unmasked(mean)}
    call = lambda model, batch: model(*batch)  # noqa: E731
    check(TwoTowers(), batches, take, call=call, forward=call, mask=lambda batch: batch[2])
    # By pattern it is the user who knows.
    both = dict.fromkeys(take, take["text.act"])
    check(TwoTowers(), batches, both, call=call, forward=call, mask={"**": lambda batch: batch[2]})


def test_a_mask_where_nothing_can_be_cut() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(4, 6)
            self.position = nn.Parameter(torch.randn(6, 6))

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.embed(x + self.position[:, :4])

    generator = torch.Generator().manual_seed(0)
    batches = [
        {"x": torch.randn(8, 6, 4, generator=generator), "attention_mask": batch["attention_mask"]}
        for batch in tokens(6)
    ]
    with pytest.warns(cka_hooks.CKAWarning, match="padding in 'embed' .* was not used"):
        check(Fixed(), batches, {"embed": unmasked(mean)})
    # The user says that it is a mask, and not of which layers.
    with pytest.warns(cka_hooks.CKAWarning, match="padding in 'embed' was left out by size"):
        check(Fixed(), batches, {"embed": masked(mean)}, mask=lambda batch: batch["attention_mask"])
    check(Fixed(), batches, {"embed": masked(mean)}, mask={"embed": lambda batch: batch["attention_mask"]})


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ("attention_mask", cka_hooks.OptionError, "mask= has str: expected a function of a batch"),
        (torch.ones(8, 6), cka_hooks.OptionError, "mask= has Tensor"),
        ({"embed": 3}, cka_hooks.OptionError, "mask= has int"),
        ({"none": None}, cka_hooks.OptionError, "'none', which matches no layer"),
        (
            lambda batch: batch["attention_mask"][:4],
            cka_hooks.BatchError,
            r"returned \(4, 6\) for a batch of 8 samples",
        ),
        (lambda batch: batch["attention_mask"][0], cka_hooks.BatchError, r"returned \(6,\).*expected \(n, T\)"),
        (lambda batch: "mask", cka_hooks.BatchError, "returned str"),
    ],
)
def test_what_is_no_mask(mask: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cka_hooks.compare(Reader(), tokens(6), features="mean", mask=mask, progress=False)


# Encoders and decoders


def test_labels_that_a_loss_leaves_out_are_padding_of_the_decoder() -> None:
    model = t5()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for batch in tokens(6):
        labels = torch.randint(1, 20, (8, 4), generator=generator)
        labels[torch.arange(4) >= torch.tensor([4, 3, 2, 4, 1, 2, 3, 4])[:, None]] = -100
        batches.append({"input_ids": batch["ids"], "attention_mask": batch["attention_mask"], "labels": labels})
    decoder: Take = lambda x, batch: mean(x, batch["labels"] != -100)  # noqa: E731
    take = {"encoder.block.0": masked(mean), "decoder.block.0": decoder, "decoder.block.1": decoder}
    # What a decoder makes of the encoder's states has the encoder's positions.
    take["decoder.block.0.layer.1.EncDecAttention.k"] = masked(mean)
    check(model, batches, take)


def test_a_decoder_without_a_mask_of_its_own_is_named() -> None:
    model = t5()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": batch["ids"],
            "attention_mask": batch["attention_mask"],
            "decoder_input_ids": torch.randint(1, 20, (8, 6), generator=generator),
        }
        for batch in tokens(6)
    ]
    take = {"encoder.block.0": masked(mean), "decoder.block.0": unmasked(mean)}
    with pytest.warns(
        cka_hooks.CKAWarning, match="padding in 'decoder.block.0' .*attention_mask has zeros and was not used"
    ):
        check(model, batches, take)
    for batch in batches:
        batch["decoder_attention_mask"] = batch["attention_mask"].flip(0)
    check(model, batches, {**take, "decoder.block.0": masked(mean, "decoder_attention_mask")})


# Everything together


def test_max_samples_of_a_padded_batch() -> None:
    model, batches = Reader(), tokens(6, 1)
    options: dict[str, Any] = {"layers": ["embed", "act"], "features": "mean", "progress": False}
    result = cka_hooks.compare(model, batches, max_samples=5, **options)
    some = [{key: value[:5] for key, value in batch.items()} for batch in batches]
    take = {"embed": masked(mean), "act": masked(mean)}
    matrix = expected(model, some, take, lambda model, batch: model(**batch))
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", ["keywords", "positional"])
def test_in_a_loop_of_ones_own(how: str) -> None:
    model, seen = Reader(), []
    mask = None if how == "keywords" else lambda args: args[1]
    recorder = cka_hooks.LayerRecorder(
        model, "act", lambda layer, x: seen.append(x.clone()), features="mean", mask=mask
    )
    batches = tokens(6)
    with recorder, torch.no_grad():
        for batch in batches:
            if how == "keywords":
                model(**batch)
            else:
                model(batch["ids"], batch["attention_mask"])
    for batch, found in zip(batches, seen, strict=True):
        torch.testing.assert_close(found, mean(model(batch["ids"]), batch["attention_mask"]))


def test_where_parts_of_a_model_run_nothing_confirms_a_mask() -> None:
    model, batch = Reader(), tokens(6)[0]
    seen: list[Tensor] = []
    recorder = cka_hooks.LayerRecorder(
        model,
        "act",
        lambda layer, x: seen.append(x.clone()),
        features="mean",
        batch_dim=0,
        mask=lambda batch: batch["attention_mask"],
    )
    with (
        recorder,
        pytest.warns(cka_hooks.CKAWarning, match="left out by size.*as a mapping from layer pattern"),
        recorder.forward_pass(batch),
    ):
        out = model.act(model.mix(model.embed(batch["ids"])))
    torch.testing.assert_close(seen[0], mean(out, batch["attention_mask"]))


def test_a_first_batch_without_a_mask() -> None:
    model, batches = Reader(), tokens(6)
    first = {"ids": batches[0]["ids"]}
    streamed = list(cka_hooks.LayerRecorder(model, "act", features="mean").stream([first, *batches]))
    torch.testing.assert_close(streamed[0]["act"], mean(model(**first)))
    for batch, found in zip(batches, streamed[1:], strict=True):
        torch.testing.assert_close(found["act"], mean(model(**batch), batch["attention_mask"]))


def test_flatten_names_the_layers() -> None:
    with pytest.warns(cka_hooks.CKAWarning, match=r"padding in 'embed', 'act' counts as data"):
        cka_hooks.compare(Reader(), tokens(6), layers=["embed", "act"], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cka_hooks.CKAWarning)
        cka_hooks.compare(bert(), [text(11)], layers=["bert.pooler.dense", "classifier"], progress=False)


def test_a_mask_of_pixels_is_said() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch = nn.Conv2d(3, 6, 4, 4)
            self.block = nn.Linear(6, 6)

        def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> Tensor:
            return self.block(self.patch(pixel_values).flatten(2).mT)

    generator = torch.Generator().manual_seed(0)
    counts = torch.ones(8, 12, 12).long()
    counts[2, :, 8:], counts[5, 4:] = 0, 0
    batches = [{"pixel_values": torch.randn(8, 3, 12, 12, generator=generator), "pixel_mask": counts} for _ in "ab"]
    said = r"in 'block' .*'pixel_mask'\] looks like a mask.*as \(n, T\)"
    with pytest.warns(cka_hooks.CKAWarning, match=said):
        check(Patches(), batches, {"block": unmasked(mean)})


# Lengths


class Sequences(nn.Module):
    """Padded sequences (n, T, 4), packed and unpacked where their lengths are given."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        if lengths is None:
            return self.head(self.gru(x)[0])
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return self.head(pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])[0])


SHORTER = torch.tensor([9, 3, 5, 9, 2, 7, 4, 6])


def padded_sequences(fill: float = 0.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.arange(9) < SHORTER[:, None]
    return [torch.where(counts[..., None], torch.randn(8, 9, 4, generator=generator), fill) for _ in range(2)]


@pytest.mark.parametrize("features", ["mean", "flatten"])
@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_lengths_that_nobody_used_are_said(form: str, features: str) -> None:
    batches: list[Any] = [(x, SHORTER) for x in padded_sequences(fill=-1.0)]
    call = lambda model, batch: model(*batch)  # noqa: E731
    options: dict[str, Any] = {"layers": ["head"], "progress": False}
    if form == "dict":
        batches = [{"x": x, "lengths": lengths} for x, lengths in batches]
        what, use = r"batch\['lengths'\]", r"torch.arange\(batch\['x'\].shape\[1\]\) < batch\['lengths'\]\[:, None\]"
    else:
        options["forward"] = call
        what, use = r"batch\[1\]", r"torch.arange\(batch\[0\].shape\[1\]\) < batch\[1\]\[:, None\]"
    said = rf"padding in 'head' counts as data: {what} looks like the lengths.*mask=lambda batch: {use}"
    with pytest.warns(cka_hooks.CKAWarning, match=said) as record:
        cka_hooks.compare(Sequences(), batches, features=features, **options)
    assert len(record) == 1


def test_lengths_as_they_are_advised() -> None:
    batches = [(x, SHORTER) for x in padded_sequences()]
    counts: Take = lambda x, batch: mean(x, torch.arange(9) < batch[1][:, None])  # noqa: E731
    call = lambda model, batch: model(*batch)  # noqa: E731
    mask = lambda batch: torch.arange(batch[0].shape[1]) < batch[1][:, None]  # noqa: E731
    check(Sequences(), batches, {"head": counts}, call=call, forward=call, mask=mask)


@pytest.mark.parametrize(
    "classes", [SHORTER - 1, SHORTER, SHORTER + 5, torch.ones(8).long(), torch.tensor([9, 9, 9, 9, 9, 9, 9, 8])]
)
def test_classes_are_no_lengths(classes: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 9, 4, generator=generator), classes) for _ in range(2)]
    take = {"head": unmasked(mean)}
    check(Sequences(), batches, take, call=lambda model, batch: model(batch[0]))


def test_lengths_cost_nothing_if_no_layer_has_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = cka_hooks.LayerRecorder(nn.Sequential(nn.Flatten(), nn.Linear(36, 3)), consumer=lambda layer, x: None)
    with recorder, torch.no_grad():
        for x in padded_sequences():
            recorder.run((x, SHORTER))

            def refused(*args: object) -> None:
                raise AssertionError("the long way")

            monkeypatch.setattr("cka_hooks.recording.dimensions.SampleDimension.of", refused)


class WithMask(nn.Module):
    """A layer sees the mask by itself, and two inputs have its positions."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(5, 8), nn.Linear(3, 8)
        self.act, self.missing = nn.ReLU(), nn.Linear(1, 8)

    def forward(self, x: Tensor, attention_mask: Tensor, y: Tensor | None = None) -> Tensor:
        hidden = self.one(x) if y is None else self.one(x) + self.other(y)
        return self.act(hidden).mean(1) + self.missing(attention_mask.float()[..., None]).mean(1)


@pytest.mark.parametrize("both", [False, True])
def test_a_mask_that_a_layer_sees_by_itself_still_belongs_to_the_others(both: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    net, batches = WithMask(), []
    for _ in range(3):
        mask = (torch.arange(7) < torch.randint(2, 8, (12, 1), generator=generator)).long()
        batch = {"x": torch.randn(12, 7, 5, generator=generator), "attention_mask": mask}
        batches.append({**batch, "y": torch.randn(12, 7, 3, generator=generator)} if both else batch)
    result = cka_hooks.compare(net, batches, features="mean", layers=["one", "act"], progress=False)
    by_hand = cka_hooks.CKAAccumulator()
    for batch in batches:
        one = net.one(batch["x"])
        hidden, there = one + net.other(batch["y"]) if both else one, batch["attention_mask"][..., None]
        pooled = [(it * there).sum(1) / there.sum(1) for it in (one, hidden.relu())]
        by_hand.update({"one": pooled[0].detach(), "act": pooled[1].detach()})
    assert result["one", "act"] == pytest.approx(by_hand.compute()["one", "act"], abs=1e-6)


@pytest.mark.parametrize("length", [64, 1024])
def test_padding_of_a_model_that_pads_to_a_multiple(length: int) -> None:
    """One position less changes one position of what is as long as before."""

    class Pads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.last = nn.Embedding(100, 32), nn.Linear(32, 8)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            h = self.embed(input_ids)
            return self.last(nn.functional.pad(h, (0, 0, 0, -input_ids.shape[1] % 64)))

    mask = (torch.arange(length) < torch.randint(length // 4, length, (8, 1))).long()
    batch = {"input_ids": torch.randint(100, (8, length)), "attention_mask": mask}
    with pytest.warns(cka_hooks.CKAWarning, match="padding in 'last' counts as data"):
        cka_hooks.compare(Pads(), [batch], features="mean", progress=False)
