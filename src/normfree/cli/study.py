"""normfree study signal [MODEL...] [--data.root DIR]."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.table import Table
from torch import Tensor

from normfree.cli.common import parse, show, warn
from normfree.config import UserError, suggestion
from normfree.data.sources import open_validation
from normfree.evaluate import published_preprocessing, sample_images
from normfree.models import create_model, model_config
from normfree.models.download import find_weights
from normfree.models.weights import is_ours, load_foreign, load_model
from normfree.studies.signal import Propagation, draw, largest_deviation, noise, propagation

_STUDIES = {"signal": "mean and variance from block to block, at initialisation and on images"}
_CLASSIC = ("nf_resnet50", "nfnet_f0", "bn_resnet50")


@dataclass
class _Data:
    root: str | None = None  # images to measure on as well, CLASS/IMAGES; noise alone if not given


@dataclass
class _Signal:
    """Draw the signal propagation of networks: squared means and variances of the channels behind each block."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL...")] = _CLASSIC
    data: _Data = field(default_factory=_Data)
    weights: str | None = None  # of one trained model: a file, an address, "hub" or "authors"; new ones if not given
    skip_gain: float | None = None  # what SkipInit is set to in new networks; 1, as beta expects, if not given
    size: int | None = None  # side of the images, in pixels; the model's training size if not given
    images: int = 16  # how many
    seed: int = 0  # of weights and noise
    out: Path = Path("signal.png")  # the picture
    json: bool = False  # print the numbers as JSON


def run(arguments: Sequence[str]) -> int:
    """Run a study."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: normfree study STUDY [OPTIONS]\n\n" + "\n".join(f"  {n:<8} {w}" for n, w in _STUDIES.items()))
        return 0
    if arguments[0] not in _STUDIES:
        hint = suggestion(arguments[0], _STUDIES) or f"; choose from {', '.join(_STUDIES)}"
        warn(f"unknown study {arguments[0]!r}{hint}")
        return 2
    return _signal(parse(_Signal, "study signal", arguments[1:]))


def _signal(args: _Signal) -> int:
    if args.weights is not None and len(args.models) != 1:
        raise UserError("--weights belong to one model: name it")
    if args.weights is not None and args.skip_gain is not None:
        raise UserError("--skip-gain is for new networks: trained ones have their own")
    if args.skip_gain is not None and not math.isfinite(args.skip_gain):
        raise UserError(f"--skip-gain must be finite, not {args.skip_gain}")
    if args.out.suffix not in (".png", ".pdf", ".svg") or not args.out.parent.is_dir():
        raise UserError(f"--out must be a .png, .pdf or .svg in a folder that is there, not {args.out}")
    if args.images < 2 or (args.size is not None and args.size < 1):
        raise UserError("--images must be at least 2 and --size positive")
    found = [curve for name in args.models for curve in _measure(name, args)]
    draw(found, args.out)
    if args.json:
        print(json.dumps([curve.as_dict() for curve in found]))
        return 0
    table = Table("network", "images", "variance behind first .. last block", "off the expected", box=None)
    for curve in found:
        first, last, off = curve.signals[1].variance, curve.signals[-1].variance, largest_deviation(curve)
        expectation = "nothing expected" if math.isnan(off) else f"up to {off:.1%}"
        table.add_row(curve.name, curve.images, f"{first:.3f} .. {last:.3f}", expectation)
    show(table)
    if any(largest_deviation(curve) > 0.2 for curve in found):
        print("In NFNets pooled shortcuts and squeeze-excite take variance away that the bookkeeping does not know of.")
    print(f"drawn in {args.out}")
    return 0


def _measure(name: str, args: _Signal) -> list[Propagation]:
    torch.manual_seed(args.seed)
    config = model_config(name)
    size = args.size or config.train_size
    inputs: dict[str, Tensor] = {"noise": noise(config.in_chans, size, args.images, args.seed)}
    if args.data.root is not None:
        source = open_validation(args.data.root, ())
        inputs[f"images of {Path(args.data.root).resolve().name}"] = sample_images(
            source, published_preprocessing(name, size), args.images
        )
    if args.weights is not None:
        file = find_weights(name, args.weights)
        trained = load_model(file)[0] if is_ours(file) else load_foreign(config, file)
        return [propagation(name, trained, x, label, skip_gain=None) for label, x in inputs.items()]
    model = create_model(name)
    if config.norm == "batch":  # one pass in training fills the running statistics
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = None
            model(inputs["noise"])
    return [
        propagation(name, model, x, label, 1.0 if args.skip_gain is None else args.skip_gain)
        for label, x in inputs.items()
    ]
