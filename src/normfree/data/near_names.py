"""Classes that are probably one: their names differ in how they are written only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator


def near_names(classes: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of classes whose names differ by case, spaces, hyphens, underscores or a plural only."""
    plain = {name: re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold()) for name in classes}
    first: dict[str, str] = {}
    pairs: dict[tuple[str, str], None] = {}
    for name, key in plain.items():
        if key and (other := first.setdefault(key, name)) != name:
            pairs[other, name] = None
    for name, key in plain.items():
        if (singular := next((s for s in _singulars(key) if s in first), None)) is not None:
            pairs[first[singular], name] = None
    return list(pairs)


def _singulars(word: str) -> Iterator[str]:
    """What a word may be the plural of."""
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith("es"):
        yield word[:-2]
    if word.endswith("s"):
        yield word[:-1]
