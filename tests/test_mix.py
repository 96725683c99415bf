"""MixUp and CutMix are the authors', on the promised slots, and no output depends on how the batch is cut up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import Tensor

from normfree.data.mix import MixUpCutMix, Plan, _mix_each, _mix_together, cut_box

CALM = settings(deadline=None, max_examples=60)  # a busy machine is no failure
SEED, SIDE, FEW = st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 7)
SETTINGS = st.builds(
    lambda methods, pairs: MixUpCutMix(mixup=methods != "cutmix", cutmix=methods != "mixup", pairs=pairs),
    st.sampled_from(["both", "mixup", "cutmix"]),
    st.sampled_from(["disjoint", "batch"]),
)
CLASSES = 5
MIX = MixUpCutMix()


@pytest.fixture(scope="module")
def authors() -> dict[str, NDArray[Any]]:
    return load_file(Path(__file__).parent / "fixtures" / "authors_mix.safetensors")


def read_from(mix: MixUpCutMix, outputs: int) -> int:
    """How many images make so many outputs."""
    return outputs * (2 if mix.pairs == "disjoint" else 1)


def batch(count: int, height: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    images = torch.from_numpy(rng.integers(0, 256, (count, 3, height, width), np.uint8))
    return images, torch.from_numpy(rng.integers(0, CLASSES, count))


def pair(mix: MixUpCutMix, slot: int, outputs: int) -> tuple[int, int]:
    """The two images of an output, written plainly."""
    if mix.pairs == "disjoint":
        return 2 * slot, 2 * slot + 1
    if slot % 2:
        return slot, slot - 1
    return slot, slot + 1 if slot + 1 < outputs else max(slot - 1, 0)


def plainly(image: NDArray[Any], other: NDArray[Any], plan: Plan, slot: int) -> NDArray[Any]:
    """One output in float64, not rounded, pixel by pixel where it is CutMix."""
    if not plan.cut[slot]:
        ratio = float(plan.ratio[slot])
        return ratio * image.astype(np.float64) + (1 - ratio) * other.astype(np.float64)
    left, top, right, bottom = plan.box[slot]
    out = other.astype(np.float64)
    for y in range(top, bottom):
        for x in range(left, right):
            out[:, y, x] = image[:, y, x]
    return out


def one_hot(label: int) -> NDArray[np.float64]:
    return np.array([float(c == label) for c in range(CLASSES)])


# what is drawn


def test_boxes_are_the_authors(authors: dict[str, NDArray[Any]]) -> None:
    """From the same draws as the authors' code: the same pixels, and the same float32 ratio, for any size and shape."""
    sizes = [key.split("/")[1] for key in authors if key.startswith("boxes/") and key.endswith("/share")]
    assert len(sizes) == 7
    for size in sizes:
        share, x, y, box, ratio = (authors[f"boxes/{size}/{name}"] for name in ("share", "x", "y", "box", "ratio"))
        height, width = map(int, size.split("x"))
        ours = cut_box(share, x.astype(np.int64), y.astype(np.int64), height, width)
        area = (ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1])
        assert np.array_equal(np.where(area[:, None] > 0, ours, 0), box)
        assert np.array_equal((area / (height * width)).astype(np.float32), ratio)


def test_boxes_are_distributed_as_the_authors(authors: dict[str, NDArray[Any]]) -> None:
    """Ratios, edges and middles of 6,000 of our boxes and of the authors' own: Kolmogorov-Smirnov, p > 0.001 each."""
    plan = MixUpCutMix(mixup=False).plan(3, 0, range(6000), (24, 40))
    ours = np.where(plan.ratio[:, None] > 0, plan.box, 0)
    theirs, ratio = authors["drawn/24x40/box"], authors["drawn/24x40/ratio"]
    middles = [(ours[:, i] + ours[:, i + 2], theirs[:, i] + theirs[:, i + 2]) for i in range(2)]
    for a, b in [(plan.ratio, ratio), *zip(ours.T, theirs.T, strict=True), *middles]:
        assert distance(a, b) < 1.95 * np.sqrt(2 / 6000)


def distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The largest difference of the two empirical distribution functions."""
    values = np.union1d(a, b)
    of_a, of_b = (np.searchsorted(np.sort(c), values, "right") / len(c) for c in (a, b))
    return float(np.abs(of_a - of_b).max())


def test_ratios_of_mixup_are_beta() -> None:
    """Mean 1/2, variance 1 / (4 (2 alpha + 1)), and ends as heavy as they must be: within five standard errors."""
    n = 20_000
    for alpha in (0.2, 0.4, 1.0):
        ratio = MixUpCutMix(alpha, cutmix=False).plan(1, 2, range(n), 8).ratio.astype(np.float64)
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(ratio.mean() - 0.5) < 5 * np.sqrt(variance / n)
        assert abs(ratio.var() - variance) < 5 * np.sqrt(1 / 80 / n)
    of_paper = MixUpCutMix(0.2, cutmix=False).plan(1, 2, range(n), 8).ratio
    end = 0.20978  # I_0.01(0.2, 0.2), by quadrature
    for count in ((of_paper < 0.01).sum(), (of_paper > 0.99).sum()):
        assert abs(count / n - end) < 5 * np.sqrt(end * (1 - end) / n)


def test_slots_are_mixed_in_turn() -> None:
    """Even slots are MixUp and odd ones CutMix, wherever a part begins; a method alone has all."""
    assert MIX.plan(0, 0, range(3, 8), 8).cut.tolist() == [True, False, True, False, True]
    assert MixUpCutMix(cutmix=False).plan(0, 0, range(3), 8).cut.tolist() == [False] * 3
    assert MixUpCutMix(mixup=False).plan(0, 0, range(3), 8).cut.tolist() == [True] * 3


@CALM
@given(SETTINGS, SEED, st.integers(0, 2**32 - 1), SIDE, SIDE, st.integers(0, 9))
def test_plans_are_small_numpy_arrays_in_range(
    mix: MixUpCutMix, seed: int, step: int, height: int, width: int, attempt: int
) -> None:
    """Ratios lie in [0, 1], boxes within the image, and a CutMix ratio is the box's share of the pixels, exactly."""
    plan = mix.plan(seed, step, range(20), (height, width), attempt)
    left, top, right, bottom = plan.box.T
    assert (plan.cut.dtype, plan.ratio.dtype, plan.box.dtype) == (np.dtype(bool), np.dtype("f4"), np.dtype("i8"))
    assert plan.box.shape == (20, 4)
    assert ((plan.ratio >= 0) & (plan.ratio <= 1)).all()
    assert ((left >= 0) & (left <= right) & (right <= width) & (top >= 0) & (top <= bottom) & (bottom <= height)).all()
    share = ((right - left) * (bottom - top) / (height * width)).astype(np.float32)
    assert np.array_equal(share[plan.cut], plan.ratio[plan.cut])
    assert not plan.box[~plan.cut].any()


@CALM
@given(SEED, st.integers(0, 1000), st.lists(st.integers(0, 5000), min_size=1, max_size=10), st.integers(0, 9))
def test_a_plan_is_a_function_of_each_slot(seed: int, step: int, slots: list[int], attempt: int) -> None:
    """Planned together or one at a time, a slot has the same method, ratio and box to the last bit."""
    together = MIX.plan(seed, step, slots, 32, attempt)
    for i, slot in enumerate(slots):
        alone = MIX.plan(seed, step, [slot], 32, attempt)
        parts: list[tuple[Any, Any]] = list(zip(together, alone, strict=True))
        assert all(np.array_equal(a[i], b[0]) for a, b in parts)


def test_whatever_differs_plans_anew() -> None:
    """No two of 160 MixUp ratios agree, nor of 160 boxes, under other seeds, steps, attempts and slots."""
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    mixes = MixUpCutMix(1.0, cutmix=False), MixUpCutMix(mixup=False)
    mixups, cutmixes = ([m.plan(s, t, range(40), 10**6, a) for s, t, a in keys] for m in mixes)
    assert len(np.unique(np.concatenate([p.ratio for p in mixups]))) == 160
    assert len(np.unique(np.concatenate([p.box for p in cutmixes]), axis=0)) == 160


# what is mixed


def test_the_authors_batch(authors: dict[str, NDArray[Any]]) -> None:
    """Float images mixed by the authors' function, MixUp and CutMix: ours are the same to the last bit, unclipped."""
    names = ("images", "labels", "mixup_ratio", "mask", "cutmix_ratio")
    images, labels, mixup_ratio, mask, cutmix_ratio = (authors[f"mixed/{name}"] for name in names)
    half, n = len(images) // 4, len(images) // 2
    first = np.array([[i, 2 * half + i] for i in range(half)]).ravel()  # theirs has MixUp first, ours in turn
    order, theirs = np.stack([first, first + half], 1).ravel(), np.arange(n).reshape(2, half).T.ravel()
    cut = np.arange(n) % 2 == 1
    plan = Plan(
        cut,
        np.where(cut, cutmix_ratio[first], mixup_ratio[first]),
        np.array([box_of(mask[i]) if c else (0, 0, 0, 0) for i, c in zip(first, cut, strict=True)]),
    )
    mixed, targets = MIX(nchw(images[order]), torch.from_numpy(labels[order].astype(np.int64)), CLASSES, plan)
    assert np.array_equal(mixed.permute(0, 2, 3, 1).numpy(), authors["mixed/out/images"][theirs])
    a, b, ratio = (authors[f"mixed/out/{name}"][theirs] for name in ("labels", "mix_labels", "ratio"))
    expected = ratio[:, None] * np.eye(CLASSES)[a] + (1 - ratio[:, None]) * np.eye(CLASSES)[b]
    np.testing.assert_allclose(targets.numpy(), expected, rtol=0, atol=1e-7)
    assert mixed.min() < 0
    assert mixed.max() > 255


def nchw(images: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)


def box_of(mask: NDArray[np.float32]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any((1, 2))), np.flatnonzero(mask.any((0, 2)))
    return (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)


@CALM
@given(SETTINGS, FEW, st.integers(1, 12), st.integers(1, 12), SEED)
def test_outputs_are_the_plain_formula(mix: MixUpCutMix, outputs: int, height: int, width: int, seed: int) -> None:
    """uint8: within rounding of the formula in float64; targets: the two shares, to float32, of the right labels."""
    images, labels = batch(read_from(mix, outputs), height, width, seed)
    plan = mix.plan(seed, 4, range(outputs), (height, width))
    mixed, targets = mix(images, labels, CLASSES, seed=seed, step=4)
    assert mixed.dtype == torch.uint8
    assert targets.dtype == torch.float32
    assert targets.shape == (outputs, CLASSES)
    for slot in range(outputs):
        i, j = pair(mix, slot, outputs)
        expected = plainly(images[i].numpy(), images[j].numpy(), plan, slot)
        assert np.abs(mixed[slot].numpy() - expected).max() <= (0 if plan.cut[slot] else 0.5 + 1e-4)
        share = float(plan.ratio[slot])
        target = share * one_hot(int(labels[i])) + (1 - share) * one_hot(int(labels[j]))
        np.testing.assert_allclose(targets[slot].numpy(), target, rtol=0, atol=1e-7)
        if i == j or labels[i] == labels[j]:
            assert targets[slot].max() == 1.0


@CALM
@given(st.sampled_from(["disjoint", "batch"]), SIDE, SIDE, SEED)
def test_cutmix_targets_count_the_pixels(pairs: Any, height: int, width: int, seed: int) -> None:
    """Images of one colour each: a label's target is the counted share of the pixels that its image has, exactly."""
    mix, outputs = MixUpCutMix(mixup=False, pairs=pairs), 4
    count = read_from(mix, outputs)
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(count, 3, height, width).contiguous()
    mixed, targets = mix(images, torch.arange(count), count, seed=seed)
    for slot in range(outputs):
        i, j = pair(mix, slot, outputs)
        pixels = int((mixed[slot, 0] == i).sum())
        assert pixels + int((mixed[slot, 0] == j).sum()) == height * width
        assert targets[slot, i] == np.float32(pixels / (height * width))
        assert targets[slot, j] == 1 - np.float32(pixels / (height * width))
        assert targets[slot].count_nonzero() <= 2


def test_the_box_shows_the_first_image() -> None:
    """Left, top, right and bottom are where they should be on an image that is not square."""
    images = torch.stack([torch.full((3, 4, 6), 7.0), torch.zeros(3, 4, 6)])
    plan = Plan(np.array([True]), np.array([6 / 24], np.float32), np.array([[1, 2, 4, 4]]))
    mixed, targets = MIX(images, torch.tensor([0, 1]), 2, plan)
    expected = torch.zeros(3, 4, 6)
    expected[:, 2:4, 1:4] = 7.0
    assert torch.equal(mixed[0], expected)
    assert targets.tolist() == [[0.25, 0.75]]


def test_halves_round_to_even() -> None:
    """At a ratio of 1/2 the levels (0, 1), (1, 2), (2, 3), (254, 255) become 0, 2, 2, 254; equal ones stay."""
    first = torch.tensor([0, 1, 2, 254, 255, 9], dtype=torch.uint8).expand(1, 3, 1, 6)
    second = torch.tensor([1, 2, 3, 255, 255, 9], dtype=torch.uint8).expand(1, 3, 1, 6)
    plan = Plan(np.array([False]), np.array([0.5], np.float32), np.zeros((1, 4), np.int64))
    for mix in (_mix_each, _mix_together):
        mixed = mix(torch.cat([first, second]), np.array([[0], [1]]), plan)
        assert mixed[0, 0, 0].tolist() == [0, 2, 2, 254, 255, 9]


@CALM
@given(st.floats(0, 1, width=32), SEED)
def test_mixup_of_bytes_rounds_the_float32_sum(ratio: float, seed: int) -> None:
    """uint8 MixUp is round-half-even of the float32 formula, each operation rounded by itself, to the last bit."""
    images, labels = batch(2, 16, 16, seed)
    plan = Plan(np.array([False]), np.array([ratio], np.float32), np.zeros((1, 4), np.int64))
    mixed, _ = MIX(images, labels, CLASSES, plan)
    a, b = images.numpy().astype(np.float32)
    weight = np.float32(ratio)
    assert np.array_equal(mixed[0].numpy(), np.rint(weight * a + (np.float32(1) - weight) * b))


@CALM
@given(SETTINGS, st.integers(1, 6), st.data())
def test_multi_label_rows_mix_as_the_images_do(mix: MixUpCutMix, outputs: int, data: st.DataObject) -> None:
    """Rows of labels are mixed linearly; one-hot rows give what numbers give."""
    count = read_from(mix, outputs)
    images, labels = batch(count, 6, 7, data.draw(SEED))
    rows = torch.rand(count, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    mixed, targets = mix(images, rows, CLASSES, seed=9)
    ratio = mix.plan(9, 0, range(outputs), (6, 7)).ratio
    for slot in range(outputs):
        i, j = pair(mix, slot, outputs)
        expected = float(ratio[slot]) * rows[i] + (1 - float(ratio[slot])) * rows[j]
        torch.testing.assert_close(targets[slot].double(), expected, rtol=0, atol=2e-7)
    of_numbers = mix(images, labels, CLASSES, seed=9)
    of_rows = mix(images, torch.nn.functional.one_hot(labels, CLASSES).float(), CLASSES, seed=9)
    assert torch.equal(of_numbers[0], mixed)
    assert torch.equal(of_numbers[1], of_rows[1])


# how it is computed


@CALM
@given(SETTINGS, st.integers(1, 5), st.integers(1, 5), st.sampled_from(["uint8", "float32", "float16"]), st.booleans())
def test_parts_of_a_batch_give_the_same_bits(
    mix: MixUpCutMix, parts: int, half: int, dtype: str, channels_last: bool
) -> None:
    """Cut into micro-batches of an even number of outputs, or mixed whole: the same images and targets, bit for bit."""
    size = 2 * half
    outputs = parts * size
    images, labels = batch(read_from(mix, outputs), 9, 7)
    images = images.to(getattr(torch, dtype))
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    whole, targets = mix(images, labels, CLASSES, seed=5, step=6)
    for k in range(parts):
        read = slice(k * read_from(mix, size), (k + 1) * read_from(mix, size))
        plan = mix.plan(5, 6, range(k * size, (k + 1) * size), (9, 7))
        part, of_part = mix(images[read], labels[read], CLASSES, plan)
        assert torch.equal(part, whole[k * size : (k + 1) * size])
        assert torch.equal(of_part, targets[k * size : (k + 1) * size])


@CALM
@given(SETTINGS, FEW, st.integers(1, 9), st.integers(1, 9), st.booleans(), SEED)
def test_together_equals_one_at_a_time(
    mix: MixUpCutMix, outputs: int, height: int, width: int, channels_last: bool, seed: int
) -> None:
    """What runs on accelerators, all outputs of a method at once, gives the bits of what runs on the processor."""
    images, _ = batch(read_from(mix, outputs), height, width, seed)
    plan, pairs = mix.plan(seed, 0, range(outputs), (height, width)), mix._pairs(outputs)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    for given_images in (images, images.float().mul(1.7).sub(51), images.double(), images.bfloat16()):
        each, together = _mix_each(given_images, pairs, plan), _mix_together(given_images, pairs, plan)
        assert each.dtype == together.dtype == given_images.dtype
        assert torch.equal(each, together)


@pytest.mark.parametrize("pairs", ["disjoint", "batch"])
def test_memory_and_inputs_are_left_as_they_are(pairs: Any) -> None:
    """Channels that are last stay last, others do not become so, and the images given are not written to."""
    mix = MixUpCutMix(pairs=pairs)
    images, labels = batch(12, 8, 6)
    last = images.to(memory_format=torch.channels_last)
    for given_images, form in ((images, torch.contiguous_format), (last, torch.channels_last)):
        for tensor in (given_images, given_images.float()):
            before = tensor.clone()
            assert mix(tensor, labels, CLASSES)[0].is_contiguous(memory_format=form)
            plan = mix.plan(0, 0, range(12 if pairs == "batch" else 6), (8, 6))
            assert _mix_together(tensor, mix._pairs(len(plan.cut)), plan).is_contiguous(memory_format=form)
            assert torch.equal(tensor, before)


WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: MixUpCutMix(alpha=0.0), "alpha of MixUp must be positive"),
    (lambda: MixUpCutMix(alpha=float("nan")), "alpha of MixUp must be positive"),
    (lambda: MixUpCutMix(mixup=False, cutmix=False), "neither"),
    (lambda: MixUpCutMix(pairs="some"), 'must be "disjoint" or "batch"'),  # type: ignore[arg-type]
    (lambda: MixUpCutMix(pairs="batch").plan(0, 0, range(3, 6), 8), "begin with an even one"),
    (lambda: MixUpCutMix(pairs="batch").plan(0, 0, [0, 2], 8), "slots in a row"),
    (lambda: MIX(*batch(3, 4, 4), CLASSES), "give an even number"),
    (lambda: MIX(*batch(4, 4, 4), CLASSES, MIX.plan(0, 0, range(3), 4)), "make 2 outputs, and the plan is for 3"),
    (lambda: MIX(batch(4, 4, 4)[0], torch.zeros(3, dtype=torch.int64), CLASSES), "4 images have 3 labels"),
    (lambda: MIX(batch(4, 4, 4)[0], torch.zeros(4), CLASSES), r"labels must be .* not \(4,\) float32"),
    (lambda: MIX(batch(4, 4, 4)[0], torch.zeros(4, 6), CLASSES), r"\(M, 5\) floating-point, not \(4, 6\) float32"),
    (lambda: MIX(batch(4, 4, 4)[0].long(), torch.zeros(4, 5), CLASSES), "images must be .* int64"),
    (lambda: MIX(batch(4, 4, 4)[0][0], torch.zeros(3, 5), CLASSES), "images must be"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_does_not_fit_is_an_error(call: Callable[[], Any], message: str) -> None:
    """Each mistake is a ValueError that says what was expected."""
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", ["disjoint", "batch"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
def test_the_gpu_gives_the_same_bits_and_is_not_waited_for(pairs: Any, dtype: torch.dtype) -> None:
    """CUDA equals the processor bit for bit, images and targets, and nothing in the call waits for the device."""
    mix = MixUpCutMix(pairs=pairs)
    images, labels = batch(64, 50, 70)
    images = images.to(dtype).to(memory_format=torch.channels_last)
    mixed, targets = mix(images, labels, CLASSES, seed=1)
    on_device, labels_there = images.cuda(), labels.cuda()
    mix(on_device, labels_there, CLASSES, seed=1)  # loads kernels, which may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        there, targets_there = mix(on_device, labels_there, CLASSES, seed=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert there.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(there.cpu(), mixed)
    assert torch.equal(targets_there.cpu(), targets)
