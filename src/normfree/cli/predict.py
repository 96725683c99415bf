"""normfree predict RUN IMAGE|DIR... [--json]."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro
from rich.table import Table

from normfree.cli.common import Speed, check_device, load_trained, made_ready, parse, show, warn
from normfree.predict import find_images, image_files, predict
from normfree.runlog import percent


@dataclass
class _Arguments(Speed):
    """Label image files."""

    target: Annotated[str, tyro.conf.Positional]  # a run folder, a weights file, or a model's name with --weights
    paths: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE|DIR...")]  # files, folders
    weights: str | None = None  # a file (ours, the authors' .npz, timm's), an address, "hub" or "authors"
    json: bool = False  # print one JSON list; probabilities are fractions of 1


def run(arguments: Sequence[str]) -> int:
    """Print a table or JSON; 1 if some image could not be read."""
    args = parse(_Arguments, "predict", arguments)
    if not args.paths:
        warn("name at least one image or folder")
        return 2
    check_device(args.device)
    trained = load_trained(args.target, args.weights)
    images = find_images(args.paths)
    classes = trained.classes or tuple(str(i) for i in range(trained.model.config.num_classes))
    model = made_ready(trained, args, image_files(images, classes), trained.preprocessing, trained.batch_size)
    rows, bad = predict(model, images, classes, trained.preprocessing, trained.batch_size, trained.loss)
    if args.json:
        print(json.dumps(rows))
    elif rows:
        table = Table("image", "label", "probability", "next", box=None, header_style="dim")
        for row in rows:
            others = ", ".join(f"{t['label']} {percent(t['probability'])}" for t in row["top5"][1:3])
            table.add_row(row["path"], row["label"], percent(row["probability"]), others)
        show(table)
    for path, reason in bad:
        warn(f"{path}: {reason}")
    return 1 if bad else 0
