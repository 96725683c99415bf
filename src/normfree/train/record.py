"""The run folder: what a run writes down, and where."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from normfree.config import MOVABLE, Run, UserError, check_ranges, flat, from_dict, to_dict
from normfree.data.sources import Source, open_data, open_held_out, open_validation
from normfree.files import parse_json, read_json, sync_folder, write_atomic, write_json
from normfree.train.checkpoint import has_checkpoint


class RunFolder:
    """Paths of a run folder, and the files in it.

    config.json (resolved settings), reasons.json (why some were chosen), metrics.jsonl (a line per logged step and per
    evaluation), summary.json, checkpoints/, best.safetensors (weights with classes and preprocessing), validation.json
    (the held-out files, if the split was made here), bad_images.txt, plots as PNG, report.html; micro_batch.json, where
    memory ran out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.summary = path / "config.json", path / "summary.json"
        self.metrics, self.checkpoints = path / "metrics.jsonl", path / "checkpoints"
        self.reasons, self.micro_batch = path / "reasons.json", path / "micro_batch.json"
        self.weights, self.report = path / "best.safetensors", path / "report.html"
        self.validation, self.bad_images = path / "validation.json", path / "bad_images.txt"

    @classmethod
    def check_free(cls, path: Path) -> RunFolder:
        """The run folder that could be made at a path.

        Raises:
            UserError: something is there already.
        """
        folder = cls(path)
        if folder.config.exists() or has_checkpoint(folder.checkpoints):
            raise UserError(f"{path} has a run already; continue it with --resume, or choose another --run-dir")
        try:
            if path.exists() and any(map(folder._is_others, path.iterdir())):
                raise UserError(f"{path} is not empty; choose another --run-dir")
        except OSError as e:
            raise UserError(f"{path} cannot be written: {e.strerror or e}") from e
        return folder

    def _is_others(self, path: Path) -> bool:
        """Whether it is not what a start leaves that was killed before config.json was there."""
        return path not in (self.reasons, self.validation) and not (path.name.startswith(".") and path.suffix == ".tmp")

    @classmethod
    def create(
        cls, path: Path, run: Run, chosen: Sequence[tuple[str, Any, str]] = (), held_out: Sequence[str] | None = None
    ) -> RunFolder:
        """A new run folder with the reasons of what was chosen, and the names of images that are held out, if any.

        config.json comes last: where it is, there is all that a run goes on from.

        Raises:
            UserError: the folder has a run already, or cannot be written.
        """
        folder = cls.check_free(path)
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.reasons, {name: reason for name, _, reason in chosen})
            if held_out is None:
                folder.validation.unlink(missing_ok=True)  # of a start that was killed
            else:
                write_json(folder.validation, list(held_out))
            write_json(folder.config, to_dict(run))
        except OSError as e:
            raise UserError(f"{path} cannot be written: {e.strerror or e}") from e
        return folder

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, Run]:
        """An existing run folder and its settings.

        Raises:
            UserError: not a run folder, or its config.json is broken.
        """
        folder = cls(path)
        if not folder.config.exists():
            raise UserError(f"{path} is not a run folder: it has no config.json")
        try:
            value = read_json(folder.config)
        except OSError as e:
            raise UserError(f"{folder.config} cannot be read: {e.strerror or e}") from e
        except ValueError as e:
            raise UserError(f"{folder.config} is not JSON: {e}") from e
        run = from_dict(Run, value, str(folder.config))
        check_ranges(flat(run))
        return folder, run

    def read_reasons(self) -> dict[str, str]:
        """Reason by name of the settings that were chosen; nothing if the file is gone or broken."""
        try:
            return {str(name): str(reason) for name, reason in read_json(self.reasons).items()}
        except (OSError, ValueError, AttributeError):
            return {}

    def write_micro_batch(self, images: int) -> None:
        """Note that so many images at once are the most from now on."""
        write_json(self.micro_batch, {"micro_batch": images})

    def read_micro_batch(self) -> int | None:
        """What was noted last; None if nothing was, or not legibly."""
        try:
            found = read_json(self.micro_batch)["micro_batch"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if isinstance(found, int) and found > 0 else None

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as f:
            f.write(json.dumps(line, allow_nan=False) + "\n")

    def sync_metrics(self) -> None:
        """Until the lines so far are on the disk, which a checkpoint that is behind them relies on."""
        if self.metrics.is_file():
            with open(self.metrics, "rb") as f:
                os.fsync(f.fileno())
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; broken ones, such as a half-written last one, are left out."""
        if not self.metrics.is_file():
            return []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        return [value for line in lines if line.endswith("\n") and (value := _metrics_line(line)) is not None]

    def truncate_metrics(self, step: int, evaluated_step: int) -> None:
        """Forget what was logged behind a checkpoint, since it will be logged again."""
        limit = {"train": step, "eval": evaluated_step}
        kept = [line for line in self.read_metrics() if line["step"] <= limit[line["kind"]]]
        write_atomic(self.metrics, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _metrics_line(line: str) -> dict[str, Any] | None:
    try:
        value = parse_json(line)
    except ValueError:
        return None
    fine = isinstance(value, dict) and value.get("kind") in ("train", "eval") and isinstance(value.get("step"), int)
    return value if fine else None


def validation_source(folder: RunFolder, run: Run, classes: tuple[str, ...]) -> Source:
    """The images that a run was validated on: its val/, or those that it held out."""
    if run.data.root == "digits":
        return open_data("digits", run.data.validation)[1]
    if not folder.validation.exists():
        return open_validation(run.data.root, classes)
    try:
        names = read_json(folder.validation)
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError("not a list of names")
    except (OSError, ValueError) as e:
        raise UserError(f"{folder.validation} is broken: {e}") from e
    return open_held_out(run.data.root, names, classes)


def free_folder(parent: Path, name: str) -> Path:
    """parent/name-001, or the first number that is not taken."""
    number = 1
    while (parent / f"{name}-{number:03d}").exists():
        number += 1
    return parent / f"{name}-{number:03d}"


def newest_run(parent: Path) -> Path:
    """The run folder below a parent that was written to last.

    Raises:
        UserError: there is none.
    """
    runs = [p.parent for p in parent.glob("*/config.json")]
    if not runs:
        raise UserError(f"there is no run in {parent}{os.sep} to resume; name one with --run-dir")
    return max(runs, key=lambda p: max(f.stat().st_mtime for f in p.rglob("*")))


def conflicts(run: Run, given: dict[str, Any]) -> list[str]:
    """The given settings that differ from those of a run, each with both values."""
    current = flat(run)
    changed = {n: v for n, v in given.items() if current[n] != v and n not in MOVABLE}
    return [f"{n} is {current[n]!r} there, not {v!r}" for n, v in changed.items()]


def departures(run: Run, asked: Run) -> list[str]:
    """The settings in which a run is not the one that a whole command asks for, each with both values."""
    recipe = [f"the recipe is {run.recipe!r} there, not {asked.recipe!r}"] if run.recipe != asked.recipe else []
    return recipe + conflicts(run, flat(asked))
