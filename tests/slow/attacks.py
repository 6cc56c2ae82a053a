"""Attacks that are too dear for every run of the tests: damaged and forged files, kills, Ctrl-C, ranks that fail.

    python tests/slow/attacks.py                            # each for a minute
    python tests/slow/attacks.py kills ranks --seconds 600
    python tests/slow/attacks.py forged_checkpoints --seed 17 --rounds 1     # what was found in round 17 again

Each attack is made in rounds, with random numbers from the seed of the round, in a process of its own, and prints
how the rounds ended. A crash, a wrong number, a lost state, something left behind, an error that is not the package's
own, or an end that does not come is a finding: it is printed with its seed, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

import broken_off
import processes
from made_up import result_of

import cka_hooks
from cka_hooks.run import checkpoint as files

# Seconds after which a round has no end.
PATIENCE = 120
Attack = Callable[[random.Random, Path], str]


# Files


def damaged(good: bytes, chance: random.Random) -> bytes:
    """Some bytes replaced, put in, taken out, doubled, or the end cut off."""
    found = bytearray(good)
    for _ in range(chance.choice([1, 1, 1, 3, 30])):
        at, length = chance.randrange(len(found) + 1), chance.choice([1, 1, 4, 40])
        kind = chance.choice(["replace", "insert", "delete", "double", "truncate"])
        if kind == "replace":
            found[at : at + length] = chance.randbytes(length)
        elif kind == "insert":
            found[at:at] = chance.randbytes(length)
        elif kind == "delete":
            del found[at : at + length]
        elif kind == "double":
            found[at:at] = found[at : at + length]
        else:
            del found[at:]
    return bytes(found)


def odd(chance: random.Random, depth: int = 0) -> Any:
    """A value that nobody expects in a file."""
    plain = [
        None,
        True,
        0,
        -1,
        3,
        2**31,
        2**63,
        -(2**70),
        0.5,
        1e308,
        float("inf"),
        float("nan"),
        "",
        "0",
        "a/b",
        "\x1b[2J",
    ]
    if depth < 3 and chance.random() < 0.3:
        items = [odd(chance, depth + 1) for _ in range(chance.randrange(4))]
        return items if chance.random() < 0.5 else {chance.choice(["", "0", "layers", "x"]): item for item in items}
    return chance.choice(plain)


def odd_tensor(chance: random.Random) -> torch.Tensor:
    shape = [chance.choice([0, 1, 2, 3, 624, 5000]) for _ in range(chance.randrange(3))]
    dtype = chance.choice([torch.float64, torch.float32, torch.int64, torch.uint8, torch.bool, torch.bfloat16])
    value = chance.choice([0.0, 1.0, -1.0, 1e300, float("nan")])
    return torch.full(shape, value, dtype=torch.float64).to(dtype)


def forged(content: Any, chance: random.Random, value: Callable[[], Any]) -> None:
    """Something else in place of some entries."""
    for _ in range(chance.choice([1, 1, 2, 5])):
        where, key = content, chance.choice(sorted(content))
        while isinstance(where[key], dict | list) and where[key] and chance.random() < 0.85:
            where = where[key]
            key = chance.choice(sorted(where)) if isinstance(where, dict) else chance.randrange(len(where))
        found = where[key]
        if isinstance(where, dict) and len(where) > 1 and chance.random() < 0.1:
            del where[key]
        elif type(found) is int and chance.random() < 0.5:
            where[key] = found + chance.choice([-1, 1, 2**30, -(2**30)])
        else:
            where[key] = value()


def checkpoint(folder: Path) -> Path:
    path = folder / "run.ckpt"
    path.unlink(missing_ok=True)
    with suppress(broken_off.Stop):
        broken_off.run(path, broken_off.shuffled(), stop_at=6)
    return path


def damaged_checkpoints(chance: random.Random, folder: Path) -> str:
    path = checkpoint(folder)
    before = files.read(path)
    path.write_bytes(damaged(path.read_bytes(), chance))
    try:
        found = files.read(path)
    except cka_hooks.CheckpointError:
        return "refused"
    assert repr(found) == repr(before), "a damaged file was read as another one"
    return "the same content"


def forged_checkpoints(chance: random.Random, folder: Path) -> str:
    """With a checksum that fits: refused, or resumed to some result."""
    path = checkpoint(folder)
    content = files.read(path)
    forged(content, chance, lambda: odd_tensor(chance) if chance.random() < 0.4 else odd(chance))
    with suppress(TypeError, ValueError, OverflowError):
        files.write(path, content)
    try:
        broken_off.run(path, broken_off.shuffled())
    except cka_hooks.CKAError as error:
        return f"{type(error).__name__}"
    return "resumed"


def signed(document: dict[str, Any]) -> dict[str, Any]:
    """With a checksum that fits, as another program would write it."""
    content = {key: value for key, value in document.items() if key != "sha256"}
    canonical = json.dumps(content, separators=(",", ":"), sort_keys=True)
    return {**content, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def damaged_results(chance: random.Random, folder: Path) -> str:
    path = folder / "cka.json"
    whole = result_of({"a": list("wxyz"), "b": list("xyz")}, seed=3)
    whole.save(path)
    path.write_bytes(damaged(path.read_bytes(), chance))
    try:
        found = cka_hooks.CKAResult.load(path)
    except cka_hooks.ResultFileError:
        return "refused"
    assert found == whole, "a damaged file was read as another result"
    return "the same content"


def forged_results(chance: random.Random, folder: Path) -> str:
    """With a checksum that fits: refused, or a result that can be looked at in every way."""
    path = folder / "cka.json"
    result_of({"a": list("wxyz"), "b": list("xyz")}, seed=3).save(path)
    document = json.loads(path.read_text())
    forged(document, chance, lambda: odd(chance))
    try:
        path.write_text(json.dumps(signed(document)))
    except ValueError:
        return "could not be written"
    try:
        found = cka_hooks.CKAResult.load(path)
    except cka_hooks.ResultFileError:
        return "refused"
    found.save(folder / "again.json")
    assert cka_hooks.CKAResult.load(folder / "again.json") == found
    assert repr(found)
    assert found.summary()
    found.to_html(folder / "cka.html")
    found.to_csv(folder / "cka.csv")
    if chance.random() < 0.05:
        found.plot(folder / "cka.png")
    return "a result"


# Runs that are broken off


def equal(found: cka_hooks.CKAResult, expected: cka_hooks.CKAResult) -> None:
    assert found.layers == expected.layers
    assert (found.samples, found.minibatches) == (expected.samples, expected.minibatches)
    torch.testing.assert_close(found.matrix, expected.matrix, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(found.stderr, expected.stderr, rtol=0, atol=1e-9, equal_nan=True)
    assert (found.samples, found.minibatches) == (expected.samples, expected.minibatches)


def run_and_save(folder: Path) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result, _ = broken_off.run(
        folder / "run.ckpt", broken_off.shuffled(broken_off.tensors(4000)), checkpoint_every=1e-9
    )
    result.save(folder / "result.json")


def kills(chance: random.Random, folder: Path) -> str:
    """One run that is killed again and again, at any moment from its start on, until it comes to its end."""
    whole, _ = broken_off.run(None, broken_off.shuffled(broken_off.tensors(4000)))
    killed = samples = 0
    while not (folder / "result.json").exists():
        with processes.spawned(run_and_save, folder) as process:
            process.join(chance.uniform(0, 8) if killed < 8 else PATIENCE)
            process.kill()
            process.join(30)
        killed += process.exitcode != 0
        assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
        if (folder / "run.ckpt").exists():
            before, samples = (
                samples,
                files.read(folder / "run.ckpt")["run"]["comparison"]["state"]["samples"],
            )
            assert samples >= before, "a kill lost minibatches that were saved"
    equal(cka_hooks.CKAResult.load(folder / "result.json"), whole)
    left = {path.name for path in folder.iterdir()} - {"run.ckpt", "result.json", ".run.ckpt.lock"}
    assert not left, left
    return f"killed {killed} times, and the result is that of one run"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.norm, self.fc2 = nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.register_buffer("cache", None)
        self.norm.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.fc1(x)).relu()
        self.cache = x.mean(0)
        return self.fc2(nn.functional.dropout(x, 0.1, self.training))


def traces(model: nn.Module) -> Any:
    """What a run that was broken off could leave behind."""
    return (
        [module.training for module in model.modules()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [
            None if buffer is None else buffer.tolist()
            for module in model.modules()
            for buffer in module._buffers.values()
        ],
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_float32_matmul_precision(),
        torch.get_rng_state().tolist(),
    )


def ctrl_c(chance: random.Random, folder: Path) -> str:
    """SIGINT at any moment of a run; then the same call gives what it always gives."""
    model, batches = Net(), list(broken_off.tensors(400).split(16))
    torch.set_float32_matmul_precision("medium")
    expected = cka_hooks.compare(model, batches, progress=False)
    before, path = traces(model), folder / "run.ckpt"
    options = (
        {"progress": False}
        if chance.random() < 0.5
        else {"checkpoint": path, "checkpoint_every": 1e-9, "progress": False}
    )
    begun = time.perf_counter()
    cka_hooks.compare(model, batches, progress=False)
    length = time.perf_counter() - begun
    interrupted = 0
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    for _ in range(20):
        armed = [True]

        def interrupt(*_: object, armed: list[bool] = armed) -> None:
            # One that comes when the call has returned would hit this script.
            if armed[0]:
                raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, length))
            cka_hooks.compare(model, batches, **options)
            armed[0] = False
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            armed[0] = False
            signal.setitimer(signal.ITIMER_REAL, 0)
        found = traces(model)
        assert found == before, [(one, other) for one, other in zip(found, before, strict=True) if one != other]
    equal(cka_hooks.compare(model, batches, **options), expected)
    return f"{'with' if 'checkpoint' in options else 'without'} a checkpoint, interrupted: {interrupted > 0}"


# Ranks


FAULTS = ("raises", "exits", "is killed", "has no batch", "has another option", "is not finite", "is slow", "none")


class Faulty:
    """A loader with a fault in one batch of one rank."""

    def __init__(self, rank: int, fault: str, number: int) -> None:
        self.rank, self.fault, self.number = rank, fault, number

    def __iter__(self) -> Any:
        for number, batch in enumerate(broken_off.tensors(400).roll(self.rank, 0).split(16)):
            if number == self.number:
                if self.fault == "raises":
                    raise RuntimeError("a worker died")
                if self.fault == "exits":
                    os._exit(9)
                if self.fault == "is killed":
                    os.kill(os.getpid(), signal.SIGKILL)
                if self.fault == "has no batch":
                    return
                if self.fault == "is not finite":
                    batch = batch * torch.nan
                if self.fault == "is slow":
                    time.sleep(2)
            yield batch


def rank_main(rank: int, size: int, folder: Path, fault: str, number: int, answers: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=30))
    options = {"minibatch": 8} if fault == "has another option" else {}
    try:
        result = cka_hooks.compare(broken_off.model(), Faulty(rank, fault, number), progress=False, **options)
        answers.put((rank, "a result", result.samples))
    except cka_hooks.CKAError as error:
        answers.put((rank, type(error).__name__, str(error)))
    except RuntimeError as error:
        answers.put((rank, type(error).__name__, str(error)))
    answers.close()
    answers.join_thread()
    os._exit(0)


def ranks(chance: random.Random, folder: Path) -> str:
    """One fault on one rank: all others end soon, and with a word that says why."""
    size = chance.choice([2, 3])
    faulty, fault, number = chance.randrange(size), chance.choice(FAULTS), chance.randrange(25)
    answers = processes.FRESH.Queue()
    started = []
    for rank in range(size):
        arguments = (rank, size, folder, fault if rank == faulty else "none", number, answers)
        process = processes.FRESH.Process(target=rank_main, args=arguments, daemon=True)
        process.start()
        started.append(process)
    try:
        silent = fault in ("exits", "is killed")
        found = {
            rank: (kind, text)
            for rank, kind, text in (answers.get(timeout=PATIENCE - 20) for _ in range(size - silent))
        }
        for process in started:
            process.join(20)
            assert process.exitcode is not None, "a rank does not end"
    finally:
        for process in started:
            process.kill()
    kinds = {rank: kind for rank, (kind, _) in found.items()}
    others = {kind for rank, kind in kinds.items() if rank != faulty}
    if fault in ("none", "is slow", "has no batch"):
        assert set(kinds.values()) == {"a result"}, found
        assert len({text for _, text in found.values()}) == 1, found
    elif fault == "is not finite":
        assert set(kinds.values()) == {"NonFiniteError"}, found
    elif fault == "has another option":
        assert set(kinds.values()) == {"OptionError"}, found
    else:
        assert others == {"RankError"}, found
        assert silent or kinds[faulty] == "RuntimeError", found
    return f"a rank of {size} {fault}: {', '.join(sorted(set(kinds.values())))}" if fault != "none" else "no fault"


ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (damaged_checkpoints, forged_checkpoints, damaged_results, forged_results, kills, ctrl_c, ranks)
}


def made(name: str, seed: int, seconds: float, rounds: int | None) -> None:
    """Rounds of one attack, until one finds something."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    ends: Counter[str] = Counter()
    until, first = time.monotonic() + seconds, seed
    while time.monotonic() < until if rounds is None else seed < first + rounds:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        with tempfile.TemporaryDirectory() as folder:
            print(f"round {seed}", file=sys.stderr, flush=True)
            ends[ATTACKS[name](random.Random(f"{name} {seed}"), Path(folder))] += 1
        seed += 1
    faulthandler.cancel_dump_traceback_later()
    print(f"{name}: {seed - first} rounds")
    for end, count in ends.most_common():
        print(f"{count:8d}  {end}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which ones: {', '.join(ATTACKS)}; default all")
    parser.add_argument("--seconds", type=float, default=60, help="for each attack (60)")
    parser.add_argument("--rounds", type=int, help="so many instead")
    parser.add_argument("--seed", type=int, default=0, help="of the first round (0)")
    parser.add_argument("--here", action="store_true", help="in this process, where a debugger can look")
    words = parser.parse_args()
    if unknown := set(words.names) - ATTACKS.keys():
        parser.error(f"no such attack: {', '.join(sorted(unknown))}")
    found = 0
    for name in words.names or ATTACKS:
        if words.here:
            made(name, words.seed, words.seconds, words.rounds)
            continue
        same = [name, "--here", "--seconds", str(words.seconds), "--seed", str(words.seed)]
        if words.rounds is not None:
            same += ["--rounds", str(words.rounds)]
        with processes.started(__file__, *same) as process:
            out, err = process.communicate()
        print(out, end="", flush=True)
        if process.returncode:
            found += 1
            print(f"{name}: FOUND something (exit code {process.returncode})\n{err[-4000:]}", flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
