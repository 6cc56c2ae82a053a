"""CKA while a network trains: what is measured, that nothing else changes, and the callbacks of two trainers."""

from __future__ import annotations

import copy
import csv
import pickle
import random
from pathlib import Path

import numpy as np
import oracle
import processes
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import cka_hooks
from cka_hooks.integrations import TrainingCKA

pytestmark = [
    pytest.mark.filterwarnings("ignore:one sample decides"),
    pytest.mark.filterwarnings("ignore:::lightning"),
]


def network(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, width), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(width, 3))


def batches(count: int = 4) -> list[torch.Tensor]:
    return list(torch.randn(count, 32, 12, generator=torch.Generator().manual_seed(5)))


def changed(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator)
    return model


class All(nn.ModuleDict):
    """Networks as one."""

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [network(x) for network in self.values()]


def test_values_are_those_of_the_oracle_for_all_networks_at_once() -> None:
    model, teacher = network(), network(1, width=8)
    cka = TrainingCKA(batches(), layers=["0", "3"], network={"teacher": teacher})
    cka.start(model)
    then = {"initial": copy.deepcopy(model)}
    for step in (1, 2):
        then["previous"] = copy.deepcopy(model)
        changed(model, step)
        result = cka.measure(model, step)
    parts = {"now": model, **then, "teacher": teacher}
    asked = [f"{name}.{layer}" for name in parts for layer in "03"]
    labels, matrix, stderr = oracle.cka_of_model(All(parts), batches(), layers=asked)
    assert [label.replace("/", ".") for label in result.layers] == labels == asked
    np.testing.assert_allclose(result.matrix.numpy(), matrix, rtol=0, atol=1e-6)
    np.testing.assert_allclose(result.stderr.numpy(), stderr, rtol=1e-3, atol=1e-6)
    at_once = cka_hooks.compare(parts, batches(), layers=["0", "3"], progress=False)
    torch.testing.assert_close(result.pvalue(), at_once.pvalue(), rtol=1e-9, atol=0, equal_nan=True)
    assert result.settings["models"] == at_once.settings["models"]
    assert result.settings["step"] == 2
    assert set(cka.scalars()) == {f"cka/{to}/{layer}" for to in ("initial", "previous", "teacher") for layer in "03"}
    assert cka.scalars()["cka/teacher/3"] == result["now/3", "teacher/3"]


class Numbered(nn.Module):
    """One network for texts, padded or not, and for rows that come with their identifiers."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(12, 7), nn.Linear(7, 5)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.second(self.first(x).relu())


def of_rows() -> list[dict[str, object]]:
    return [{"x": x, "name": [f"{i}/{j}" for j in range(8)]} for i, x in enumerate(torch.cat(batches()).split(8))][:7]


def of_texts() -> list[dict[str, object]]:
    lengths = torch.tensor([9, 4, 6, 9])
    mask = (torch.arange(9) < lengths[:, None]).long()
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(4, 9, 12, generator=generator), "attention_mask": mask} for _ in range(4)]


@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (of_rows, {"sample_ids": "name"}),
        (of_rows, {"sample_ids": "name", "join_batches": 16}),
        (of_texts, {"per": "position"}),
        (of_texts, {"per": "position", "positions": 10, "seed": 3}),
    ],
    ids=lambda it: getattr(it, "__name__", str(it)),
)
def test_options_of_a_comparison_are_those_of_one_over_all_networks(loader, options) -> None:
    model, teacher = Numbered(0), Numbered(1)
    cka = TrainingCKA(loader(), network={"teacher": teacher}, **options)
    cka.start(model)
    first = copy.deepcopy(model)
    result = cka.measure(changed(model, 1), 1)
    parts = {"now": model, "initial": first, "previous": copy.deepcopy(first), "teacher": teacher}
    at_once = cka_hooks.compare(parts, loader(), progress=False, **options)
    assert result.layers == at_once.layers
    torch.testing.assert_close(result.matrix, at_once.matrix, rtol=0, atol=1e-12)
    torch.testing.assert_close(result.stderr, at_once.stderr, rtol=0, atol=1e-12)
    assert (result.samples, result.minibatches, result.influence) == (
        at_once.samples,
        at_once.minibatches,
        at_once.influence,
    )
    if "sample_ids" in options:
        assert {type(found.identifier) for found in result.influence.values()} == {str}


def test_a_network_with_other_positions_is_refused() -> None:
    class Half(Numbered):
        def forward(self, x: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x[:, ::2])

    batches = [{"x": batch["x"]} for batch in of_texts()]
    with pytest.raises(cka_hooks.SampleCountError, match="'network' have other positions than those of 'now'"):
        TrainingCKA(batches, network=Half(1), per="position").start(Numbered(0))


def test_a_network_with_other_layers_counts_with_its_best_match() -> None:
    teacher = nn.Sequential(nn.Sequential(nn.Linear(12, 8), nn.Tanh()), nn.Linear(8, 3))
    cka = TrainingCKA(batches(), layers={"now": ["0", "3"], "teacher": ["0.*"]}, network={"teacher": teacher})
    model = network()
    cka.start(model)
    result = cka.measure(changed(model, 1), 1)
    assert result.between("now", "teacher").columns == ("teacher/0.0", "teacher/0.1")
    best = max(result["now/3", "teacher/0.0"], result["now/3", "teacher/0.1"])
    assert cka.scalars()["cka/teacher/3"] == best


class Counting(nn.Module):
    """A network that counts in an attribute and in a buffer, and draws random numbers, in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.calls = 0
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.total += 1
        return self.net(x) + 0 * (torch.rand(()) + random.random() + np.random.rand())


def test_mode_gradients_random_states_and_attributes_are_as_before() -> None:
    model = Counting().train()
    model.net[1].eval()
    model(batches()[0]).sum().backward()
    loader = DataLoader(torch.cat(batches()), batch_size=32, shuffle=True, generator=torch.Generator().manual_seed(1))
    cka = TrainingCKA(loader, layers=["net.0", "net.3"])

    def state():
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        modes = [module.training for module in model.modules()]
        generators = [torch.get_rng_state(), loader.generator.get_state(), torch.tensor(np.random.get_state()[1])]
        return [*gradients, *generators], (modes, model.calls, float(model.total), random.getstate())

    before = state()
    cka.start(model)
    for step in range(2):
        cka.measure(model, step)
    after = state()
    assert all(map(torch.equal, before[0], after[0]))
    assert before[1] == after[1]
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks for module in model.modules())
    # Weights that are the same are alike, in every order in which the loader would come by itself.
    assert cka.scalars()["cka/initial/net.3"] == pytest.approx(1, abs=1e-12)


def test_a_loader_that_brings_other_batches_is_refused_before_the_first_step() -> None:
    generator = torch.Generator().manual_seed(0)
    other = DataLoader(torch.randn(64, 12), batch_size=32, shuffle=True)
    cka = TrainingCKA(other, layers=["0"])
    cka.start(network())
    resumed = TrainingCKA([torch.randn(32, 12, generator=generator)], layers=["0"])
    resumed.load_state_dict(cka.state_dict())
    with pytest.raises(cka_hooks.BatchError, match="differs from the one for the first"):
        resumed.start(network(), step=5)
    with pytest.raises(cka_hooks.OptionError, match="only once"):
        TrainingCKA(iter(batches()))


def test_a_run_that_goes_on_keeps_its_initial_weights() -> None:
    model = network()
    cka = TrainingCKA(batches(), layers=["0", "3"])
    cka.start(model)
    cka.measure(changed(model, 1), 1)
    again = TrainingCKA(batches(), layers=["0", "3"])
    again.load_state_dict(torch.load(_saved(cka.state_dict()), weights_only=True))
    again.start(model, step=1)
    changed(model, 2)
    assert again.measure(model, 2) == cka.measure(model, 2)
    part = cka.state_dict()["initial"]
    unlike = {**part, "state": {**part["state"], "dtypes": 3}}
    for wrong in (
        {"initial": {}},
        {"initial": 3, "previous": 3},
        {"something": 1},
        {**cka.state_dict(), "initial": unlike},
    ):
        with pytest.raises(cka_hooks.OptionError, match="not the CKA of a network in training"):
            again.load_state_dict(wrong)
    with pytest.warns(cka_hooks.CKAWarning, match="goes on from step 7"):
        TrainingCKA(batches(), layers=["0"]).start(model, step=7)
    other = TrainingCKA(batches(), layers=["0", "3"], minibatch=8)
    other.load_state_dict(cka.state_dict())
    with pytest.raises(cka_hooks.OptionError, match="minibatch"):
        other.start(model, step=2)


def _saved(state):
    import io

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_goes_on_like_the_original(copied) -> None:
    """Callbacks are sent to other processes."""
    model = network()
    cka = TrainingCKA(DataLoader(torch.cat(batches()), batch_size=32), layers=["0", "3"], network=network(1))
    cka.start(model)
    other = copied(cka)
    changed(model, 1)
    assert other.measure(model, 1) == cka.measure(model, 1)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs=0"),
        ({"every_n_steps": 1.5}, "every_n_steps=1.5"),
        ({"network": {"initial": nn.Identity()}}, "'initial'"),
        ({"minibatch": 2}, "minibatch=2"),
        ({"layers": {"then": ["0"]}}, "'then'"),
        ({"per": "position", "join_batches": 8}, "exclude each other"),
    ],
)
def test_options_are_refused_before_training(options, found) -> None:
    with pytest.raises(cka_hooks.OptionError, match=found):
        TrainingCKA(batches(), **options)


@pytest.mark.parametrize("network", [[nn.Identity()], {"V4": np.zeros((128, 3))}], ids=str)
def test_only_networks_can_be_compared_with(network) -> None:
    with pytest.raises(cka_hooks.ModelError, match=r"expected an nn\.Module, found"):
        TrainingCKA(batches(), network=network)


def test_batches_that_are_too_small_are_told_how_they_are_joined() -> None:
    with pytest.raises(cka_hooks.TooFewSamplesError, match=r"the largest batch had 3: .* join_batches=32"):
        TrainingCKA([batch[:3] for batch in batches()]).start(network())


def test_every_so_many_steps_or_epochs() -> None:
    by_epochs, by_steps = TrainingCKA(batches(), every_n_epochs=2), TrainingCKA(batches(), every_n_steps=4)
    assert not by_steps.due(4)  # not started
    for cka in (by_epochs, by_steps):
        cka.start(network())
    assert [epoch for epoch in range(1, 7) if by_epochs.due(10 * epoch, epoch)] == [2, 4, 6]
    assert [step for step in range(13) if by_steps.due(step)] == [4, 8, 12]
    assert not by_epochs.due(8)
    assert not by_steps.due(8, 1)


def test_what_goes_wrong_later_is_a_warning_and_training_goes_on(tmp_path) -> None:
    model = network()
    (tmp_path / "file").touch()
    cka = TrainingCKA(batches(), layers=["0", "3"], folder=tmp_path / "file" / "cka")
    cka.start(model)
    with pytest.warns(cka_hooks.CKAWarning, match="CKA at step 1: NotADirectoryError"):
        assert cka.measure(model, 1) is not None
    cka.folder = None
    with pytest.warns(cka_hooks.CKAWarning, match="no picture in the log: ZeroDivisionError"):
        cka.log_pictures(lambda *_: 1 / 0)
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.warns(cka_hooks.CKAWarning, match="step 2: layer 'now/3' has NaN"):
        result = cka.measure(model, 2)
    assert "now/3" in result.skipped
    assert cka.scalars() == pytest.approx({"cka/initial/0": 1.0, "cka/previous/0": 1.0}, abs=1e-12)
    with torch.no_grad():
        model[0].weight[0, 0] = torch.nan
    with pytest.warns(cka_hooks.CKAWarning, match="step 3: layer 'now/0' has NaN"):
        cka.measure(model, 3)
    assert cka.scalars() == {}
    model[0] = nn.Linear(5, 16)
    with pytest.warns(cka_hooks.CKAWarning, match="CKA at step 4: RuntimeError"):
        assert cka.measure(model, 4) is None


def test_weights_in_several_processes_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    cka = TrainingCKA(batches())
    with pytest.raises(cka_hooks.ModelError, match=r"several processes.*compare"):
        cka.start(nn.Sequential(FullyShardedDataParallel(), nn.Linear(12, 3)))


@pytest.mark.parametrize(
    ("module", "packages"), [("lightning", "lightning pytorch_lightning"), ("transformers", "transformers")]
)
def test_a_missing_trainer_names_the_extra(module, packages) -> None:
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys({packages.split()}))\nimport cka_hooks\n"
        f"try: import cka_hooks.integrations.{module}\nexcept cka_hooks.MissingExtraError as error: print(error)"
    )
    done = processes.finished("-c", code)
    assert f"pip install 'cka-hooks[{module}]'" in done.stdout, done.stderr


# Lightning


class TestLightning:
    """With the real Trainer."""

    @pytest.fixture(autouse=True)
    def _lightning(self):
        pytest.importorskip("lightning")

    def test_trained_weights_are_equal_to_the_bit(self, tmp_path) -> None:
        import training

        from cka_hooks.integrations.lightning import CKACallback

        without = training.fit(tmp_path / "without")
        callback = CKACallback(training.fixed(), layers=training.LAYERS, network=training.Module(), every_n_steps=4)
        module = training.fit(tmp_path / "with", callback)
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, without.state_dict()[name]), name
        assert module.seen == without.seen
        # 18 steps; none in the sanity check.
        saved = sorted(path.name for path in (tmp_path / "with" / "cka").iterdir())
        assert saved == [f"step-{step:08}.json" for step in (4, 8, 12, 16)]
        result = cka_hooks.CKAResult.load(tmp_path / "with" / "cka" / saved[-1])
        assert result == callback.result
        assert result.models == ("now", "initial", "previous", "network")

    def test_values_at_the_end_of_each_epoch(self, tmp_path) -> None:
        import training

        from cka_hooks.integrations.lightning import CKACallback

        callback = CKACallback(training.fixed(), layers=training.LAYERS)
        module = training.fit(tmp_path, callback, epochs=1)
        expected = cka_hooks.compare(
            {"now": module, "initial": training.Module()}, training.fixed(), layers=training.LAYERS, progress=False
        )
        found = callback.result.select(list(expected.layers))
        torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=1e-12)
        assert not (found.matrix[0, 2] > 0.9999)

    def test_loggers_get_scalars_and_pictures_where_they_take_them(self, tmp_path) -> None:
        import training
        from lightning.pytorch.loggers import CSVLogger
        from lightning.pytorch.loggers.logger import Logger
        from matplotlib.figure import Figure

        from cka_hooks.integrations.lightning import CKACallback

        class TensorBoardLike(Logger):
            """`experiment.add_figure`, as torch.utils.tensorboard.SummaryWriter has it."""

            name = version = "stand-in"

            @property
            def experiment(self):
                return self

            def log_hyperparams(self, *_):
                pass

            def add_figure(self, tag, figure, global_step=None):
                figures.append((tag, figure, global_step))

            def log_metrics(self, metrics, step=None):
                scalars.append((step, metrics))

        class WandbLike(TensorBoardLike):
            def log_image(self, key, images, step=None, **_):
                images_logged.append((key, *images, step))

        figures, scalars, images_logged = [], [], []
        numbers = CSVLogger(tmp_path, name="numbers")
        loggers = [numbers, TensorBoardLike(), WandbLike()]
        training.fit(tmp_path, CKACallback(training.fixed(), layers=training.LAYERS), epochs=2, logger=loggers)
        names = ["cka/initial", "cka/previous"]
        for pictures in (figures, images_logged):
            assert [(tag, step) for tag, _, step in pictures] == [(name, step) for step in (6, 12) for name in names]
            assert all(isinstance(figure, Figure) and figure.axes[0].images for _, figure, _ in pictures)
        ours = [(step, metrics) for step, metrics in scalars if "cka/initial/net.0" in metrics]
        assert [step for step, _ in ours] == [6, 6, 12, 12]
        numbers.save()
        with open(Path(numbers.log_dir) / "metrics.csv", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["cka/initial/net.4"]]
        assert [int(row["step"]) for row in rows] == [6, 12]
        assert len(list((Path(numbers.log_dir) / "cka").iterdir())) == 2

    def test_a_resumed_run_goes_on_with_its_first_initial_weights(self, tmp_path) -> None:
        import training
        from lightning.pytorch.callbacks import ModelCheckpoint

        from cka_hooks.integrations.lightning import CKACallback

        def callback():
            return CKACallback(training.fixed(), layers=training.LAYERS)

        options = {"enable_checkpointing": True}
        whole, first, second = callback(), callback(), callback()
        training.fit(tmp_path / "whole", whole, epochs=2)
        keeper = ModelCheckpoint(tmp_path, filename="first")
        training.fit(tmp_path / "a", first, keeper, epochs=1, **options)
        training.fit(tmp_path / "b", second, epochs=2, ckpt=str(tmp_path / "first.ckpt"))
        # Another order of training batches after the interruption: only the initial weights are the same.
        assert second.state_dict()["initial"]["steps"][0]["groups"][0]["vectors"].equal(
            whole.state_dict()["initial"]["steps"][0]["groups"][0]["vectors"]
        )
        assert second.result["now/net.0", "initial/net.0"] < second.result["now/net.0", "previous/net.0"]

    @pytest.mark.filterwarnings("ignore:.*bf16")
    def test_a_module_in_bfloat16(self, tmp_path) -> None:
        import training

        from cka_hooks.integrations.lightning import CKACallback

        callback = CKACallback(training.fixed(), layers=training.LAYERS)
        training.fit(tmp_path, callback, epochs=1, precision="bf16-true")
        assert callback.result.settings["step"] == 6

    def test_two_ranks(self, tmp_path) -> None:
        done = processes.finished(
            *("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
            *(str(Path(__file__).with_name("training.py")), str(tmp_path)),
        )
        assert "rank 0 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]
        assert "rank 1 passed" in done.stdout, done.stdout[-2000:] + done.stderr[-6000:]


# Hugging Face


class TestTransformers:
    """With the real Trainer."""

    @pytest.fixture(autouse=True)
    def _transformers(self):
        pytest.importorskip("transformers")
        pytest.importorskip("accelerate")

    LAYERS = ("bert.encoder.layer.*", "classifier")

    @staticmethod
    def texts(count: int = 64) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(2)
        words = torch.randint(1, 30, (count, 8), generator=generator)
        return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 2} for row in words]

    def trainer(self, folder, **options):
        import transformers

        torch.manual_seed(4)
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
        )
        model = transformers.BertForSequenceClassification(config)
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=16,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            learning_rate=1e-2,
            seed=0,
            **{"num_train_epochs": 2, "logging_steps": 2, "save_strategy": "no", **options},
        )
        return transformers.Trainer(model, arguments, train_dataset=self.texts())

    def callback(self, trainer, **options):
        from cka_hooks.integrations.transformers import CKACallback

        loader = DataLoader(self.texts(96), batch_size=48)
        callback = CKACallback(trainer, loader, layers=list(self.LAYERS), features="mean", **options)
        trainer.add_callback(callback)
        return callback

    def test_trained_weights_are_equal_to_the_bit_and_the_log_has_both(self, tmp_path) -> None:
        without = self.trainer(tmp_path / "without")
        without.train()
        with_it = self.trainer(tmp_path / "with")
        callback = self.callback(with_it, every_n_steps=2)
        with_it.train()
        for name, weight in with_it.model.state_dict().items():
            assert torch.equal(weight, without.model.state_dict()[name]), name
        losses = [[entry["loss"] for entry in it.state.log_history if "loss" in entry] for it in (without, with_it)]
        assert losses[0] == losses[1]
        assert len(losses[0]) == 4
        ours = [entry for entry in with_it.state.log_history if "cka/initial/classifier" in entry]
        assert [entry["step"] for entry in ours] == [2, 4, 6, 8]
        assert ours[-1]["cka/initial/classifier"] == callback.result["now/classifier", "initial/classifier"]
        assert len(list((tmp_path / "with" / "cka").iterdir())) == 4

    def test_tensorboard_gets_pictures(self, tmp_path) -> None:
        import transformers
        from matplotlib.figure import Figure

        class TensorBoardLike(transformers.TrainerCallback):
            tb_writer = None

            def add_figure(self, tag, figure, global_step=None):
                figures.append((tag, type(figure), global_step))

        figures = []
        trainer = self.trainer(tmp_path)
        self.callback(trainer)
        board = TensorBoardLike()
        board.tb_writer = board
        trainer.add_callback(board)
        trainer.train()
        expected = [(name, Figure, step) for step in (4, 8) for name in ("cka/initial", "cka/previous")]
        assert figures == expected

    def test_a_resumed_run_goes_on_with_its_first_initial_weights(self, tmp_path) -> None:
        whole = self.trainer(tmp_path, save_strategy="epoch")
        callback = self.callback(whole)
        whole.train()
        resumed = self.trainer(tmp_path, save_strategy="epoch")
        again = self.callback(resumed)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert again.result.models == ("now", "initial", "previous")
        torch.testing.assert_close(again.result.matrix, callback.result.matrix, rtol=0, atol=1e-9, equal_nan=True)
