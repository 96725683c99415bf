"""Scores, and the pictures drawn from them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import make_folder
from normfree.data.crop import Preprocessing
from normfree.data.sources import open_folder
from normfree.evaluate import Interrupted, Outputs, infer, score
from normfree.models import create_model
from normfree.report import confusion, curves, mistakes, most_confused, short_name

PLAIN = Preprocessing(32, "pad", 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def outputs(logits: torch.Tensor, labels: list[int]) -> Outputs:
    return Outputs(logits, torch.tensor(labels), torch.arange(len(labels)), [])


def test_scores_equal_plain_numpy() -> None:
    """Top-1, top-5 and cross-entropy in float64 of random logits."""
    torch.manual_seed(0)
    logits, labels = torch.randn(200, 12), torch.randint(12, (200,))
    found = score(outputs(logits, labels.tolist()))
    x = logits.double().numpy()
    order = np.argsort(-x, axis=1)
    assert found.top1 == (order[:, 0] == labels.numpy()).mean()
    assert found.top5 == (order[:, :5] == labels.numpy()[:, None]).any(1).mean()
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    assert found.loss == pytest.approx(-log_p[np.arange(200), labels].mean(), rel=1e-12)
    assert found.images == 200


def test_ties_count_as_argmax_has_them_and_nan_never_counts_as_right() -> None:
    """All-equal logits are right for class 0 only; NaN anywhere is wrong."""
    equal = torch.zeros(3, 7)
    assert score(outputs(equal, [0, 1, 5])).top1 == 1 / 3
    assert score(outputs(equal, [0, 4, 5])).top5 == 2 / 3
    assert score(outputs(torch.full((4, 3), math.nan), [0, 1, 2, 0])).top1 == 0
    own = torch.tensor([[math.nan, 0.0], [5.0, math.nan]])
    assert score(outputs(own, [0, 0])).top1 == 0
    with pytest.raises(ValueError, match="no validation image"):
        score(outputs(torch.zeros(0, 3), []))


def test_every_image_counts_once_and_its_neighbours_change_nothing(tmp_path: Path) -> None:
    """Any order of the images gives each the same logits, to the last bit; broken ones are left out and named."""
    source = open_folder(make_folder(tmp_path / "images", per_class=7))
    (tmp_path / "images" / "light" / "003.jpg").write_bytes(b"broken")
    torch.manual_seed(0)
    model = create_model("nfnet_tiny", 2, skip_init=1.0)
    whole = infer(model, source, PLAIN, 5)
    assert len(whole.labels) == 13
    assert [source.name(i) for i, _ in whole.bad] == ["light/003.jpg"]
    shuffled = np.random.default_rng(0).permutation(14)
    other = infer(model, source.subset(shuffled), PLAIN, 5)
    by_index = dict(zip(whole.indices.tolist(), whole.logits, strict=True))
    for place, logits in zip(other.indices.tolist(), other.logits, strict=True):
        assert torch.equal(logits, by_index[int(shuffled[place])])
    assert model.training


def test_an_evaluation_can_be_interrupted(tmp_path: Path) -> None:
    """Between two batches."""
    source = open_folder(make_folder(tmp_path / "images"))
    answers = iter([False, True])
    with pytest.raises(Interrupted):
        infer(create_model("nfnet_tiny", 2), source, PLAIN, 5, should_stop=lambda: next(answers))


def test_long_names_lose_their_middle() -> None:
    """And have the length that was asked for."""
    assert short_name("a_rather_long_class_name_07", 14) == "a_rathe…ame_07"
    assert short_name("short", 14) == "short"


def test_pictures_show_what_they_should(tmp_path: Path) -> None:
    """The confusion matrix has the counts; mistakes are ordered by how sure the network was; none is said so."""
    source = open_folder(make_folder(tmp_path / "images"))
    logits = torch.zeros(20, 2)
    logits[:, 0] = torch.linspace(0.1, 2, 20)  # always the first class
    found = Outputs(logits, torch.from_numpy(source.labels), torch.arange(20), [])
    texts = [t.get_text() for t in confusion(found, source.classes).axes[0].texts]
    assert texts == ["10", "10"]
    titles = [a.get_title() for a in mistakes(found, source, PLAIN).axes if a.get_title()]
    assert len(titles) == 10
    assert titles[0] == "light\n→ dark 88 %"
    assert titles == sorted(titles, reverse=True)
    assert most_confused(found, source.classes) == [("light", "dark", "10 of 10")]
    right = Outputs(logits[:10], torch.zeros(10, dtype=torch.int64), torch.arange(10), [])
    assert "no mistakes" in mistakes(right, source, PLAIN).axes[0].texts[0].get_text()
    assert len(curves([]).axes) == 4
