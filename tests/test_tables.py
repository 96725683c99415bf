"""Parquet and Arrow files say what a folder says; broken ones, odd columns and missing packages are one line."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from image_sets import Sample, samples, webdataset, write_folder, write_tar
from normfree.config import UserError
from normfree.data.decode import BadImage
from normfree.data.sources import (
    Source,
    describe,
    fingerprint,
    open_data,
    open_held_out,
    open_validation,
    tables,
    write_shards,
)
from normfree.data.sources.tables import TableSource, open_tables

arrow: Any = pytest.importorskip("pyarrow")
parquet: Any = pytest.importorskip("pyarrow.parquet")
CLASSES = ("ant", "bee", "cat")
IMAGES = samples(CLASSES)


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def contents(source: Source) -> list[bytes]:
    return [bytes(source.content(i)) for i in range(len(source))]


def table_of(images: Sequence[Sample], classes: Sequence[str] = CLASSES, label: str = "label") -> Any:
    """As the Hub ships ImageNet: image = {bytes, path}, label int64, names of the classes in the metadata."""
    feature = {"names": list(classes), "_type": "ClassLabel"}
    info = {"info": {"features": {"image": {"_type": "Image"}, label: feature}}}
    rows = {
        "image": [{"bytes": content, "path": name} for name, content, _ in images],
        label: arrow.array([number for _, _, number in images], arrow.int64()),
    }
    return arrow.table(rows).replace_schema_metadata({"huggingface": json.dumps(info)})


def write_parquet(path: Path, table: Any, rows: int = 4) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=rows)
    return path


def write_saved(folder: Path, *parts: Any, rows: int = 4) -> Path:
    """As `save_to_disk` of the package datasets writes it."""
    folder.mkdir(parents=True)
    files = [f"data-{i:05d}-of-{len(parts):05d}.arrow" for i in range(len(parts))]
    for name, table in zip(files, parts, strict=True):
        with arrow.OSFile(str(folder / name), "wb") as sink, arrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def opened(root: Path, table: Any) -> TableSource:
    return open_tables(root, [write_parquet(root / "a.parquet", table)])


def refusal(root: Path, table: Any) -> str:
    with pytest.raises(UserError) as refused:
        opened(root, table)
    return str(refused.value)


def plain(**columns: Any) -> Any:
    """A table without Hugging Face's metadata."""
    return arrow.table(columns)


# one set in every form


def forms(root: Path, images: list[Sample]) -> dict[str, str]:
    """The same images as a folder, tar shards, parquet, and a saved data set; each in two files or more."""
    write_folder(root / "folder", images)
    for i in range(3):
        write_tar(root / f"shards/a-{i}.tar", webdataset(images[7 * i : 7 * i + 7]))
    (root / "shards" / "classes.txt").write_text("\n".join(CLASSES))
    for i in range(2):
        write_parquet(root / f"parquet/data/train-{i:05d}-of-00002.parquet", table_of(images[9 * i : 9 * i + 9]))
    write_saved(root / "saved", table_of(images[:5]), table_of(images[5:]))
    return {form: str(root / form) for form in ("folder", "shards", "parquet", "saved")}


def test_every_form_of_a_set_is_the_same_data(tmp_path: Path) -> None:
    """Labels, classes, names, order and bytes are equal; so are the held-out images, and therefore the training run."""
    found = {form: open_data(root, 0.3) for form, root in forms(tmp_path, IMAGES).items()}
    for half in range(2):
        reference = found["folder"][half]
        for form, sources in found.items():
            source = sources[half]
            assert source.classes == reference.classes == CLASSES, form
            assert source.labels.dtype == reference.labels.dtype == np.int64
            assert source.labels.tolist() == reference.labels.tolist()
            assert names(source) == names(reference)
            assert contents(source) == contents(reference)
            assert fingerprint(source) == fingerprint(reference)
            assert source.held_out == bool(half)


def test_all_images_of_every_form_in_order(tmp_path: Path) -> None:
    """Without a split: what was written, as it was written, and pixels for who asks for them."""
    for form, root in forms(tmp_path, IMAGES).items():
        source = open_validation(root, ())
        assert contents(source) == [content for _, content, _ in IMAGES], form
        assert source.labels.tolist() == [label for _, _, label in IMAGES]
        assert source.read(4).shape == (9, 10, 3)


def test_held_out_images_are_found_again(tmp_path: Path) -> None:
    """By their names, in every form."""
    for root in forms(tmp_path, IMAGES).values():
        val = open_data(root, 0.3)[1]
        again = open_held_out(root, names(val), val.classes)
        assert (contents(again), again.labels.tolist()) == (contents(val), val.labels.tolist())
        assert again.held_out


def test_parquet_becomes_shards(tmp_path: Path) -> None:
    """`write_shards` takes any source, and what it writes is the same set."""
    source = open_tables(tmp_path, [write_parquet(tmp_path / "a.parquet", table_of(IMAGES))])
    write_shards(source, tmp_path / "shards", images_per_shard=5)
    shards = open_validation(str(tmp_path / "shards"), ())
    assert (fingerprint(shards), contents(shards)) == (fingerprint(source), contents(source))


# halves


def test_halves_by_name(tmp_path: Path) -> None:
    """train-*, validation-* as on the Hub; test-*, whose labels are -1, is not touched."""
    unlabelled = [(name, content, -1) for name, content, _ in IMAGES[:2]]
    for i in range(2):
        write_parquet(tmp_path / f"data/train-{i:05d}-of-00002.parquet", table_of(IMAGES[9 * i : 9 * i + 9]))
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", table_of(IMAGES[3:9]))
    write_parquet(tmp_path / "data/test-00000-of-00001.parquet", table_of(unlabelled))
    train, val = open_data(str(tmp_path), 0.5)
    assert contents(train) == [content for _, content, _ in IMAGES]
    assert contents(val) == [content for _, content, _ in IMAGES[3:9]]
    assert describe(train) == f"18 images in 3 classes: 2 parquet files in {tmp_path / 'data'}"
    assert names(open_validation(str(tmp_path), CLASSES)) == names(val)


def test_saved_splits(tmp_path: Path) -> None:
    """A saved data set of several splits."""
    write_saved(tmp_path / "train", table_of(IMAGES))
    write_saved(tmp_path / "validation", table_of(IMAGES[:6]))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    train, val = open_data(str(tmp_path), 0.5)
    assert (len(train), len(val)) == (18, 6)
    assert describe(train) == f"18 images in 3 classes: 1 Arrow file in {tmp_path / 'train'}"


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("dataset_dict.json", '{"splits": ["../train"]}'),
        ("dataset_dict.json", '{"splits": 3}'),
        ("dataset_dict.json", '{"splits": ["test"]}'),
        ("dataset_dict.json", "[]"),
        ("state.json", '{"_data_files": [{"filename": "/etc/passwd"}]}'),
        ("state.json", '{"_data_files": [{"filename": "../a.arrow"}]}'),
        ("state.json", '{"_data_files": []}'),
        ("state.json", "{"),
    ],
)
def test_broken_saved_sets(tmp_path: Path, file: str, text: str) -> None:
    """Are one line; no path in them leads out of the folder."""
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=str(tmp_path)):
        open_data(str(tmp_path), 0.2)


# columns


def test_several_labels(tmp_path: Path) -> None:
    """A list of labels is a row of bool."""
    table = plain(image=[b"a", b"b", b"c"], labels=[[0, 2], [], [1]])
    source = opened(tmp_path, table)
    assert source.labels.dtype == np.bool_
    assert source.labels.tolist() == [[True, False, True], [False, False, False], [False, True, False]]
    assert source.classes == ("0", "1", "2")
    assert source.subset(np.array([2])).labels.tolist() == [[False, True, False]]


def test_names_as_labels(tmp_path: Path) -> None:
    """Sorted; and an image column of bytes alone, whose rows are named by number."""
    source = opened(tmp_path, plain(img=[b"a", b"b"], label=["dog", "cat"]))
    assert (source.classes, source.labels.tolist()) == (("cat", "dog"), [1, 0])
    assert names(source) == ["a.parquet:0", "a.parquet:1"]
    assert contents(source) == [b"a", b"b"]


@pytest.mark.parametrize("paths", [[None, None], ["same.jpg", "same.jpg"], ["a.jpg", None]])
def test_paths_that_do_not_name_rows(tmp_path: Path, paths: list[str | None]) -> None:
    """Missing or doubled ones: the rows are named by file and number."""
    table = plain(image=[{"bytes": b"-", "path": path} for path in paths], label=[0, 1])
    assert names(opened(tmp_path, table)) == ["a.parquet:0", "a.parquet:1"]


def test_a_row_without_an_image(tmp_path: Path) -> None:
    """Is a bad image, when it is read."""
    source = opened(
        tmp_path, plain(image=[{"bytes": None, "path": "/etc/passwd"}, {"bytes": b"-", "path": "x"}], label=[0, 1])
    )
    with pytest.raises(BadImage, match="the row has no bytes of an image"):
        source.content(0)
    with pytest.raises(BadImage):
        source.read(1)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        (
            {"imagee": [b"-"], "label": [0]},
            "has no column of images (image, img, jpg, picture); it has imagee, label; is",
        ),
        (
            {"image": [b"-"], "lable": [0]},
            "has no column of labels (label, labels, cls, class, fine_label); it has image, lable; is it 'lable'?",
        ),
        ({"image": ["text"], "label": [0]}, "the column 'image' holds string, not the bytes of images"),
        ({"image": [b"-", b"-"], "label": [0, -1]}, "a row's label is -1, none of the 1 classes (rows without a label"),
        ({"image": [b"-", b"-"], "label": [0, None]}, "a row has None for its label"),
        ({"image": [b"-"], "label": [0.5]}, "a row has 0.5 for its label"),
        ({"image": [b"-", b"-"], "label": [0, 2**60]}, "a row's label is 1152921504606846976, none of"),
    ],
)
def test_columns_that_do_not_serve(tmp_path: Path, columns: dict[str, Any], reason: str) -> None:
    """Are named, with the nearest name or the value."""
    assert reason in refusal(tmp_path, plain(**columns))


def test_a_label_beyond_the_classes(tmp_path: Path) -> None:
    """Of the names in the metadata."""
    assert "a row's label is 2, none of the 2 classes" in refusal(tmp_path, table_of(IMAGES, CLASSES[:2]))


@pytest.mark.parametrize(
    "metadata", [{}, {"huggingface": "{"}, {"huggingface": '{"info": {"features": {"label": []}}}'}]
)
def test_metadata_without_names(tmp_path: Path, metadata: dict[str, str]) -> None:
    """Classes are the numbers."""
    assert opened(tmp_path, table_of(IMAGES).replace_schema_metadata(metadata)).classes == ("0", "1", "2")


def test_files_of_other_columns(tmp_path: Path) -> None:
    """Are named."""
    one = write_parquet(tmp_path / "a.parquet", table_of(IMAGES))
    two = write_parquet(tmp_path / "b.parquet", plain(image=[b"-"], label=["x"]))
    with pytest.raises(UserError, match=r"b.parquet has other columns than .*a.parquet"):
        open_tables(tmp_path, [one, two])


# damage


def test_damaged_parquet(tmp_path: Path) -> None:
    """Refused, or read with bad images; no crash."""
    rng = np.random.default_rng(0)
    path = write_parquet(tmp_path / "a.parquet", table_of(IMAGES[:4]))
    content = path.read_bytes()
    footer = len(content) - int.from_bytes(content[-8:-4], "little") - 8
    outcomes = set()
    for n in range(120):
        damaged = bytearray(content)
        low, high = (4, footer) if n % 2 else (footer, len(content))
        for place in rng.integers(low, high, 2):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged if n % 5 else damaged[: rng.integers(len(content))])
        outcomes.add(outcome(tmp_path, path))
    assert outcomes >= {"refused", "read"}


def outcome(root: Path, path: Path) -> str:
    try:
        source = open_tables(root, [path])
    except UserError:
        return "refused"
    for i in range(len(source)):
        try:
            source.content(i)
        except BadImage:
            return "bad image"
    return "read"


@pytest.mark.parametrize("garbage", [b"", b"PAR1", b"PAR1" * 9, b"\xff" * 100])
@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_garbage(tmp_path: Path, garbage: bytes, ending: str) -> None:
    """Is named."""
    (tmp_path / f"a.{ending}").write_bytes(garbage)
    with pytest.raises(UserError, match=rf"a.{ending} is broken"):
        open_tables(tmp_path, [tmp_path / f"a.{ending}"])


@pytest.mark.parametrize("saved", [False, True])
def test_a_file_that_is_replaced_is_a_bad_image(tmp_path: Path, saved: bool) -> None:
    """Not another image under the old name."""
    if saved:
        root = write_saved(tmp_path / "s", table_of(IMAGES))
        path, other = root / "data-00000-of-00001.arrow", write_saved(tmp_path / "t", table_of(IMAGES[::-1]))
        source, other = open_tables(root, [path]), other / path.name
    else:
        path = write_parquet(tmp_path / "a.parquet", table_of(IMAGES))
        source, other = open_tables(tmp_path, [path]), write_parquet(tmp_path / "b.parquet", table_of(IMAGES[::-1]))
    other.rename(path)
    with pytest.raises(BadImage, match="was replaced since it was listed"):
        source.content(0)


# workers, and missing packages


class Contents(Dataset[bytes]):
    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> bytes:
        return bytes(self.source.content(index))


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_forked_workers(tmp_path: Path, form: str) -> None:
    """Read the same, also where this process has read before; and so in any order."""
    source = open_validation(forms(tmp_path, IMAGES)[form], ())
    expected = contents(source)
    assert list(DataLoader(Contents(source), None, num_workers=2, multiprocessing_context="fork")) == expected
    assert [source.content(i) for i in (17, 0, 9, 3)] == [expected[i] for i in (17, 0, 9, 3)]


def test_only_the_images_that_are_read_cost_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening reads labels and paths; an image reads its row group, once while that is kept."""
    reads: list[int] = []
    original = tables._parquet_group.__wrapped__

    def counted(path: str, stamp: tuple[int, ...], group: int, column: str) -> Any:
        reads.append(group)
        return original(path, stamp, group, column)

    monkeypatch.setattr(tables, "_parquet_group", lru_cache(maxsize=4)(counted))
    source = opened(tmp_path, table_of(IMAGES))
    assert reads == []
    for i in (0, 1, 2, 3, 17, 0, 5):
        assert source.content(i) == IMAGES[i][1]
    assert reads == [0, 4, 1]


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    def missing(name: str, *more: Any) -> Any:
        if name.split(".", maxsplit=1)[0] == package:
            raise ImportError(name)
        return importlib.import_module(name, *more)

    monkeypatch.setattr(tables, "import_module", missing)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the command that installs it."""
    write_parquet(tmp_path / "a.parquet", table_of(IMAGES))
    without(monkeypatch, "pyarrow")
    with pytest.raises(UserError, match=r"needs the package pyarrow: pip install 'normfree\[hf\]'"):
        open_data(str(tmp_path), 0.2)


def test_the_hub_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """So does hf:NAME."""
    without(monkeypatch, "datasets")
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'normfree\[hf\]'"):
        open_data("hf:someone/images", 0.2)


def test_the_library_does_not_need_them() -> None:
    """Nothing is imported before it is used."""
    import subprocess
    import sys

    code = "import sys, normfree.data.sources; assert not {'pyarrow', 'datasets'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# the package datasets itself


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, offline and with its cache in the test's folder."""
    library = pytest.importorskip("datasets")
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    library.disable_progress_bars()
    return library


def test_a_set_that_datasets_saved(tmp_path: Path, datasets: Any) -> None:
    """As it really writes them, with names of classes, in several files."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))})
    rows = {"image": [{"bytes": c, "path": n} for n, c, _ in IMAGES], "label": [label for _, _, label in IMAGES]}
    made = datasets.Dataset.from_dict(rows, features=features)
    splits = datasets.DatasetDict({"train": made, "validation": made.select([5, 3])})
    splits.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3, "validation": 1})
    train, val = open_data(str(tmp_path / "saved"), 0.5)
    assert (train.classes, contents(train)) == (CLASSES, [content for _, content, _ in IMAGES])
    assert train.labels.tolist() == [label for _, _, label in IMAGES]
    assert contents(val) == [IMAGES[5][1], IMAGES[3][1]]


def test_a_name_of_the_hub(tmp_path: Path, datasets: Any) -> None:
    """hf:NAME goes through the package: here, to a local folder in the Hub's layout."""
    write_parquet(tmp_path / "set/data/train-00000-of-00001.parquet", table_of(IMAGES))
    write_parquet(tmp_path / "set/data/validation-00000-of-00001.parquet", table_of(IMAGES[:4]))
    train, val = open_data(f"hf:{tmp_path / 'set'}", 0.5)
    assert contents(train) == [content for _, content, _ in IMAGES]
    assert train.labels.tolist() == [label for _, _, label in IMAGES]
    assert (train.classes, len(val)) == (CLASSES, 4)


def test_a_name_that_cannot_be_had(datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Is one line with the package's reason."""

    def fails(_name: str, _config: str | None) -> None:
        raise ConnectionError("no network\nand much more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"^hf:nobody/nothing cannot be loaded: no network$"):
        open_data("hf:nobody/nothing", 0.5)
