"""Scores, and the pictures drawn from them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import make_folder
from normfree.cli import _main
from normfree.data.crop import Preprocessing
from normfree.data.sources import open_folder
from normfree.evaluate import Interrupted, Outputs, Scores, average_precision, infer, score
from normfree.models import create_model
from normfree.nn.loss import hits
from normfree.report import confusion, curves, mistakes, most_confused, short_name
from normfree.train import evaluation

PLAIN = Preprocessing(32, "pad", 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def outputs(logits: Tensor, labels: list[int] | Tensor) -> Outputs:
    return Outputs(logits, torch.as_tensor(labels), torch.arange(len(labels)), [])


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


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_sigmoids_loss_equals_plain_numpy(kind: torch.dtype) -> None:
    """The sum over classes of the binary cross-entropies, in float64; the accuracies are those of the softmax."""
    torch.manual_seed(1)
    logits, labels = (3 * torch.randn(40, 6)).to(kind), torch.randint(6, (40,))
    found, softmax = score(outputs(logits, labels), "sigmoid"), score(outputs(logits, labels))
    p = 1 / (1 + np.exp(-logits.double().numpy()))
    truth = np.eye(6)[labels.numpy()]
    plain = -(truth * np.log(p) + (1 - truth) * np.log(1 - p)).sum(1).mean()
    assert found.loss == pytest.approx(plain, rel=1e-11)
    assert replace(found, loss=softmax.loss) == softmax
    assert found.average_precision is None
    assert set(found.as_dict()) == {"top1", "top5", "loss", "images"}


# Several labels


def plain_precision(logits: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """A class at a time, an image at a time: its images by falling logit, the earlier first among equals."""
    of_classes = []
    for c in range(labels.shape[1]):
        ranked = sorted(range(len(labels)), key=lambda i: (-logits[i, c], i))
        found, precisions = 0, []
        for place, i in enumerate(ranked, start=1):
            if labels[i, c]:
                found += 1
                precisions.append(found / place)
        if precisions:
            of_classes.append(sum(precisions) / len(precisions))
    return sum(of_classes) / len(of_classes)


def plain_place(row: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> int:
    """Of the best placed label in the order of falling logits, the lower class first among equals."""
    order = sorted(range(len(row)), key=lambda c: (-row[c], c))
    return next(place for place, c in enumerate(order) if labels[c])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.integers(1, 12),
    st.integers(1, 9),
    st.sampled_from([2, 5, 1000]),
    st.floats(0.0, 1.0),
    st.sampled_from([torch.int64, torch.float32]),
    st.integers(0, 10_000),
)
def test_scores_of_several_labels_equal_plain_formulas(
    n: int, classes: int, levels: int, share: float, kind: torch.dtype, seed: int
) -> None:
    """Of the best placed label, and by class; few levels of logits make ties. Each image has a label at least."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (n, classes), generator=generator) / levels * 8 - 4
    labels = torch.rand(n, classes, generator=generator) < share
    labels[range(n), torch.randint(classes, (n,), generator=generator)] = True
    x, y = logits.double().numpy(), labels.numpy()
    found = score(outputs(logits, labels.to(kind)), "sigmoid")
    places = [plain_place(row, truth) for row, truth in zip(x, y, strict=True)]
    assert found.top1 == sum(place < 1 for place in places) / n
    assert found.top5 == sum(place < 5 for place in places) / n
    assert found.average_precision == pytest.approx(plain_precision(x, y), rel=1e-12)
    assert found.as_dict()["average_precision"] == found.average_precision
    p = 1 / (1 + np.exp(-x))
    assert found.loss == pytest.approx(-np.where(y, np.log(p), np.log(1 - p)).sum(1).mean(), rel=1e-11)


def test_average_precision_by_hand() -> None:
    """Places 1 and 3 of the first class; last of three in the second, whose logits are equal; no third class."""
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 1.0, 0.0], [1.0, 1.0, 9.0]])
    labels = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    assert average_precision(logits, labels) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 3) / 2, rel=1e-15)
    assert average_precision(logits.flip(0), labels.flip(0)) == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2, rel=1e-15)
    torch.manual_seed(3)  # so many that a sort which is not stable mixes equals
    many, truth = torch.randint(3, (2000, 2)).float(), torch.randint(2, (2000, 2))
    assert average_precision(many, truth) == pytest.approx(plain_precision(many.numpy(), truth.numpy()), rel=1e-12)


def test_one_label_each_is_the_same_as_several() -> None:
    """Rows with a single one have the accuracies of its class, ties and NaN included."""
    torch.manual_seed(2)
    logits, labels = torch.randint(4, (50, 7)).float(), torch.randint(7, (50,))
    logits[::9, 3] = math.nan
    one, several = (score(outputs(logits, y)) for y in (labels, torch.eye(7, dtype=torch.int64)[labels]))
    assert (one.top1, one.top5) == (several.top1, several.top5)
    assert 0 < one.top1 < one.top5 < 1


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


# The loss is stored with the weights


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the sigmoid whose first evaluation was the best: each later one counts as less accurate."""
    home, evaluations = tmp_path_factory.mktemp("binary"), count()

    def falling(found: Outputs, loss: str) -> Scores:
        return replace(score(found, loss), top1=1 / (1 + next(evaluations)))

    images = make_folder(home / "images", classes=("dark", "grey", "light"))
    arguments = ["train", "--data.root", str(images), "--run-dir", str(home / "run"), "--optim.loss", "sigmoid"]
    arguments += ["--train.epochs", "3", "--train.batch-size", "8", "--train.device", "cpu", "--optim.head-only", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "score", falling)
        assert _main(arguments) == 0
    return home / "run"


def header(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as f:
        return dict(json.loads(f.metadata()["normfree"]))


def test_evaluate_repeats_the_summary_of_a_run_with_the_sigmoid(
    binary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last bit: the loss is in the file's header, and is not the softmax's."""
    capsys.readouterr()
    summary = json.loads((binary / "summary.json").read_text())
    assert header(binary / "best.safetensors")["loss"] == "sigmoid"
    assert _main(["evaluate", str(binary), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores == {k: summary[k] for k in ("top1", "top5", "loss", "images")}
    assert scores["loss"] > 3 * 0.5  # three classes that are hardly known yet; with the softmax about log 3


def test_predict_gives_each_class_its_own_probability(binary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sigmoid of its logit, which with the recorded loss gives evaluate's loss."""
    capsys.readouterr()
    held_out = json.loads((binary / "validation.json").read_text())
    paths = [str(binary.parent / "images" / name) for name in held_out]
    assert _main(["predict", str(binary), *paths, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert any(abs(sum(t["probability"] for t in row["top5"]) - 1) > 0.05 for row in rows)
    losses = []
    for row in rows:
        truth = Path(row["path"]).parent.name
        shares = {t["label"]: t["probability"] for t in row["top5"]}
        assert len(shares) == 3
        losses.append(-sum(math.log(p if label == truth else 1 - p) for label, p in shares.items()))
    assert sum(losses) / len(losses) == pytest.approx(
        json.loads((binary / "summary.json").read_text())["loss"], rel=1e-9
    )


def test_weights_that_name_no_loss_had_the_softmax_and_an_unknown_one_is_refused(
    binary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files of before, and files of later."""
    capsys.readouterr()
    about, tensors = header(binary / "best.safetensors"), load_file(binary / "best.safetensors")
    images, losses = str(binary.parent / "images"), []
    for name, change in (("sigmoid", {}), ("softmax", {"loss": "softmax"}), ("none", {"loss": None})):
        described = {k: v for k, v in (about | change).items() if v is not None}
        save_file(tensors, tmp_path / name, {"normfree": json.dumps(described)})
        assert _main(["evaluate", str(tmp_path / name), "--data.root", images, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[1] == losses[2] != losses[0]
    save_file(tensors, tmp_path / "odd", {"normfree": json.dumps(about | {"loss": "hinge"})})
    assert _main(["evaluate", str(tmp_path / "odd"), "--data.root", images]) == 1
    assert "a loss that is not known: 'hinge'" in capsys.readouterr().err


def test_a_run_goes_to_its_end_and_keeps_the_best_weights_and_the_last_scores(binary: Path) -> None:
    """No early stopping: every epoch is trained and evaluated, though the first evaluation stays the best."""
    lines = [json.loads(line) for line in (binary / "metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in lines if line["kind"] == "eval"]
    assert [e["step"] for e in evaluations] == [3, 6, 9]
    assert [e["raw"]["top1"] for e in evaluations] == [1, 1 / 3, 1 / 5]
    summary = json.loads((binary / "summary.json").read_text())
    assert (summary["steps"], summary["best"]) == (9, "raw at step 3")
    assert summary["last"] == {kind: evaluations[-1][kind] for kind in ("raw", "ema")}
    assert summary["loss"] == evaluations[0]["raw"]["loss"] != evaluations[-1]["raw"]["loss"]
    about = header(binary / "best.safetensors")
    assert (about["weights"], about["step"]) == ("raw", 3)


def test_an_image_without_labels_is_never_right() -> None:
    """Nor has a set without any label a precision."""
    logits, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.zeros(1, 3)
    scores = score(Outputs(logits, labels, torch.arange(1), []), "sigmoid")
    assert (scores.top1, scores.top5, scores.average_precision) == (0.0, 0.0, None)
    assert hits(logits, labels) == 0


def test_any_of_several_labels_is_a_hit() -> None:
    """In training as in evaluation; of mixed shares the greatest."""
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    assert hits(logits, torch.tensor([[1.0, 1.0, 0.0]])) == 1
    assert hits(logits, torch.tensor([[1.0, 0.0, 1.0]])) == 0
    assert hits(logits, torch.tensor([[0.6, 0.4, 0.0]])) == 0
    assert hits(logits, torch.tensor([[0.4, 0.6, 0.0]])) == 1
