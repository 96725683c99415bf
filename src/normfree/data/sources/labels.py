"""Image files whose labels are in a table: CSV, TSV, or a JSON object a line.

The table has a header, or names in its objects, with a column of files and one of labels. A column called "label" or
"class" has one label a row, taken whole. A column called "labels" or "classes" has any number, separated by | or ;
(in JSON: a list), and then every image of the table may have several labels. Other columns are not used. Files are
relative to the table's folder, or to the folder beside it of the table's name (train/ of train.csv), or to images/.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normfree.config import UserError
from normfree.data.sources.folder import FolderSource
from normfree.data.sources.listing import files_below, is_image_name
from normfree.data.sources.names import Names

FILE_COLUMNS = ("file", "file_name", "filename", "path", "filepath", "image", "image_path", "image_name")
LABEL_COLUMNS = ("label", "class", "class_name")
SEVERAL_COLUMNS = ("labels", "classes")
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl")

_LIMIT = 1 << 30  # bytes of a table
Row = tuple[str, list[str]]  # (file, labels)


def find_table(folder: Path, stem: str) -> Path | None:
    """FOLDER/STEM.csv, .tsv or .jsonl, the first that is there."""
    return next((p for ending in TABLE_ENDINGS if (p := folder / f"{stem}{ending}").is_file()), None)


def is_label_table(path: Path) -> bool:
    """Whether a table has rows, with a column of files and one of labels."""
    try:
        row = next(_objects(path), None)
        return row is not None and bool(_columns(path, row))
    except UserError:
        return False


def open_labelled(table: Path, prefix: str = "") -> FolderSource:
    """The images of a table, in the order of its rows; classes are the labels, sorted.

    Images that lie there without a row are not used, and are listed as ignored.

    Raises:
        UserError: the table is broken, a row's file is missing or comes twice, or a row has no label.
    """
    rows = list(_rows(table))
    if not rows:
        raise UserError(f"{table} has no rows")
    root, present = _root(table, rows)
    files = [os.path.normpath(file) for file, _ in rows]
    _check_files(table, root, files, present)
    several = _has_several(table)
    classes = tuple(sorted({label for _, labels in rows for label in labels}))
    if not several and (empty := next((f for f, labels in rows if not labels), None)) is not None:
        raise UserError(f"{table}: {empty!r} has no label")
    known = set(files)
    ignored = [prefix + name for name in present if name not in known and is_image_name(name)]
    labels = label_array([labels for _, labels in rows], classes, several)
    return FolderSource(root, Names(files), labels, classes, ignored, prefix, f"labels of {table.name}, images")


def label_array(labels: Sequence[Iterable[str]], classes: tuple[str, ...], several: bool) -> NDArray[Any]:
    """(N,) int64, or (N, classes) bool where there may be several labels, of the names of labels."""
    place = {name: i for i, name in enumerate(classes)}
    if not several:
        return np.array([place[name] for names in labels for name in names], np.int64)
    array = np.zeros((len(labels), len(classes)), bool)
    for row, names in enumerate(labels):
        array[row, [place[name] for name in names]] = True
    return array


def _root(table: Path, rows: list[Row]) -> tuple[Path, list[str]]:
    """(the folder that most of the first files lie in, all files below it)."""
    folders = [table.parent, table.parent / table.stem, table.parent / "images"]
    hits = [sum((folder / file).is_file() for file, _ in rows[:100]) for folder in folders]
    root = folders[int(np.argmax(hits))]
    return root, [os.path.relpath(path, root) for path in files_below(root)]


def _check_files(table: Path, root: Path, files: list[str], present: list[str]) -> None:
    there, seen = set(present), set()
    for file in files:
        if os.path.isabs(file) or file.startswith(".."):
            raise UserError(f"{table}: {file!r} leaves the folder of the images; name files relative to {root}")
        if file not in there:
            missing = sum(f not in there for f in files)
            more = f" and {missing - 1} more" if missing > 1 else ""
            raise UserError(f"{table}: {file!r}{more} is not in {root}{_near(file, present)}")
        if file in seen:
            raise UserError(f"{table}: {file!r} has two rows; several labels belong in one, in a column 'labels'")
        seen.add(file)


def _near(file: str, present: list[str]) -> str:
    folder = os.path.dirname(file)
    beside = [name for name in present if os.path.dirname(name) == folder][:2000]
    near = difflib.get_close_matches(file, beside or present[:2000], n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _has_several(table: Path) -> bool:
    return _columns(table, next(_objects(table)))[2]


def _rows(table: Path) -> Iterator[Row]:
    columns: tuple[str, str, bool] | None = None
    for line, row in enumerate(_objects(table), 1):
        columns = columns or _columns(table, row)
        file, label, several = columns
        where = f"{table}, row {line}"
        if not isinstance(row.get(file), str) or not row[file]:
            raise UserError(f"{where}: {file!r} is missing or no text")
        yield row[file], _labels(row.get(label), several, where, label)


def _labels(value: Any, several: bool, where: str, column: str) -> list[str]:
    if several and isinstance(value, list):
        return [_label(v, where, column) for v in value]
    text = "" if value is None else _label(value, where, column)
    if several:
        return [part.strip() for part in re.split(r"[|;]", text) if part.strip()]
    return [text] if text else []


def _label(value: Any, where: str, column: str) -> str:
    if isinstance(value, list):
        raise UserError(f"{where}: {column!r} has several labels; call the column 'labels'")
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise UserError(f"{where}: {column!r} must be text or a whole number, not {str(value)[:40]!r}")
    return str(value).strip()


def _columns(table: Path, row: dict[str, Any]) -> tuple[str, str, bool]:
    """(column of files, column of labels, whether a row may have several)."""
    lower = {name.strip().lower(): name for name in row}
    file = next((lower[name] for name in FILE_COLUMNS if name in lower), None)
    label = next((lower[name] for name in (*SEVERAL_COLUMNS, *LABEL_COLUMNS) if name in lower), None)
    if file is None or label is None:
        wanted, kind = ((*LABEL_COLUMNS, *SEVERAL_COLUMNS), "labels") if file else (FILE_COLUMNS, "files")
        near = next((n for n in lower if difflib.get_close_matches(n, wanted, cutoff=0.7)), None)
        hint = f"; is it {near!r}?" if near else ""
        has = ", ".join(map(repr, list(row)[:8]))
        raise UserError(f"{table} has no column of {kind} ({', '.join(wanted)}); it has {has}{hint}")
    return file, label, label.strip().lower() in SEVERAL_COLUMNS


def _objects(table: Path) -> Iterator[dict[str, Any]]:
    """The rows by the names of their columns."""
    text = _text(table)
    if table.suffix == ".jsonl":
        return _json_objects(table, text)
    return _csv_objects(table, text)


def _text(table: Path) -> str:
    try:
        if table.stat().st_size > _LIMIT:
            raise UserError(f"{table} is too large for a table of labels")
        return table.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"{table} is not UTF-8: {e.reason} at byte {e.start}") from e
    except OSError as e:
        raise UserError(f"{table} cannot be read: {e.strerror or e}") from e


def _csv_objects(table: Path, text: str) -> Iterator[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter="\t" if table.suffix == ".tsv" else ",", strict=True)
    try:
        header = next(reader, [])
        for row in reader:
            if row and len(row) != len(header):
                where = f"{table}, line {reader.line_num}"
                raise UserError(f"{where}: {len(row)} columns where the header has {len(header)}")
            if row:
                yield dict(zip(header, row, strict=True))
    except csv.Error as e:
        raise UserError(f"{table}, line {reader.line_num}: {e}") from e


def _json_objects(table: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{table}, line {number}: not JSON") from e
        if not isinstance(value, dict):
            raise UserError(f"{table}, line {number}: must be an object")
        yield value
