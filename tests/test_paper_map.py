"""What docs/paper-map.md names is there: tests, functions, flags, options, networks, recipes and commands."""

from __future__ import annotations

import re
from dataclasses import fields
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

from normfree.cli import COMMANDS
from normfree.config import DataConfig, ModelConfig, OptimConfig, TrainConfig, check_ranges
from normfree.models import list_models, model_config, parse_options, with_options
from normfree.recipes import RECIPES
from normfree.recipes.paper import PAPER

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "paper-map.md").read_text()
HEADER = ["§", "The paper", "Here", "Checked by"]
FLAGS = {
    f"{section}.{field.name}"
    for section, kind in (("model", ModelConfig), ("data", DataConfig), ("optim", OptimConfig), ("train", TrainConfig))
    for field in fields(kind)
}
STATUSES = ("not yet: ", "no test: ", "a claim, not a method")


class Row(NamedTuple):
    place: str
    paper: str
    here: str
    checked: str


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


TABLE = [_cells(line) for line in TEXT.splitlines() if line.startswith("|")]
ROWS = [Row(*cells) for cells in TABLE if cells != HEADER and set("".join(cells)) != {"-"} and len(cells) == 4]
NAMES = sorted({name for row in ROWS for name in re.findall(r"`([^`]+)`", " ".join(row))})
TESTS = [name for name in NAMES if name.startswith("tests/")]
PLACES = [name for name in NAMES if re.match(r"[\w/]+\.py: ", name)]
FLAGGED = [name for name in NAMES if name.startswith("--")]
USED_COMMANDS = [name for name in NAMES if name.startswith("normfree ")]
OPTIONS = [name for name in NAMES if re.match(r"\w+=", name) and name != "name=value"]
OTHERS = [n for n in NAMES if n not in {*TESTS, *PLACES, *FLAGGED, *USED_COMMANDS, *OPTIONS, "name=value"}]


def _defined(file: Path) -> set[str]:
    """The tests that a file defines."""
    return set(re.findall(r"^def (test_\w+)\(", file.read_text(), re.MULTILINE))


def test_the_tables_are_whole() -> None:
    """Every line has four cells, none empty; every section and table is there; nothing is in two rows."""
    assert all(len(cells) == 4 and all(cells) for cells in TABLE)
    assert 80 <= len(ROWS) <= 150
    places = {part for row in ROWS for part in row.place.split(", ")}
    sections = {"3", "4", "4.1", "5", "5.1", "6.1", "6.2", *(f"A.{n}" for n in range(1, 6)), "B", "C", "D", "E"}
    assert sections | {f"T{n}" for n in range(1, 7)} | {f"Eq. {n}" for n in range(1, 4)} <= places
    assert len({(row.place, row.paper) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.place} {row.paper[:40]}")
def test_a_row_has_a_test_or_says_why_not(row: Row) -> None:
    """Its last cell names a test or one of the three statuses, and every backtick has its partner."""
    assert "`tests/" in row.checked or any(status in row.checked for status in STATUSES)
    assert " ".join(row).count("`") % 2 == 0


@pytest.mark.parametrize("name", TESTS)
def test_named_tests_exist(name: str) -> None:
    """As functions of the file that is named, without parameters in brackets."""
    file, _, function = name.partition("::")
    assert function in _defined(ROOT / file)


@pytest.mark.parametrize("name", PLACES)
def test_named_places_exist(name: str) -> None:
    """The file is below src/normfree, and each part of the name is a word of it."""
    file, _, dotted = name.partition(": ")
    source = (ROOT / "src" / "normfree" / file).read_text()
    assert all(re.search(rf"\b{re.escape(part)}\b", source) for part in dotted.split("."))


@pytest.mark.parametrize("name", FLAGGED)
def test_named_flags_are_settings(name: str) -> None:
    """And a value that stands beside one is within its range."""
    flag, *values = name.removeprefix("--").split(" ")
    setting = flag.replace("-", "_")
    assert setting in FLAGS
    if len(values) == 1:
        number = re.fullmatch(r"[\d.]+(e-?\d+)?", values[0])
        check_ranges({setting: float(values[0]) if number else values[0]})


@pytest.mark.parametrize("name", OPTIONS)
def test_named_options_are_taken_by_the_network(name: str) -> None:
    """As --model.options takes them."""
    with_options(model_config("nfnet_f0"), parse_options([name]))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_called_the_default_are(name: str) -> None:
    """Where a row calls an option the default, it is NFNet-F0's."""
    f0 = model_config("nfnet_f0")
    if any(re.search(rf"`{re.escape(name)}`[^;.]*, the defaults?\b", row.here) for row in ROWS):
        assert with_options(f0, parse_options([name])) == f0


@pytest.mark.parametrize("name", USED_COMMANDS)
def test_named_commands_exist(name: str) -> None:
    """The command itself; the flags beside it belong to the tests of the command line."""
    assert name.split(" ")[1] in COMMANDS


@pytest.mark.parametrize("name", OTHERS)
def test_other_names_are_networks_or_recipes(name: str) -> None:
    """Or patterns that match some; what stands in backticks is nothing else."""
    assert list_models(name) or any(fnmatch(recipe, name) for recipe in RECIPES)


def test_every_recipe_of_the_paper_is_mapped() -> None:
    """By name or pattern; and the networks of Tables 1 to 5."""
    assert all(any(fnmatch(recipe, name) for name in OTHERS) for recipe in PAPER)
    mapped = {model for name in OTHERS for model in list_models(name)}
    steps = {f"nfnet_f{n}_{step}" for n in range(4) for step in ("baseline", "modified_width", "default_width")}
    resnets = {f"{kind}_resnet{n}" for kind in ("nf", "bn") for n in (50, 101, 152, 200)}
    assert {f"nfnet_f{n}" for n in range(7)} | steps | resnets | {"nfnet_f4_plus", "nfnet_f4_plus_192"} <= mapped
