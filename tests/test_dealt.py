"""Runs whose weights, average and momentum are dealt to processes (--train.sharded), beside those that keep them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from quick_runs import END, STEPS, differences, make_images, metrics, run, said, train

_DEALT = ("--train.sharded", "true")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dealt")
    make_images(found / "images")
    return found


def _tensors(run_folder: Path) -> dict[str, Tensor]:
    newest = max((run_folder / "checkpoints").glob("step-*"))
    return load_file(newest / "state.safetensors")


def _distance(a: Path, b: Path) -> float:
    """Greatest difference of a tensor, relative to its greatest number."""
    found, expected = _tensors(a), _tensors(b)
    assert found.keys() == expected.keys()
    assert all(found[n].shape == x.shape for n, x in expected.items())
    return max(float((found[n] - x).abs().max() / x.abs().max().clamp_min(1e-6)) for n, x in expected.items())


@pytest.mark.parametrize(
    "settings",
    [
        (),
        pytest.param(("--train.micro-batch", "2"), marks=pytest.mark.slow),
        pytest.param(("--optim.sam-rho", "0.05", "--optim.sam-every", "1"), marks=pytest.mark.slow),
        pytest.param(("--train.remat", "block"), marks=pytest.mark.slow),
    ],
)
def test_dealt_weights_move_as_whole_ones(folder: Path, settings: tuple[str, ...]) -> None:
    """Weights, average and momentum after a short run, to summation error; the evaluation counts the same images."""
    name = "whole" + "".join(settings)
    short = ("--train.epochs", "1", "--optim.warmup", "0.5", *settings)
    assert run(train(folder, name, *short), folder, END, world=2) == [0, 0]
    assert run(train(folder, f"dealt-{name}", *short, *_DEALT), folder, END, world=2) == [0, 0], said(folder)
    assert _distance(folder / f"dealt-{name}", folder / name) < 2e-4
    counts = [metrics(folder / n)[-1]["raw"]["images"] for n in (name, f"dealt-{name}")]
    assert counts == [16, 16]


@pytest.mark.slow
def test_a_dealt_run_goes_on_after_a_stop(folder: Path) -> None:
    """With as many processes to the last bit, with one to summation error: checkpoints hold whole tensors."""
    assert run(train(folder, "undisturbed", *_DEALT), folder, END, world=2) == [0, 0]
    for name, world in (("two", 2), ("one", 1)):
        assert run(train(folder, name, *_DEALT), folder, "averaged:12:term@0", world=2) == [143, 143]
        assert run(train(folder, name, *_DEALT), folder, END, world=world) == [0] * world
        assert metrics(folder / name)[-1]["step"] == STEPS
    assert not differences(folder / "undisturbed", folder / "two")
    assert _distance(folder / "one", folder / "undisturbed") < 0.05
    assert all(bool(torch.isfinite(t).all()) for t in _tensors(folder / "one").values())


def test_a_dealt_run_leaves_out_what_is_not_finite(folder: Path) -> None:
    """Of one process: both do."""
    assert run(train(folder, "bad", *_DEALT), folder, "forward:11:poison@1", END, world=2) == [0, 0]
    assert all(bool(torch.isfinite(t).all()) for t in _tensors(folder / "bad").values())


@pytest.mark.parametrize(
    "settings", [("--train.batch-size", "9"), ("--train.precision", "fp16"), ("--optim.head-only", "1")]
)
def test_what_does_not_go_together_is_refused(folder: Path, settings: tuple[str, ...]) -> None:
    """Before anything is made."""
    before = said(folder).count("--train.sharded")
    assert run(train(folder, "refused", *settings, *_DEALT), folder, world=2) == [1, 1]
    assert said(folder).count("--train.sharded") > before
    assert not (folder / "refused").exists()
