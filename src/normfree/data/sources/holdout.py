"""Hashes of the samples' names: which are held out for validation, and whether a set is still the same."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.sources.names import Names
from normfree.data.sources.protocol import Source, several_labels


def fingerprint(source: Source) -> str:
    """A hash of the names, the labels and the classes: another one means that the samples are others."""
    digest = hashlib.blake2b("\0".join(source.classes).encode(errors="surrogateescape"), digest_size=16)
    digest.update(np.ascontiguousarray(source.labels).data)
    for name in _names(source):
        digest.update(name + b"\0")
    return digest.hexdigest()


def split(source: Source, share: float) -> tuple[Source, Source]:
    """(train, validation), stratified: of every class the share with the smallest hashes of its names.

    At least one image of each class is on each side. Hashes and not draws, so that a file stays on its side when others
    are added. Where images have several labels each, all of them are one class here.

    Raises:
        UserError: the share is not in (0, 1), or a class has one image only.
    """
    if not 0.0 < share < 1.0:
        raise UserError(f"the validation share must be between 0 and 1, not {share}")
    several = several_labels(source)
    labels = np.zeros(len(source), np.int64) if several else source.labels
    classes = ("of all images",) if several else source.classes
    held_out = _smallest(_ranks(source), labels, _held(np.bincount(labels, minlength=len(classes)), classes, share))
    train, validation = source.subset(np.flatnonzero(~held_out)), source.subset(np.flatnonzero(held_out))
    validation.held_out = True
    return train, validation


def _held(counts: NDArray[np.int64], classes: tuple[str, ...], share: float) -> NDArray[np.int64]:
    """How many of each class are held out."""
    if np.any(counts == 1):
        name = classes[int(np.argmax(counts == 1))]
        raise UserError(f"class {name!r} has one image only, so none can be held out for validation")
    held = np.round(share * counts).astype(np.int64)  # halves go to the even number
    return np.where(counts > 0, np.clip(held, 1, counts - 1), 0)


def _smallest(ranks: NDArray[np.uint64], labels: NDArray[np.int64], held: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each sample is among the first held[c] of its class c, by rank; of equal ranks the earlier is first."""
    order = np.lexsort((ranks, labels))
    begins = np.concatenate([[0], np.cumsum(np.bincount(labels, minlength=len(held)))])
    chosen = np.zeros(len(labels), bool)
    chosen[order] = np.arange(len(labels)) - begins[labels[order]] < held[labels[order]]
    return chosen


def _ranks(source: Source) -> NDArray[np.uint64]:
    hashes = bytearray()
    for name in _names(source):
        hashes += hashlib.blake2b(name, digest_size=8).digest()
    return np.frombuffer(bytes(hashes), ">u8").astype(np.uint64)


def _names(source: Source) -> Iterator[bytes]:
    """The names of all samples, as `source.name` has them; quickly where they are `Names`."""
    names = getattr(source, "names", None)
    if isinstance(names, Names):
        prefix = os.fsencode(getattr(source, "prefix", ""))
        return (prefix + name for name in names.encoded())
    return (os.fsencode(source.name(i)) for i in range(len(source)))
