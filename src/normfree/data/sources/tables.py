"""Images in parquet or Arrow files, as the Hugging Face Hub ships them; needs the extra `hf`.

A row has an image, a struct with "bytes" (and "path") or bytes alone, and a label: a whole number, a name, or for
several labels a list of either. Names of the classes are in the schema's metadata, where Hugging Face puts them; else
the numbers, or the sorted names.

Rows are read at random, and a parquet file gives a whole row group at a time. A photo of 110 KB costs about 4 ms of a
core where groups have 100 rows, as the Hub's do, and 0.3 ms where they have 10; each process keeps the last few groups.
That is fine for thousands of images and slow for a million: write those as Arrow (0.02 ms a photo), with
`load_dataset(..).save_to_disk(..)`, or as tar shards, with `write_shards`. A stream over the network is not offered:
training reads in random order, so that any step can be repeated.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources import cache
from normfree.data.sources.class_names import sorted_classes
from normfree.data.sources.labels import label_array
from normfree.data.sources.names import Names
from normfree.data.sources.protocol import Readable

IMAGE_COLUMNS = ("image", "img", "jpg", "picture")
LABEL_COLUMNS = ("label", "labels", "cls", "class", "fine_label")
PARQUET, ARROW = ".parquet", ".arrow"


@dataclass
class TableSource(Readable):
    """Rows of parquet or Arrow files."""

    root: Path
    files: tuple[Path, ...]
    stamps: NDArray[np.int64]  # (files, 5), what `cache.stamp` said when they were opened
    groups: NDArray[np.int64]  # (G, 3): file, number of the group in it, first row of the group in the whole
    rows: NDArray[np.int64]  # (N,) in the whole
    names: Names
    labels: NDArray[Any]
    classes: tuple[str, ...]
    column: str  # of the images
    held_out: bool = False

    @property
    def place(self) -> str:
        kind = "parquet" if self.files[0].suffix == PARQUET else "Arrow"
        return f"{len(self.files):,} {kind} file{'s' * (len(self.files) > 1)} in {self.root}"

    @property
    def ignored(self) -> list[str]:
        return []

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.names[index]

    def content(self, index: int) -> bytes:
        row = int(self.rows[index])
        file, group, start = self.groups[np.searchsorted(self.groups[:, 2], row, "right") - 1].tolist()
        try:
            read = _parquet_group if self.files[file].suffix == PARQUET else _arrow_batch
            images = read(str(self.files[file]), tuple(self.stamps[file].tolist()), group, self.column)
            value = images[row - start].as_py()
        except _errors() as e:
            raise BadImage(f"{self.files[file]}, row {row - start} of group {group}: {e}") from e
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise BadImage("the row has no bytes of an image")
        return content

    def subset(self, indices: NDArray[np.int64]) -> TableSource:
        return replace(self, names=self.names.take(indices), rows=self.rows[indices], labels=self.labels[indices])


def open_tables(root: Path, files: Sequence[Path]) -> TableSource:
    """The rows of parquet or Arrow files, in their order.

    Raises:
        UserError: pyarrow is missing, a file is broken, a column is missing, or a row has no label.
    """
    library("pyarrow")
    files = tuple(files)
    stamps = _stamps(files)
    parts = [_part(file) for file in files]
    schema = parts[0].schema
    odd = next((f for f, p in zip(files, parts, strict=True) if not p.schema.equals(schema)), None)
    if odd is not None:
        raise UserError(f"{odd} has other columns than {files[0]}")
    image, label = _columns(files[0], schema)
    names: list[str | None] = []
    values: list[Any] = []
    for part in parts:
        paths, of_part = _read_columns(part, image, label)
        names += paths
        values += of_part
    if not values:
        raise UserError(f"{root} has no rows")
    labels, classes = _labels(root, values, _class_names(schema, label))
    rows = np.arange(len(values))
    return TableSource(root, files, stamps, _groups(parts), rows, _names(parts, names), labels, classes, image)


def _stamps(files: Sequence[Path]) -> NDArray[np.int64]:
    try:
        return np.array([cache.stamp(file) for file in files], np.int64)
    except (OSError, ValueError) as e:  # a name with a zero in it is a ValueError
        raise UserError(f"a file of the tables cannot be read: {e}") from e


def _groups(parts: list[_Part]) -> NDArray[np.int64]:
    """(G, 3): file, number of the group in it, first row of the group in the whole."""
    places = [(file, group) for file, part in enumerate(parts) for group in range(len(part.counts))]
    counts = [count for part in parts for count in part.counts]
    starts = np.cumsum([0, *counts])[:-1]
    return np.column_stack([np.array(places, np.int64).reshape(-1, 2), starts])


def _names(parts: list[_Part], paths: list[str | None]) -> Names:
    """The images' own paths where each has one that is no other's, else FILE:ROW."""
    if None not in paths and len(set(paths)) == len(paths):
        return Names(path or "" for path in paths)
    return Names(f"{part.path.name}:{row}" for part in parts for row in range(sum(part.counts)))


@dataclass
class _Part:
    """An open file: its schema, rows of its groups, and how columns are read."""

    path: Path
    schema: Any
    counts: list[int]
    table: Any


def _part(path: Path) -> _Part:
    try:
        if path.suffix == PARQUET:
            file = import_module("pyarrow.parquet").ParquetFile(path, memory_map=True)
            counts = [file.metadata.row_group(g).num_rows for g in range(file.metadata.num_row_groups)]
            return _Part(path, file.schema_arrow, counts, file)
        table = _map_arrow(str(path), ())
        table.validate(full=True)  # Arrow follows offsets wherever they lead; no images are read for it
        return _Part(path, table.schema, [len(b) for b in table.to_batches()], table)
    except _errors() as e:
        raise UserError(f"{path} is broken, or no {path.suffix[1:]} file: {e}") from e


def _read_columns(part: _Part, image: str, label: str) -> tuple[list[str | None], list[Any]]:
    """(paths of the images or None, labels); the images themselves are left where they are."""
    arrow = import_module("pyarrow")
    kind = part.schema.field(image).type
    has_path = arrow.types.is_struct(kind) and "path" in [kind.field(i).name for i in range(kind.num_fields)]
    try:
        if part.path.suffix == PARQUET:
            table = part.table.read([label, f"{image}.path"] if has_path else [label], use_threads=False)
        else:
            table = part.table
        values = table.column(label).to_pylist()
        if not has_path:
            return [None] * len(values), values
        paths = table.column(image).combine_chunks()
        paths = import_module("pyarrow.compute").struct_field(paths, "path") if len(values) else []
        return [None if p is None else p.as_py() for p in paths], values
    except _errors() as e:
        raise UserError(f"{part.path} is broken: {e}") from e


def _columns(path: Path, schema: Any) -> tuple[str, str]:
    """(column of images, column of labels)."""
    arrow = import_module("pyarrow")
    image = next((c for c in IMAGE_COLUMNS if c in schema.names), None)
    label = next((c for c in LABEL_COLUMNS if c in schema.names), None)
    if image is None or label is None:
        wanted, kind = (LABEL_COLUMNS, "labels") if image else (IMAGE_COLUMNS, "images")
        near = next((n for n in schema.names if difflib.get_close_matches(n, wanted, cutoff=0.7)), None)
        hint = f"; is it {near!r}?" if near else ""
        raise UserError(f"{path} has no column of {kind} ({', '.join(wanted)}); it has {', '.join(schema.names)}{hint}")
    twice = next((c for c in (image, label) if schema.names.count(c) > 1), None)
    if twice:
        raise UserError(f"{path} has the column {twice!r} twice")
    kind = schema.field(image).type
    if arrow.types.is_struct(kind) and "bytes" in [kind.field(i).name for i in range(kind.num_fields)]:
        return image, label
    if not arrow.types.is_binary(kind) and not arrow.types.is_large_binary(kind):
        raise UserError(f"{path}: the column {image!r} holds {kind}, not the bytes of images")
    return image, label


def _class_names(schema: Any, label: str) -> tuple[str, ...]:
    """The names that Hugging Face keeps in the metadata, or ()."""
    try:
        feature = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]
        while isinstance(feature, list) or "names" not in feature:  # of several labels: inside of a list
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        names = feature["names"]
    except (KeyError, ValueError, TypeError, IndexError, RecursionError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) and len(set(map(str, names))) == len(names) else ()


def _labels(root: Path, values: list[Any], known: tuple[str, ...]) -> tuple[NDArray[Any], tuple[str, ...]]:
    several = any(isinstance(v, list) for v in values)
    rows = [v if isinstance(v, list) else [v] for v in values] if several else [[v] for v in values]
    odd = [v for row in rows for v in row if isinstance(v, bool) or not isinstance(v, (int, str))]
    if odd:
        shown = repr(odd[0])[:100]
        raise UserError(f"{root}: a row has {shown} for its label, neither a whole number nor a name")
    distinct = {v for row in rows for v in row}
    numbered = any(isinstance(v, int) for v in distinct)
    index = sorted_classes(map(str, distinct), known, numbered)
    wrong = next((str(v) for v in distinct if str(v) not in index.place), None)
    if wrong is not None:
        none = " (rows without a label, as those of a test set, cannot be used)" if wrong == "-1" else ""
        raise UserError(f"{root}: a row's label is {wrong}, none of the {len(index.classes):,} classes{none}")
    if several:
        names = [[index.classes[index.place[str(v)]] for v in row] for row in rows]
        return label_array(names, index.classes, several=True), index.classes
    return np.array([index.place[str(v)] for v in values], np.int64), index.classes


@lru_cache(maxsize=4)  # groups that a process keeps: some 10 MB each for photos
def _parquet_group(path: str, stamp: tuple[int, ...], group: int, column: str) -> Any:
    if cache.stamp(path)[:4] != stamp[:4]:
        raise BadImage(f"{path} was replaced since it was listed")
    file = _parquet_file(path, stamp)
    # no threads: those of a parent do not live on in a forked worker
    return file.read_row_group(group, columns=[column], use_threads=False).column(column).combine_chunks()


@lru_cache(maxsize=64)  # open files
def _parquet_file(path: str, _stamp: tuple[int, ...]) -> Any:
    return import_module("pyarrow.parquet").ParquetFile(path, memory_map=True, pre_buffer=False)


def _arrow_batch(path: str, stamp: tuple[int, ...], batch: int, column: str) -> Any:
    return _arrow_batches(path, stamp)[batch].column(column)


@lru_cache(maxsize=1024)  # mapped files: they take addresses, and memory only as it is free
def _arrow_batches(path: str, stamp: tuple[int, ...]) -> list[Any]:
    if cache.stamp(path)[:4] != stamp[:4]:
        raise BadImage(f"{path} was replaced since it was listed")
    return list(_map_arrow(path, stamp).to_batches())


def _map_arrow(path: str, _stamp: tuple[int, ...]) -> Any:
    arrow = import_module("pyarrow")
    return arrow.ipc.open_stream(arrow.memory_map(path)).read_all()


def _errors() -> tuple[type[Exception], ...]:
    """What pyarrow raises on a broken file."""
    return (import_module("pyarrow").ArrowException, OSError, ValueError, IndexError, KeyError)


def library(name: str) -> Any:
    """A package of the extra `hf`.

    Raises:
        UserError: it is not installed; says how to mend it.
    """
    try:
        return import_module(name)
    except (ImportError, RuntimeError, OSError) as e:
        raise UserError(f"this needs the package {name}: pip install 'normfree[hf]'") from e
