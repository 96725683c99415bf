"""Steps whose gradients are not finite: left out, made up for, and behind too many in a row the run goes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from quick_runs import END, EPOCH, STEPS, differences, make_images, metrics, run, said, train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("nonfinite")
    make_images(found / "images")
    return found


def _poison(*steps: int) -> list[str]:
    """A gradient in each of these forward passes, counted from 1, is not a number."""
    return [f"forward:{n}:poison" for n in steps]


def _state(run_folder: Path) -> dict[str, Any]:
    newest = max((run_folder / "checkpoints").glob("step-*"))
    state: dict[str, Any] = json.loads((newest / "state.json").read_text())
    return state


def _all_finite(run_folder: Path) -> bool:
    newest = max((run_folder / "checkpoints").glob("step-*"))
    return all(bool(torch.isfinite(t).all()) for t in load_file(newest / "state.safetensors").values())


def test_one_bad_step_is_left_out_and_made_up_for(folder: Path) -> None:
    """All 24 steps are taken, of 25 batches; the learning rate goes by the steps; nothing that is saved is NaN."""
    assert run(train(folder, "one"), folder, *_poison(11), END) == [0]
    state = _state(folder / "one")
    assert (state["step"], state["taken"], state["skipped"], state["attempt"]) == (STEPS, STEPS + 1, 1, 0)
    assert _all_finite(folder / "one")
    assert run(train(folder, "none"), folder, END) == [0]
    rates = [[line["lr"] for line in metrics(folder / name) if line["kind"] == "train"] for name in ("one", "none")]
    assert rates[0] == rates[1]
    assert differences(folder / "one", folder / "none")  # a batch was left out: the end is another


def test_five_in_a_row_lead_back_to_the_last_checkpoint(folder: Path) -> None:
    """And on behind the bad batches, with other draws; the metrics have each step once."""
    bad = range(EPOCH + 4, EPOCH + 9)
    assert run(train(folder, "back"), folder, *_poison(*bad), END) == [0]
    state = _state(folder / "back")
    # three good steps behind the checkpoint are done again
    assert (state["step"], state["taken"], state["skipped"], state["attempt"]) == (STEPS, STEPS + 8, 5, 1)
    assert _all_finite(folder / "back")
    steps = [line["step"] for line in metrics(folder / "back") if line["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    assert f"back to step {EPOCH}" in said(folder)


@pytest.mark.slow
def test_a_run_that_went_back_can_be_stopped_anywhere(folder: Path) -> None:
    """Before the bad steps and behind them: the same bits in the end as without a stop.

    Between them the way back leads to the checkpoint of the stop, with another end.
    """
    bad = list(range(EPOCH + 4, EPOCH + 9))
    assert run(train(folder, "whole"), folder, *_poison(*bad), END) == [0]
    for name, stop in (("before", 6), ("between", EPOCH + 6), ("behind", EPOCH + 12)):
        first = [n for n in bad if n <= stop]
        assert run(train(folder, name), folder, *_poison(*first), f"forward:{stop}:term") == [143]
        assert run(train(folder, name), folder, *_poison(*(n - stop for n in bad if n > stop)), END) == [0]
        assert bool(differences(folder / "whole", folder / name)) == (name == "between")
        assert _all_finite(folder / name)


def test_what_never_gets_better_ends_with_a_diagnosis(folder: Path) -> None:
    """After three times back; at once where there is nothing to go back to."""
    assert run(train(folder, "early"), folder, "forward:every:poison") == [1]
    assert not list((folder / "early/checkpoints").glob("step-*"))
    assert run(train(folder, "late"), folder, *_poison(*range(EPOCH + 1, EPOCH + 60))) == [1]
    words = said(folder)
    assert "20 steps were left out and 3 times the run went back" in words
    assert "--optim.lr" in words
    assert _all_finite(folder / "late")
    assert _state(folder / "late")["step"] == EPOCH


def test_a_loss_scale_that_has_fallen_to_1_does_not_help_further(folder: Path) -> None:
    """float16: what is not finite then is no overflow of the scale, and the run goes back."""
    fp16 = ("--train.precision", "fp16")
    assert run([*train(folder, "half"), *fp16], folder, *_poison(*range(EPOCH + 1, EPOCH + 18)), END) == [0]
    assert f"back to step {EPOCH}" in said(folder)
    assert _all_finite(folder / "half")


def test_one_process_of_two_has_it(folder: Path) -> None:
    """Both leave the step out."""
    assert run(train(folder, "two"), folder, "forward:11:poison@1", END, world=2) == [0, 0]
    state = _state(folder / "two")
    assert (state["step"], state["taken"], state["skipped"]) == (STEPS, STEPS + 1, 1)
    assert _all_finite(folder / "two")
