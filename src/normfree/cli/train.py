"""normfree train [RECIPE] [--run-dir DIR] [--resume] [settings]."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from normfree.cli.common import check_device, parse, warn
from normfree.cli.settings import OPTIONAL, given_settings, images_for, recipe_name
from normfree.config import Given, UserError, check_given, check_ranges
from normfree.data.sources import Source, SyntheticSource, describe, open_data
from normfree.recipes import RECIPES
from normfree.recipes.dry_run import plan, walk
from normfree.recipes.paper import IMAGENET, PAPER
from normfree.runlog import Screen, duration, percent
from normfree.train.finish import finish
from normfree.train.loop import Job, State, Stopped, begin, check_run, fit, held_out, prepare, resume
from normfree.train.record import RunFolder, conflicts, free_folder, newest_run

RUNS = Path("runs")
_Arguments = dataclasses.make_dataclass(
    "Train",
    [
        ("recipe", Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(help=", ".join(RECIPES))], None),
        ("run_dir", Annotated[Path | None, tyro.conf.arg(help="the run folder; runs/RECIPE-NNN if not given")], None),
        ("resume", Annotated[bool, tyro.conf.arg(help="go on with a run: the newest, or that of --run-dir")], False),
        ("weights", Annotated[str | None, tyro.conf.arg(help="the same as --model.weights")], None),
        ("dry_run", Annotated[bool, tyro.conf.arg(help="print the plan and try each part on synthetic images")], False),
        *((name, section, dataclasses.field(default_factory=section)) for name, section in OPTIONAL.items()),
    ],
    namespace={"__doc__": "Train a network. Without a recipe: the bundled digits, or the folder of --data.root."},
)


def run(arguments: Sequence[str]) -> int:
    """Train, report, and say what can be done next."""
    args: Any = parse(_Arguments, "train", arguments)
    given = given_settings(args)
    check_ranges(given.values)
    check_device(given.values.get("train.device"))
    screen = Screen()
    if args.dry_run:
        return _dry_run(args, given, screen)
    job = _reopen(args, given, screen) if args.resume else _begin(args, given, screen)
    again = f"normfree train --run-dir {job.folder.path} --resume"
    try:
        state = resume(job) if args.resume else _start(job, given)
        screen.say(f"training    {describe(job.train)}\nvalidation  {describe(job.val)}")
        screen.say(f"{job.total} steps; writing to {job.folder.path}")
        fit(job, state)
    except Stopped as e:
        screen.say(f"stopped; a checkpoint is saved. Go on with: {again}")
        return e.exit_code
    try:
        _conclude(screen, job.folder, finish(job, state))
    except KeyboardInterrupt:
        screen.say(f"interrupted; the training is done and saved. Write the report with: {again}")
        return 130
    return 0


def _begin(args: Any, given: Given, screen: Screen) -> Job:
    """A new run: everything that can be wrong is found before its folder is made."""
    name = recipe_name(args.recipe, given)
    root = images_for(name, given)
    train, val = open_data(root, given.values.get("data.validation", 0.2))
    settings = RECIPES[name](given, train)
    if name.endswith("finetune") and settings.model.weights is None:
        raise UserError("name the weights to start from with --weights FILE")
    check_given(settings, given.values)
    check_run(settings, train)
    path = args.run_dir or free_folder(RUNS, name)
    if root != "digits" and path.resolve().is_relative_to(root):
        raise UserError(f"the run folder {path} would lie among the images in {root}; choose --run-dir elsewhere")
    _say_choices(given, screen)
    RunFolder.check_free(path)
    return prepare(settings, RunFolder(path), train, val, screen)


def _dry_run(args: Any, given: Given, screen: Screen) -> int:
    """Print what a run would do, and walk each of its parts once."""
    name = recipe_name(args.recipe, given)
    root = given.values.get("data.root", "digits" if name == "digits" else None)
    if args.resume or args.run_dir is not None:
        raise UserError("--dry-run neither resumes nor writes a run folder: leave out --resume and --run-dir")
    if root is None and name not in PAPER:
        raise UserError(f"the recipe {name!r} trains on a folder of images: --data.root DIR")
    if root is None:
        given.values["data.root"] = "imagenet"  # a name in the plan; its numbers are those of ImageNet
        train: Source = SyntheticSource(*IMAGENET[::2])
    else:
        given.values["data.root"] = root
        train, _ = open_data(root, given.values.get("data.validation", 0.2))
    settings = RECIPES[name](given, train)
    check_given(settings, given.values)
    check_run(settings, train)
    _say_choices(given, screen)
    for line in plan(settings, len(train), len(train.classes)):
        screen.say(line)
    try:
        for line in walk(settings, len(train.classes)):
            screen.say(line)
    except Stopped as e:
        return e.exit_code
    return 0


def _start(job: Job, given: Given) -> State:
    """Make the folder of a new run, once its weights are loaded."""
    state = begin(job)
    RunFolder.create(job.folder.path, job.run, given.chosen)
    held_out(job.folder, job.val)
    return state


def _reopen(args: Any, given: Given, screen: Screen) -> Job:
    if args.recipe is not None:
        warn("the recipe is ignored with --resume: the run folder has its own settings")
    folder, settings = RunFolder.open(args.run_dir or newest_run(RUNS))
    if problems := conflicts(settings, given.values):
        raise UserError(f"{folder.path} was started with other settings: {'; '.join(problems)}; use a new --run-dir")
    settings = given.apply(settings)
    check_device(settings.train.device)
    train, val = open_data(settings.data.root, settings.data.validation)
    check_run(settings, train)
    return prepare(settings, folder, train, val, screen)


def _conclude(screen: Screen, folder: RunFolder, summary: dict[str, Any]) -> None:
    screen.say(
        f"\ntop-1 {percent(summary['top1'])} of {summary['images']} held-out images, "
        f"loss {summary['loss']:.4f}, in {duration(summary['wall_seconds'])} ({summary['best']})"
    )
    if summary["bad_images"] or summary["ignored_files"]:
        counts = f"{summary['bad_images']} images could not be read, {summary['ignored_files']} files are no images"
        screen.say(f"{counts}: {folder.bad_images}")
    screen.say(f"report    {folder.report}\nweights   {folder.weights}\n\nnext:")
    screen.say(f"  normfree evaluate {folder.path}\n  normfree predict {folder.path} IMAGE_OR_FOLDER")


def _say_choices(given: Given, screen: Screen) -> None:
    for setting, value, why in given.chosen:
        screen.say(f"{setting:<22} {_short(value):<14} {why}")


def _short(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()  # as the flag takes it
    return f"{value:.4g}" if isinstance(value, float) else str(value)
