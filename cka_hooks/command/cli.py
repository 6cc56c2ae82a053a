"""The command line: words in, `compare` and `CKAResult` out.

Exit codes: 0 done; 1 a layer was not finite, and the result of all others was saved, or, with ``diff
--exit-code``, there are differences; 2 the arguments or what they name cannot be used; 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cka_hooks.errors import CKAError, CKAWarning, MissingExtraError

INCOMPLETE, BAD_INPUT, INTERRUPTED = 1, 2, 130

_MODELS = """\
a model is one of
  torchvision:resnet50           torchvision's, with its default weights (downloaded once)
  timm:vit_tiny_patch16_224      timm's, pretrained
  hf:google-bert/bert-base-uncased   a Hugging Face model by its name or folder
  nets.py:make_net               what a function in a file of yours returns, called without arguments

weights are the name of torchvision weights (IMAGENET1K_V2), "none" for random ones, or a checkpoint file
(.pt, .pth, .safetensors), which is loaded without running code in it."""

_DATA = """\
data is one of
  photos/                        a folder of images, or of one subfolder a class
  torchvision:CIFAR10:data/      the test part of a torchvision data set, with the folder it lies in
  nets.py:make_loader            the loader (or data set) that a function of yours returns

Images are prepared as the weights of --model say, else as is usual for ImageNet."""

_RUN = f"""\
Run data through a model once, by hooks, and write the CKA of every pair of its layers: a heatmap, the
result with its standard errors, and a short reading in words.

examples
  cka-hooks run --model torchvision:resnet50 --data photos/
  cka-hooks run --model torchvision:resnet18 --against torchvision:resnet34 --data photos/ --layers 'layer?.?'
  cka-hooks run --model nets.py:net --weights epoch1.pt --against nets.py:net --against-weights epoch90.pt \\
      --data nets.py:test_loader --tolerance 0.005
  cka-hooks run --model timm:vit_tiny_patch16_224 --data photos/ --layers 'blocks.*' --json | jq .summary

{_MODELS}

{_DATA}"""

_LAYERS = f"""\
Print what can be measured in a model, from one forward pass: each layer's name, type, shape and cost.

examples
  cka-hooks layers --model torchvision:resnet18 --weights none
  cka-hooks layers --model nets.py:net --data nets.py:test_loader

{_MODELS}"""

_SHOW = """\
Read a saved result: print it in words, and draw it again.

examples
  cka-hooks show cka/cka.json
  cka-hooks show cka/cka.json --between a b --out a-b.png --values
  cka-hooks show cka/cka.json --layers 'layer4.**' --html layer4.html"""

_DIFF = """\
Compare two saved results, entry by entry: which differ by more than the uncertainty of both, which layers
only one of them has, and which settings are not the same. The runs are taken as independent.

examples
  cka-hooks diff monday.json tuesday.json
  cka-hooks diff main.json branch.json --exit-code      exits with 1 where an entry differs"""

_TOP = """\
Which layers of PyTorch models represent the data alike: centered kernel alignment (CKA) by forward hooks.

start here
  cka-hooks demo --out demo                             train two small networks, compare them, draw
  cka-hooks run --model torchvision:resnet18 --data photos/
  cka-hooks layers --model torchvision:resnet18 --weights none

cka-hooks COMMAND --help explains each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.

    Args:
        argv: its words, by default those of the process.
    """
    arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", CKAWarning)
            warnings.showwarning = _warn
            code: int = arguments.command(arguments)
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    except BrokenPipeError:
        # The reader of a pipe has seen enough. What is left to flush goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (CKAError, OSError) as error:
        if arguments.debug:
            raise
        return _fail(str(error), BAD_INPUT)


def _fail(message: str, code: int) -> int:
    print(f"cka-hooks: {message}", file=sys.stderr)
    return code


def _warn(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    if issubclass(category, CKAWarning):
        print(f"cka-hooks: warning: {message}", file=sys.stderr)


# What the words are


def _parser() -> argparse.ArgumentParser:
    from cka_hooks import __version__

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(
        prog="cka-hooks", description=_TOP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"cka-hooks {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any, line: str, description: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=line,
            description=description,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(command=function)
        return sub

    demo = command("demo", _demo, "train two small networks on digits and compare them", (
        "Train torchvision's ResNet-18 from two seeds on scikit-learn's handwritten digits, then compare all\n"
        "residual blocks of both over the held-out images. Needs no network; takes less than two minutes."
    ))  # fmt: skip
    demo.add_argument("--out", type=Path, default=Path("cka-demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--epochs", type=_whole, default=None, metavar="N", help="passes over the training images")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")

    _run_words(command("run", _run, "compare the layers of a model, or of two", _RUN))

    layers = command("layers", _layers, "list what can be measured in a model", _LAYERS)
    layers.add_argument("--model", required=True, metavar="MODEL")
    layers.add_argument("--weights", default="none", metavar="W", help="default: none, random ones")
    layers.add_argument("--data", metavar="DATA", help="take the first batch of it instead of random images")
    layers.add_argument("--input", metavar="C,H,W", help="the shape of one random input, such as 3,224,224")
    layers.add_argument("--layers", nargs="+", metavar="L", help="names or globs; default: every leaf that runs")

    show = command("show", _show, "print and redraw a saved result", _SHOW)
    show.add_argument("result", type=Path, metavar="cka.json")
    show.add_argument("--out", type=Path, metavar="FILE", help="the picture; default: beside the result, as .png")
    show.add_argument("--html", type=Path, metavar="FILE", help="write the page to look around in as well")
    show.add_argument("--between", nargs=2, metavar=("A", "B"), help="only model A against model B")
    show.add_argument("--layers", nargs="+", metavar="L", help="only these labels, or globs of labels")
    show.add_argument("--values", action="store_true", help="write the values into the cells")
    show.add_argument("--stderr", action="store_true", help="draw standard errors instead")
    show.add_argument("--profile", action="store_true", help="draw each layer's likeness to the next instead")

    diff = command("diff", _diff, "compare two saved results", _DIFF)
    diff.add_argument("first", type=Path, metavar="a.json")
    diff.add_argument("second", type=Path, metavar="b.json")
    diff.add_argument("--level", type=_share, default=0.95, metavar="P",
        help="probability of no false alarm in the whole matrix; default: %(default)s")  # fmt: skip
    diff.add_argument("--json", action="store_true", help="print JSON")
    diff.add_argument("--exit-code", action="store_true", help="exit with 1 where an entry differs")
    return parser


def _run_words(run: argparse.ArgumentParser) -> None:
    what = run.add_argument_group("what to compare")
    what.add_argument("--model", required=True, metavar="MODEL", help="see above")
    what.add_argument("--weights", metavar="W", help="of the model; default: pretrained, or as the function made it")
    what.add_argument("--against", metavar="MODEL", help="a second model, over the same data")
    what.add_argument("--against-weights", metavar="W", help="of the second model")
    what.add_argument("--data", required=True, metavar="DATA", help="see above")
    what.add_argument("--layers", nargs="+", metavar="L",
        help="names or globs (* stops at dots, ** crosses them); default: every leaf module that runs")  # fmt: skip
    what.add_argument("--features", default="flatten", metavar="F",
        help="flatten, mean over positions, token, token:K or last; default: %(default)s")  # fmt: skip
    how = run.add_argument_group("how closely")
    how.add_argument("--samples", type=_samples, metavar="N",
        help='how many, drawn at random; "all" for all; default: 2048, or all with --tolerance')  # fmt: skip
    how.add_argument("--tolerance", type=_positive, metavar="E",
        help="stop as soon as every standard error is below E, such as 0.005")  # fmt: skip
    how.add_argument("--minibatch", type=_whole, default=32, metavar="N",
        help="samples an estimate is made from: more cost more and scatter less; default: %(default)s")  # fmt: skip
    how.add_argument("--sketch", action=_Gone, help=argparse.SUPPRESS)
    how.add_argument("--kernel", default="linear", choices=("linear", "rbf", "cosine", "polynomial"))
    how.add_argument("--estimator", default="unbiased", choices=("unbiased", "biased"))
    how.add_argument("--seed", type=int, default=0, metavar="N",
        help="of the samples drawn, their order and random weights; default: %(default)s")  # fmt: skip
    where = run.add_argument_group("where")
    where.add_argument("--device", default="auto", metavar="D", help="auto (cuda if there is one), cpu, cuda:1, mps")
    where.add_argument("--batch-size", type=_whole, default=64, metavar="N", help="default: %(default)s")
    where.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read images; default: 0")
    where.add_argument("--download", action="store_true", help="let torchvision download the data set")
    where.add_argument("--out", type=Path, default=Path("cka"), metavar="DIR", help="default: %(default)s")
    where.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="keep the run in a file: the same command again goes on from there",
    )
    where.add_argument("--json", action="store_true", help="print one JSON object, and the rest on stderr")
    where.add_argument("--quiet", action="store_true", help="neither plan nor progress")


class _Gone(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        parser.error(
            "--sketch is gone: --minibatch 32, the default, costs less and adds no noise; leave --sketch out"
        )


def _whole(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return number


def _samples(text: str) -> int | str:
    return text if text == "all" else _whole(text)


def _positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} must be above 0")
    return number


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return number


# What they do


def _demo(arguments: argparse.Namespace) -> int:
    from cka_hooks.command import demo

    demo.run(arguments.out, epochs=arguments.epochs or demo.EPOCHS, progress=not arguments.quiet)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from cka_hooks.command.run import run

    return run(arguments)


def _layers(arguments: argparse.Namespace) -> int:
    from cka_hooks.command.run import list_layers

    return list_layers(arguments)


def _show(arguments: argparse.Namespace) -> int:
    from cka_hooks.results.result import CKAResult

    result = CKAResult.load(arguments.result)
    if arguments.between:
        result = result.between(*arguments.between)
    if arguments.layers:
        result = result.select(arguments.layers)
    print(result)
    print(f"\n{result.summary()}")
    out = arguments.out or arguments.result.with_suffix(".png")
    try:
        if arguments.profile:
            result.plot_profile(out)
        else:
            result.plot(out, values=arguments.values, stderr=arguments.stderr)
        print(f"\npicture  {out}")
    except MissingExtraError:
        if arguments.out:
            raise
    if arguments.html:
        result.to_html(arguments.html)
        print(f"page     {arguments.html}")
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from cka_hooks.results.diff import diff
    from cka_hooks.results.result import CKAResult

    found = diff(CKAResult.load(arguments.first), CKAResult.load(arguments.second), level=arguments.level)
    print(json.dumps(found.as_json(), indent=2) if arguments.json else found)
    return INCOMPLETE if arguments.exit_code and found.differing else 0
