"""Recipes: functions that return a whole run. An explicit table, no registration."""

from __future__ import annotations

from collections.abc import Callable

from normfree.config import Given, Run
from normfree.recipes.digits import digits
from normfree.recipes.folder import folder

RECIPES: dict[str, Callable[[Given], Run]] = {"digits": digits, "folder": folder}
