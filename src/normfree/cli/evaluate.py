"""normfree evaluate RUN|MODEL [--weights FILE] [--data.root DIR] [--json]."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import tyro

from normfree.cli.common import Speed, Trained, check_device, load_trained, made_ready, parse, warn
from normfree.config import UserError
from normfree.data.crop import Preprocessing
from normfree.data.loader import Loading
from normfree.data.sources import Source, open_validation
from normfree.evaluate import infer, score
from normfree.recipes.choose import workers as choose_workers
from normfree.runlog import Screen, percent
from normfree.train.record import validation_source


@dataclass
class _Data:
    root: str | None = None  # labelled images: CLASS/IMAGES, or its val/; the run's own validation images if not given
    test_size: int | None = None  # side of the images that the network sees, in pixels
    eval_crop: str | None = None  # "center", "squash" or "pad"
    margin: int | None = None  # pixels cut off around
    antialias: bool | None = None  # of the resizing; the published NFNets are evaluated without
    workers: int | None = None  # loader processes; one a core for a CUDA device if not given, otherwise 0


@dataclass
class _Arguments(Speed):
    """Score weights on labelled images, prepared as is stored with them, or as is published for them."""

    target: Annotated[str, tyro.conf.Positional]  # a run folder, a weights file, or a model's name with --weights
    weights: str | None = None  # a file (ours, the authors' .npz, timm's), an address, "hub" or "authors"
    data: _Data = field(default_factory=_Data)
    batch_size: int | None = None  # that stored with the weights if not given
    json: bool = False  # print one JSON object; accuracies are fractions of 1


def run(arguments: Sequence[str]) -> int:
    """Print the scores."""
    args = parse(_Arguments, "evaluate", arguments)
    check_device(args.device)
    trained = load_trained(args.target, args.weights)
    preprocessing = _preprocessing(trained.preprocessing, args.data)
    source = _source(trained, args.data.root)
    batch = trained.batch_size if args.batch_size is None else args.batch_size
    if batch < 1 or (args.data.workers or 0) < 0:
        raise UserError("--batch-size must be positive, and --data.workers not negative")
    model = made_ready(trained, args, source, preprocessing, batch)
    device = next(model.parameters()).device.type
    workers = choose_workers(device)[0] if args.data.workers is None else args.data.workers
    with Screen(sys.stderr).progress(math.ceil(len(source) / batch), 0) as line:
        loading = Loading(workers, pin=device == "cuda", timeout=600.0)
        outputs = infer(model, source, preprocessing, batch, loading, done=line.advance)
    for index, reason in outputs.bad:
        warn(f"not counted: {source.name(index)}: {reason}")
    scores = score(outputs, trained.loss)
    if args.json:
        print(json.dumps(scores.as_dict()))
    else:
        top = f"top-1 {percent(scores.top1)}  top-5 {percent(scores.top5)}"
        if scores.average_precision is not None:
            top = f"average precision {percent(scores.average_precision)}  {top}"
        print(f"{top}  loss {scores.loss:.4f}  {scores.images} images")
    return 0


def _preprocessing(stored: Preprocessing, data: _Data) -> Preprocessing:
    """What is stored, but for what is given."""
    given: dict[str, Any] = {
        "size": data.test_size,
        "crop": data.eval_crop,
        "margin": data.margin,
        "antialias": data.antialias,
    }
    return replace(stored, **{name: value for name, value in given.items() if value is not None})


def _source(trained: Trained, root: str | None) -> Source:
    if root is not None:
        source = open_validation(root, trained.classes)
        outputs = trained.model.config.num_classes
        if not trained.classes and len(source.classes) != outputs:
            raise UserError(f"{root} has {len(source.classes)} classes, {trained.name} {outputs} outputs without names")
        return source
    if trained.folder is None or trained.run is None:
        raise UserError("name the labelled images with --data.root DIR")
    return validation_source(trained.folder, trained.run, trained.classes)
