"""normfree data sample DIR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from normfree.cli.common import parse, warn
from normfree.config import UserError, suggestion
from normfree.data.sample import write_sample

ACTIONS = ("sample",)


@dataclass
class _Sample:
    """Write DIR/train and DIR/val: 12 classes of procedural pictures as JPEG, one folder a class."""

    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # a folder without train/ and val/
    per_class: int = 200  # training images of each class
    validation_per_class: int = 50  # validation images of each class
    seed: int = 0


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument says."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: normfree data sample DIR    write a sample set of images")
        return 0
    action, rest = arguments[0], arguments[1:]
    if action not in ACTIONS:
        warn(f"unknown action {action!r}{suggestion(action, ACTIONS) or '; choose from ' + ', '.join(ACTIONS)}")
        return 2
    args = parse(_Sample, "data sample", rest)
    if args.per_class < 1 or args.validation_per_class < 1 or args.seed < 0:
        raise UserError("counts must be positive, and the seed must not be negative")
    classes = write_sample(
        args.root, per_class=args.per_class, validation_per_class=args.validation_per_class, seed=args.seed
    )
    print(f"wrote {len(classes)} classes to {args.root}: {', '.join(classes)}")
    print(f"\nnext:\n  normfree train --data.root {args.root}")
    return 0
