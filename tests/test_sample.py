"""The sample set is reproducible picture by picture, well-formed, and not solvable without looking at form."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normfree.data import sample as sample_module
from normfree.data.sample import CLASSES, write_sample

PER_CLASS, VALIDATION_PER_CLASS = 24, 10


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "new" / "folder"
    write_sample(root, per_class=PER_CLASS, validation_per_class=VALIDATION_PER_CLASS)
    return root


def contents(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def test_layout(sample: Path) -> None:
    train = {f"train/{name}/{index:04d}.jpg" for name in CLASSES for index in range(PER_CLASS)}
    val = {f"val/{name}/{index:04d}.jpg" for name in CLASSES for index in range(VALIDATION_PER_CLASS)}
    assert set(contents(sample)) == train | val


def test_returns_the_class_names(tmp_path: Path) -> None:
    assert write_sample(tmp_path, per_class=1, validation_per_class=1) == sorted(CLASSES)


def test_a_picture_does_not_depend_on_how_many_are_made(sample: Path, tmp_path: Path) -> None:
    write_sample(tmp_path, per_class=2, validation_per_class=3)
    few, many = contents(tmp_path), contents(sample)
    assert len(few) == 5 * len(CLASSES)
    assert few == {name: many[name] for name in few}


def test_a_picture_does_not_depend_on_the_other_classes(
    sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = list(CLASSES)[-1]
    monkeypatch.setattr(sample_module, "CLASSES", {last: CLASSES[last]})
    write_sample(tmp_path, per_class=1, validation_per_class=1)
    alone, together = contents(tmp_path), contents(sample)
    assert len(alone) == 2
    assert alone == {name: together[name] for name in alone}


def test_the_seed_changes_every_picture(sample: Path, tmp_path: Path) -> None:
    write_sample(tmp_path, per_class=1, validation_per_class=1, seed=1)
    other = contents(tmp_path)
    assert not set(other.values()) & set(contents(sample).values())


def test_no_two_pictures_are_equal(sample: Path) -> None:
    pictures = list(contents(sample).values())
    assert len(set(pictures)) == len(pictures)


@pytest.mark.parametrize("split", ["train", "val"])
def test_refuses_to_overwrite(tmp_path: Path, split: str) -> None:
    (tmp_path / split).mkdir()
    with pytest.raises(FileExistsError, match=f"{split} exists already") as refusal:
        write_sample(tmp_path, per_class=1, validation_per_class=1)
    assert "\n" not in str(refusal.value)
    assert [path.name for path in tmp_path.rglob("*")] == [split]


def test_pictures_decode_and_vary_in_size(sample: Path) -> None:
    sizes = set()
    for path in sample.rglob("*.jpg"):
        with Image.open(path) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            sizes.add(image.size)
    assert min(map(min, sizes)) >= 120
    assert max(map(max, sizes)) <= 252
    assert len(sizes) > 100
    assert {int(np.sign(width - height)) for width, height in sizes} == {-1, 0, 1}


def load_pixels(folder: Path, side: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rows, labels = [], []
    for label, name in enumerate(CLASSES):
        for path in sorted((folder / name).iterdir()):
            with Image.open(path) as image:
                margins = ((image.width - min(image.size)) / 2, (image.height - min(image.size)) / 2)
                box = (*margins, image.width - margins[0], image.height - margins[1])
                rows.append(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR, box), float).ravel() / 255)
            labels.append(label)
    return np.stack(rows), np.array(labels)


def linear_accuracy(train: tuple[np.ndarray, np.ndarray], test: tuple[np.ndarray, np.ndarray], ridge: float) -> float:
    """Ridge regression to one-hot labels, solved in the space of the pictures, which are fewer than the pixels."""
    mean = train[0].mean(axis=0)
    x, queries = train[0] - mean, test[0] - mean
    weights = np.linalg.solve(x @ x.T + ridge * np.eye(len(x)), np.eye(len(CLASSES))[train[1]])
    return float(((queries @ x.T @ weights).argmax(axis=1) == test[1]).mean())


def test_a_linear_model_on_pixels_fails(sample: Path) -> None:
    train, test = load_pixels(sample / "train"), load_pixels(sample / "val")
    assert linear_accuracy(train, train, ridge=1e-3) > 0.9, "the linear model itself must be able to fit"
    assert max(linear_accuracy(train, test, ridge) for ridge in (1.0, 30.0, 300.0, 3000.0)) < 0.6


def test_mean_colour_tells_nothing(sample: Path) -> None:
    colours = []
    for folder in ("train", "val"):
        pixels, labels = load_pixels(sample / folder, side=8)
        mean = pixels.reshape(len(pixels), -1, 3).mean(axis=1)
        colours.append((np.concatenate([mean, mean**2], axis=1), labels))
    train, test = colours
    assert linear_accuracy(train, test, ridge=1e-3) < 0.25
