"""The settings of a run as flags, and the recipe that fills in the others: for every command that takes them."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from normfree.config import DataConfig, Given, ModelConfig, OptimConfig, TrainConfig, UserError, suggestion
from normfree.models import model_config
from normfree.recipes import RECIPES


def _optional(section: type) -> Any:
    """A section of the settings in which each is optional, for its flags; helped by the comments in its source."""
    hints = typing.get_type_hints(section)
    helps = dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(section), re.MULTILINE))
    fields = []
    for f in dataclasses.fields(section):
        hint = Literal["true", "false"] if hints[f.name] is bool else hints[f.name]
        kind: Any = Annotated[hint | None, tyro.conf.arg(help=helps.get(f.name, ""))]
        fields.append((f.name, kind, dataclasses.field(default=None)))
    return dataclasses.make_dataclass(section.__name__, fields, namespace={"__doc__": section.__doc__})


SECTIONS: dict[str, type] = {"model": ModelConfig, "data": DataConfig, "optim": OptimConfig, "train": TrainConfig}
OPTIONAL = {name: _optional(section) for name, section in SECTIONS.items()}


def given_settings(args: Any) -> Given:
    """What was given on the command line, in sections as those of OPTIONAL; paths are made absolute."""
    sections = {s: getattr(args, s) for s in SECTIONS}
    values = {
        f"{s}.{f.name}": value == "true" if value in ("true", "false") else value
        for s, section in sections.items()
        for f in dataclasses.fields(section)
        if (value := getattr(section, f.name)) is not None
    }
    root = values.get("data.root", "digits")
    if root != "digits" and not root.startswith("hf:"):  # so that other commands find the images from anywhere
        values["data.root"] = str(Path(root).expanduser().resolve())
    if args.weights is not None:
        values["model.weights"] = args.weights
    weights = values.get("model.weights")
    if weights not in (None, "hub", "authors") and "://" not in weights:
        values["model.weights"] = str(Path(weights).expanduser().resolve())
    return Given(values)


def recipe_name(name: str | None, given: Given) -> str:
    """The name of the recipe; the nearest is suggested for one that is not there."""
    name = name or ("folder" if "data.root" in given.values else "digits")
    if name not in RECIPES:
        if Path(name).is_dir():
            raise UserError(f"{name!r} is no recipe but a folder: normfree train --data.root {name}")
        raise UserError(f"unknown recipe {name!r}{suggestion(name, RECIPES) or '; choose from ' + ', '.join(RECIPES)}")
    if "model.name" in given.values:
        model_config(given.values["model.name"])  # raises with the nearest names
    return name


def images_for(recipe: str, given: Given) -> str:
    """The root of the images of a recipe, which is put among what is given.

    Raises:
        UserError: the recipe needs a folder and has none, or has its own images and a folder as well.
    """
    root: str | None = given.values.setdefault("data.root", "digits" if recipe == "digits" else None)
    if root is None:
        raise UserError(f"the recipe {recipe!r} trains on a folder of images: --data.root DIR")
    if (recipe == "digits") != (root == "digits"):
        raise UserError("the recipe 'digits' has its own images; a folder is taken with --data.root DIR alone")
    return root
