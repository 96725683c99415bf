"""normfree data sample|check|show."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from normfree.cli.common import check_device, parse, warn
from normfree.config import Run, UserError, check_given, check_ranges, printable, suggestion
from normfree.data.check import Copies, Image, Report, Spread, check
from normfree.data.sample import write_sample
from normfree.data.sources import Source, open_data
from normfree.files import write_atomic
from normfree.runlog import ProgressLine, Screen

_SHOWN = 5  # names of each kind on the screen; --json has all


@dataclass
class _Sample:
    """Write DIR/train and DIR/val: 12 classes of procedural pictures as JPEG, one folder a class."""

    root: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # a folder without train/ and val/
    per_class: int = 200  # training images of each class
    validation_per_class: int = 50  # validation images of each class
    seed: int = 0


@dataclass
class _Check:
    """Read every image once, and say what a set is like and what is wrong with it.

    The exit code is 1 if there are problems: the set cannot be trained on, images cannot be read, the same image is on
    both sides or has different labels, or validation has a class that training has not. Notes are no problems.
    """

    root: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]  # whatever --data.root of train takes
    validation: float = 0.2  # share that training would hold out, where there are no images for validation
    workers: int | None = None  # processes that read; one a core if not given, 0 reads in this one
    json: bool = False  # print one JSON object, with every path


def run(arguments: Sequence[str]) -> int:
    """Do what the first argument says."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    action, rest = arguments[0], arguments[1:]
    if action not in _ACTIONS:
        warn(f"unknown action {action!r}{suggestion(action, _ACTIONS) or '; choose from ' + ', '.join(_ACTIONS)}")
        return 2
    return _ACTIONS[action][0](rest)


def _sample(arguments: Sequence[str]) -> int:
    args = parse(_Sample, "data sample", arguments)
    if args.per_class < 1 or args.validation_per_class < 1 or args.seed < 0:
        raise UserError("counts must be positive, and the seed must not be negative")
    classes = write_sample(
        args.root, per_class=args.per_class, validation_per_class=args.validation_per_class, seed=args.seed
    )
    print(f"wrote {len(classes)} classes to {args.root}: {', '.join(classes)}")
    print(f"\nnext:\n  normfree data show {args.root}\n  normfree train --data.root {args.root}")
    return 0


def _check(arguments: Sequence[str]) -> int:
    args = parse(_Check, "data check", arguments)
    workers = _cores() if args.workers is None else args.workers
    if workers < 0 or not 0.0 < args.validation < 1.0:
        raise UserError("--workers must not be negative, and --validation must be between 0 and 1")
    report = _read(args.root, args.validation, workers)
    if args.json:
        print(json.dumps(report.as_dict()))
    elif not report.splits:
        raise UserError(report.errors[0])
    else:
        for line in _lines(report):
            print(printable(line))
    return 0 if report.ok else 1


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(root: str, validation: float, workers: int) -> Report:
    """The report, with progress on the error stream: the bar begins when the images are counted."""
    screen, bars = Screen(sys.stderr), list[ProgressLine]()
    with ExitStack() as stack:

        def tell(done: int, broken: int, total: int) -> None:
            if not bars:
                bars.append(stack.enter_context(screen.progress(total, 0)))
            bars[0].update(done, f"{broken:,} broken")

        return check(root, validation, workers, tell)


def _lines(report: Report) -> Iterator[str]:
    """What is said about a set."""
    for split, side in report.splits.items():
        held = ", held out" if side.held_out else ""
        yield f"{split:<12}{side.images:,} images in {side.classes:,} classes{held}: {side.place}"
    if b := report.balance:
        low, middle, high = (f"{n:,.0f}" for n in (b.images.min, b.images.median, b.images.max))
        yield f"{'balance':<12}{low} training images in {b.smallest!r}, median {middle}, {high} in {b.largest!r}"
    if s := report.sizes:
        yield f"{'width':<12}{_spread(s.width)} pixels"
        yield f"{'height':<12}{_spread(s.height)} pixels"
        yield f"{'aspect':<12}{_spread(s.aspect, 2)}"
        yield f"{'short side':<12}{_shares(s.short_side)}"
        yield f"{'formats':<12}{', '.join(f'{name} {n:,}' for name, n in report.formats.items())}"
    problems, notes = list(_problems(report)), list(_notes(report))
    for kind, found in (("problem", problems), ("note", notes)):
        for what, names in found:
            yield from ("", f"{kind}: {what}")
            yield from (f"  {name}" for name in _first(names))
    yield from ("", f"{_count(len(problems), 'problem')}, {_count(len(notes), 'note')}")


_Finding = tuple[str, list[str]]  # what, and the names that it is about


def _problems(report: Report) -> Iterator[_Finding]:
    yield from ((error, []) for error in report.errors)
    by_reason = defaultdict(list)
    for image in report.broken:
        by_reason[re.sub(r"\d+", "N", image.reason)].append(image)
    for reason, images in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        names = [f"{i.path}: {i.reason}" if i.reason != reason else i.path for i in images]
        yield f"{_count(len(images), 'image')} cannot be read: {reason}", names
    if report.only_in_validation:
        yield f"{_classes(report.only_in_validation)} only in validation", report.only_in_validation
    if leaks := [c for c in report.copies if c.leak]:
        side = report.splits["validation"]
        held = ", held out of the same folder" if side.held_out else ""
        yield f"{_count(len(leaks), 'image')} both in training and in validation{held}", _same(leaks)
    if conflicts := [c for c in report.copies if c.conflict]:
        yield f"{_count(len(conflicts), 'image')} with different labels", _same(conflicts)


def _notes(report: Report) -> Iterator[_Finding]:
    if again := [c for c in report.copies if not c.leak and not c.conflict]:
        yield f"{_count(len(again), 'image')} more than once, with the same label", _same(again)
    if report.balance and report.balance.few:
        few = [f"{name}: {report.classes[name]['train']}" for name in report.balance.few]
        yield f"{_classes(few)} with few training images", few
    for names, where in ((report.only_in_train, "only in training"), (report.without_images, "without any image")):
        if names:
            yield f"{_classes(names)} {where}", names
    if report.near_names:
        near = [f"{a!r} and {b!r}" for a, b in report.near_names]
        yield "classes whose names are nearly the same", near
    if report.wrong_names:
        names = [f"{i.path}: {i.format}" for i in report.wrong_names]
        yield f"{_count(len(names), 'image')} of another format than the name says", names
    if report.ignored:
        yield f"{_count(len(report.ignored), 'file')} left out", report.ignored


def _same(copies: list[Copies]) -> list[str]:
    return [f"{' = '.join(_first([_image(i, c) for i in _mixed(c.images)], 3))} (same {c.same})" for c in copies]


def _mixed(images: list[Image]) -> list[Image]:
    """One of each side and label first, so that the first few tell what is wrong."""
    before: Counter[tuple[str, ...]] = Counter()
    ranks = []
    for image in images:
        kind = (image.split, *image.classes)
        ranks.append(before[kind])
        before[kind] += 1
    return [images[i] for i in sorted(range(len(images)), key=ranks.__getitem__)]


def _image(image: Image, copies: Copies) -> str:
    """Its path, and what the copies differ in if the path may not tell it."""
    side = f"{image.split}: " if copies.leak else ""
    return f"{side}{image.path}" + (f" [{', '.join(image.classes)}]" if copies.conflict else "")


def _first(names: list[str], shown: int = _SHOWN) -> list[str]:
    more = len(names) - shown
    return names if more <= 0 else [*names[:shown], f".. and {more:,} more (--json has all)"]


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def _classes(names: list[str]) -> str:
    return f"{len(names):,} class{'es' * (len(names) != 1)}"


def _spread(s: Spread, digits: int = 0) -> str:
    return f"{s.min:,.{digits}f} to {s.max:,.{digits}f}, median {s.median:,.{digits}f}"


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{sides}: {100 * n / total:.0f} %" for sides, n in counts.items())


def _show(arguments: Sequence[str]) -> int:
    """Draw the first training images of a recipe as its network would see them; no network is made."""
    from normfree.recipes import RECIPES
    from normfree.report import image_grid
    from normfree.train.build import first_images

    args = parse(_show_arguments(), "data show", arguments)
    if args.recipe not in RECIPES and args.data.root is None and args.recipe and Path(args.recipe).is_dir():
        args.recipe, args.data.root = None, args.recipe
    if args.out.suffix != ".png" or not args.out.parent.is_dir():
        raise UserError(f"--out must be a .png in a folder that is there, not {args.out}")
    if args.images < 1:
        raise UserError("--images must be positive")
    settings, train = _settings(args)
    images, targets = first_images(settings, train, args.images)
    picture = io.BytesIO()
    image_grid(images, targets, train.classes).savefig(picture, format="png")
    write_atomic(args.out, picture.getvalue())
    size = settings.data.size
    print(f"the first {len(images)} training images of {settings.recipe}, {size} x {size}: drawn in {args.out}")
    return 0


def _show_arguments() -> Any:
    """A recipe and every setting of `normfree train`; what is no part of the images changes nothing here."""
    from normfree.cli.settings import OPTIONAL
    from normfree.recipes import RECIPES

    recipe = tyro.conf.arg(metavar="[RECIPE|DIR]", help="as for normfree train: " + ", ".join(RECIPES))
    out = tyro.conf.arg(metavar="FILE.png", help="the picture")
    images = tyro.conf.arg(help="how many; at most a batch")
    weights = tyro.conf.arg(help="the same as --model.weights; only what they say of their images is read")
    return dataclasses.make_dataclass(
        "Show",
        [
            ("recipe", Annotated[str | None, tyro.conf.Positional, recipe], None),
            ("out", Annotated[Path, out], Path("augmented.png")),
            ("images", Annotated[int, images], 32),
            ("weights", Annotated[str | None, weights], None),
            *((name, section, dataclasses.field(default_factory=section)) for name, section in OPTIONAL.items()),
        ],
        namespace={"__doc__": "Draw the first training images as the network sees them: of DIR, or of the digits."},
    )


def _settings(args: Any) -> tuple[Run, Source]:
    """The run that `normfree train` would make of these arguments, and its training images."""
    from normfree.cli.settings import given_settings, images_for, recipe_name
    from normfree.recipes import RECIPES

    given = given_settings(args)
    check_ranges(given.values)
    check_device(given.values.get("train.device"))
    name = recipe_name(args.recipe, given)
    root = images_for(name, given)
    given.values.setdefault("train.micro_batch", 1)  # to measure it takes a network, and no picture depends on it
    train, _ = open_data(root, given.values.get("data.validation", 0.2))
    settings = RECIPES[name](given, train)
    check_given(settings, given.values)
    return settings, train


_ACTIONS: dict[str, tuple[Callable[[Sequence[str]], int], str, str]] = {
    "sample": (_sample, "sample DIR", "write a sample set of images"),
    "check": (_check, "check DIR", "read every image of a set once, and say what is wrong with it"),
    "show": (_show, "show [RECIPE] [--data.root DIR]", "draw training images as the network sees them"),
}


def _usage() -> str:
    lines = [f"  {usage:<33} {what}" for _, usage, what in _ACTIONS.values()]
    text = ["usage: normfree data ACTION ..", "", *lines, "", "normfree data ACTION --help shows the options of each."]
    return "\n".join(text)
