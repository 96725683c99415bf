"""normfree train [RECIPE] [--run-dir DIR] [--resume [auto]] [settings], in one process or in many under torchrun."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from normfree.cli.common import among_processes, check_device, parse, warn
from normfree.cli.settings import OPTIONAL, given_settings, images_for, recipe_name
from normfree.config import Given, Run, UserError, check_given, check_ranges, from_dict, to_dict
from normfree.data.sources import Source, SyntheticSource, describe, open_data
from normfree.distributed import Group, may_start_again, rank_of, started_again
from normfree.recipes import RECIPES
from normfree.recipes.dry_run import plan, walk
from normfree.recipes.paper import IMAGENET, PAPER
from normfree.runlog import Screen, duration, percent
from normfree.train.finish import finish
from normfree.train.job import Job, State, Stopped
from normfree.train.loop import begin, check_run, fit, held_out, prepare, resume
from normfree.train.record import RunFolder, conflicts, departures, free_folder, newest_run

RUNS = Path("runs")
_RESUME = (
    "go on with a run: the newest, or that of --run-dir; auto: with that of --run-dir if there is one, else begin it"
)
_Arguments = dataclasses.make_dataclass(
    "Train",
    [
        ("recipe", Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(help=", ".join(RECIPES))], None),
        ("run_dir", Annotated[Path | None, tyro.conf.arg(help="the run folder; runs/RECIPE-NNN if not given")], None),
        ("resume", Annotated[Literal["no", "yes", "auto"], tyro.conf.arg(help=_RESUME)], "no"),
        ("weights", Annotated[str | None, tyro.conf.arg(help="the same as --model.weights")], None),
        ("dry_run", Annotated[bool, tyro.conf.arg(help="print the plan and try each part on synthetic images")], False),
        *((name, section, dataclasses.field(default_factory=section)) for name, section in OPTIONAL.items()),
    ],
    namespace={"__doc__": "Train a network. Without a recipe: the bundled digits, or the folder of --data.root."},
)


def run(arguments: Sequence[str]) -> int:
    """Train, report, and say what can be done next."""
    with _quiet_unless_first():
        args: Any = parse(_Arguments, "train", _with_resume(arguments))
    return among_processes(lambda group: _run(args, group))


@contextlib.contextmanager
def _quiet_unless_first() -> Iterator[None]:
    """What is wrong with the arguments is so for all processes; one says it."""
    with contextlib.ExitStack() as stack:
        if rank_of() > 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def _with_resume(arguments: Sequence[str]) -> list[str]:
    """--resume by itself means yes."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        if argument == "--resume" and (*arguments, "")[i + 1] not in ("no", "yes", "auto"):
            found[i] = "--resume=yes"
    return found


def _run(args: Any, group: Group) -> int:
    given = given_settings(args)
    check_ranges(given.values)
    check_device(given.values.get("train.device"))
    screen = Screen(None if group.first else open(os.devnull, "w"))  # noqa: SIM115 - as long as the process
    if args.dry_run:
        return _dry_run(args, given, screen, group)
    path, going_on = _place(args, given, group)
    job = (_reopen if going_on else _begin)(path, args, given, screen, group)
    again = f"normfree train --run-dir {job.folder.path} --resume"
    try:
        state = resume(job) if going_on else _start(job, given)
        screen.say(f"training    {describe(job.train)}\nvalidation  {describe(job.val)}")
        screen.say(f"{job.total} steps; writing to {job.folder.path}")
        fit(job, state)
    except Stopped as e:
        what = "a checkpoint is saved" if e.saved else "nothing was trained since the last save"
        screen.say(f"stopped; {what}. Go on with: {again}")
        return e.exit_code
    group.close()
    if not group.first:
        return 0
    try:
        _conclude(screen, job.folder, finish(job, state))
    except KeyboardInterrupt:
        screen.say(f"interrupted; the training is done and saved. Write the report with: {again}")
        return 130
    return 0


def _place(args: Any, given: Given, group: Group) -> tuple[Path, bool]:
    """The run folder, and whether there is a run in it to go on with: as rank 0 finds it."""
    auto = args.resume == "auto" or (args.resume == "no" and started_again())
    if args.run_dir is None and (auto or may_start_again()):
        why = "--resume auto" if args.resume == "auto" else "a restart"
        raise UserError(f"{why} finds its run by --run-dir DIR: name it")
    found: tuple[str, bool] = ("", False)
    if not group.first:
        pass
    elif args.resume == "yes":
        found = str(args.run_dir or newest_run(RUNS)), True
    elif auto:
        found = str(args.run_dir), RunFolder(args.run_dir).config.exists()
    else:
        found = str(args.run_dir or free_folder(RUNS, recipe_name(args.recipe, given))), False
    path, going_on = group.broadcast(found)
    return Path(path), going_on


def _begin(path: Path, args: Any, given: Given, screen: Screen, group: Group) -> Job:
    """A new run: everything that can be wrong is found before its folder is made."""
    name, train, val, settings = _fresh(args, given)
    settings = _of_first(settings, group)
    if name.endswith("finetune") and settings.model.weights is None:
        raise UserError("name the weights to start from with --weights FILE")
    check_given(settings, given.values)
    check_run(settings, train, group.world)
    root = settings.data.root
    if root != "digits" and path.resolve().is_relative_to(root):
        raise UserError(f"the run folder {path} would lie among the images in {root}; choose --run-dir elsewhere")
    _say_choices(given, screen)
    if group.first:
        RunFolder.check_free(path)
    return prepare(_on_own_device(settings, group), RunFolder(path), train, val, screen, group)


def _fresh(args: Any, given: Given) -> tuple[str, Source, Source, Run]:
    """(recipe, training images, validation images, settings) of a run as it is asked for."""
    name = recipe_name(args.recipe, given)
    train, val = open_data(images_for(name, given), given.values.get("data.validation", 0.2))
    return name, train, val, RECIPES[name](given, train)


def _of_first(settings: Run, group: Group) -> Run:
    """The settings of rank 0: some follow from the memory that is free."""
    return settings if group.world == 1 else from_dict(Run, group.broadcast(to_dict(settings)))


def _on_own_device(settings: Run, group: Group) -> Run:
    return _on(settings, group.device(settings.train.device))


def _on(settings: Run, device: str) -> Run:
    return dataclasses.replace(settings, train=dataclasses.replace(settings.train, device=device))


def _dry_run(args: Any, given: Given, screen: Screen, group: Group) -> int:
    """Print what a run would do, and walk each of its parts once."""
    if group.world > 1:
        raise UserError("--dry-run takes one process: leave out torchrun")
    name = recipe_name(args.recipe, given)
    root = given.values.get("data.root", "digits" if name == "digits" else None)
    if args.resume != "no" or args.run_dir is not None:
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
    if job.group.first:
        RunFolder.create(job.folder.path, _as_given(job.run, job.group), given.chosen, held_out(job.val))
    return state


def _as_given(settings: Run, group: Group) -> Run:
    """Without the device of one process in particular."""
    return _on(settings, settings.train.device.partition(":")[0]) if group.world > 1 else settings


def _reopen(path: Path, args: Any, given: Given, screen: Screen, group: Group) -> Job:
    folder, settings = RunFolder.open(path)
    settings = _of_first(settings, group)
    if args.resume == "yes":
        if args.recipe is not None and group.first:
            warn("the recipe is ignored with --resume: the run folder has its own settings")
        problems = conflicts(settings, given.values)
    else:  # the command says all of the run, but for what follows from the memory that was free
        t = settings.train
        by_memory = {"train.batch_size": t.batch_size, "train.micro_batch": t.micro_batch}
        problems = departures(settings, _fresh(args, Given(by_memory | given.values))[-1])
    if problems:
        raise UserError(f"{folder.path} was started with other settings: {'; '.join(problems)}; use a new --run-dir")
    settings = given.apply(settings)
    check_device(settings.train.device)
    train, val = open_data(settings.data.root, settings.data.validation)
    check_run(settings, train, group.world)
    return prepare(_on_own_device(settings, group), folder, train, val, screen, group)


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
