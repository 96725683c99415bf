"""Recipes: functions of what the user gave and of the training images, which return a whole run.

An explicit table, no registration.
"""

from __future__ import annotations

from collections.abc import Callable

from normfree.config import Given, Run
from normfree.data.sources import Source
from normfree.recipes.digits import digits
from normfree.recipes.folder import finetune, folder
from normfree.recipes.paper import PAPER

RECIPES: dict[str, Callable[[Given, Source], Run]] = {
    "digits": digits,
    "folder": folder,
    "finetune": finetune,
    **PAPER,
}
