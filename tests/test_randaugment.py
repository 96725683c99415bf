"""RandAugment's operations equal the authors' on every pixel, and no image depends on how the batch is cut up."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from normfree.data import image_ops, randaugment
from normfree.data.autoaugment import POLICY_V0, AutoAugment
from normfree.data.randaugment import OPERATIONS, Plan, RandAugment, apply_op, apply_plan

FIXTURE = Path(__file__).parent / "fixtures" / "randaugment.safetensors"
NAMES = [
    *("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "Color", "Contrast", "Brightness"),
    *("Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout", "SolarizeAdd"),
]
SIGNED = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"]
Augment = RandAugment | AutoAugment
BOTH: list[Augment] = [RandAugment(4, 10), AutoAugment()]


@pytest.fixture(scope="module")
def authors() -> dict[str, NDArray[np.uint8]]:
    with safe_open(FIXTURE, "np") as f:
        return {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (it is no dictionary)


@pytest.fixture(scope="module")
def about() -> dict[str, Any]:
    with safe_open(FIXTURE, "np") as f:
        found: dict[str, Any] = json.loads(f.metadata()["about"])
    return found


def batch(n: int, height: int = 12, width: int = 17, last: bool = True, seed: int = 0) -> Tensor:
    """(n, 3, H, W): slopes and noise of several contrasts; channels last in memory, or first."""
    rng = np.random.default_rng(seed)
    slope = np.linspace(40, 200, height)[:, None, None] + np.linspace(-30, 30, width)[None, :, None]
    pixels = slope + rng.normal(0, 1, (n, height, width, 3)) * rng.choice([2, 20, 80], (n, 1, 1, 3))
    images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2)
    return images if last else images.contiguous()


def hwc(image: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(image.copy()).permute(2, 0, 1)[None]


# ---- the operations


def test_the_operations_are_those_of_the_paper_in_the_order_of_the_authors() -> None:
    """Draws are numbers of this list, so its order is part of every run."""
    assert list(OPERATIONS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_equals_the_authors_on_every_pixel(
    name: str, authors: dict[str, NDArray[np.uint8]], about: dict[str, Any]
) -> None:
    """Levels 1 to 15, both signs, centres at and off the edge; natural, noisy, constant and black images."""
    keys = [key.removeprefix("images/") for key in authors if key.startswith("images/")]
    assert len(keys) == 6
    for key in keys:
        image = authors[f"images/{key}"]
        for (level, sign, y, x), expected in zip(about["variants"][name], authors[f"{key}/{name}"], strict=True):
            center = (int(y * image.shape[0]), int(x * image.shape[1]))
            found = apply_op(name, hwc(image), level, sign, center)[0].permute(1, 2, 0).numpy()
            assert np.array_equal(found, expected), (key, level, sign, np.abs(found.astype(int) - expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_each_operation_does_something_to_the_fixture(name: str, authors: dict[str, NDArray[np.uint8]]) -> None:
    """At the highest level, else equality would prove nothing."""
    assert (authors[f"natural/{name}"][-1] != authors["images/natural"]).mean() > 0.1


def test_the_grey_of_every_colour_equals_tensorflow(about: dict[str, Any]) -> None:
    """All 2^24 colours: Color with factor 0 gives the grey image."""
    digest = hashlib.sha256()
    green, blue = torch.meshgrid(torch.arange(256), torch.arange(256), indexing="ij")
    for red in range(256):
        x = torch.stack([torch.full_like(green, red), green, blue], -1).to(torch.uint8)[None]
        grey = image_ops.color(x, 0.0)[0]
        digest.update(grey[..., 0].contiguous().numpy().tobytes())
    assert digest.hexdigest() == about["grey_sha256"]


def test_autocontrast_is_its_formula_for_every_pair_of_extremes() -> None:
    """In float32, one operation after the other: v s - lo s with s = 255 / (hi - lo), cut off."""
    v = np.arange(256, dtype=np.float32)
    for low in range(0, 255, 3):
        high = np.arange(low + 1, 256, dtype=np.float32)[:, None]
        inside = np.minimum(np.maximum(v, np.float32(low)), high)
        scale = np.float32(255) / (high - np.float32(low))
        expected = np.clip(inside * scale + (-np.float32(low) * scale), 0, 255).astype(np.uint8)
        x = np.repeat(inside.astype(np.uint8)[:, None, :, None], 3, -1)
        assert np.array_equal(image_ops.autocontrast(torch.from_numpy(x))[:, 0, :, 1].numpy(), expected)


@pytest.mark.parametrize("name", ["Color", "Contrast", "Brightness", "Sharpness"])
def test_level_5_changes_nothing_where_images_are_blended(name: str) -> None:
    """The factor is exactly 1 there, and the result is a copy."""
    images = batch(3)
    found = apply_op(name, images, 5)
    assert torch.equal(found, images)
    assert found.data_ptr() != images.data_ptr()


@pytest.mark.parametrize(("level", "threshold"), [(5, 128), (10, 0), (15, 128), (7, 179), (20, 0)])
def test_solarize_wraps_its_threshold(level: int, threshold: int) -> None:
    """25.6 level, modulo 256: level 10 inverts everything and 15 is as 5."""
    images = batch(2)
    expected = torch.where(images < threshold, images, 255 - images)
    assert torch.equal(apply_op("Solarize", images, level), expected)


@pytest.mark.parametrize(("level", "kept"), [(0, 1), (2, 1), (2.5, 1), (5, 2), (9, 3), (15, 6), (20, 8), (25, 1)])
def test_posterize_keeps_the_upper_bits(level: float, kept: int) -> None:
    """int(0.4 level) bits, where 0 is 1 as TensorFlow shifts by 7 at most; beyond 8 the shift wraps."""
    images = batch(2)
    assert torch.equal(apply_op("Posterize", images, level), images // 2 ** (8 - kept) * 2 ** (8 - kept))


@pytest.mark.parametrize(
    ("height", "width", "grey"), [(8, 20, 0), (16, 33, 2), (150, 220, 128), (255, 257, 255), (300, 300, 255)]
)
def test_the_grey_of_contrast_follows_from_the_size(height: int, width: int, grey: int) -> None:
    """With factor 0 all is grey: pixels / 256, cut off, up to 255; and not the mean."""
    x = batch(1, height, width).permute(0, 2, 3, 1)
    assert image_ops.contrast(x, 0.0).unique().tolist() == [grey]


@pytest.mark.parametrize("bright", [0, 100, 2000, 2900])
def test_equalize_is_its_formula(bright: int) -> None:
    """A value goes to (pixels below it + step / 2) / step; step is all but the brightest pixels / 255."""
    images = batch(2, 50, 60)
    images[1] = images[1].clamp(max=180)
    images[1].view(3, -1)[:, :bright] = 180
    found = apply_op("Equalize", images, 0)
    for channel, out in zip(images.reshape(6, -1).numpy(), found.reshape(6, -1).numpy(), strict=True):
        below = np.array([(channel < v).sum() for v in range(256)])
        step = (channel < channel.max()).sum() // 255
        table = np.minimum((below + step // 2) // step, 255) if step else np.arange(256)
        assert np.array_equal(out, table[channel])


@pytest.mark.parametrize("level", [0, 1, 0.55, 3.3, 8, 20, 400])
@pytest.mark.parametrize("sign", [1, -1])
def test_translations_read_from_the_side_of_their_sign(level: float, sign: int) -> None:
    """Output (y, x) is input (y, x + 10 level), in float32 with halves away from zero, else 128; y likewise."""
    images = batch(2, 30, 41)
    for name, axis in (("TranslateX", 3), ("TranslateY", 2)):
        size = images.shape[axis]
        places = np.arange(size, dtype=np.float32) + np.float32(sign * level * 10)
        source = [int(np.copysign(np.floor(abs(p) + 0.5), p)) for p in places.astype(np.float64)]
        expected = torch.full_like(images, 128)
        for i, s in enumerate(source):
            if 0 <= s < size:
                expected.select(axis, i).copy_(images.select(axis, s))
        assert torch.equal(apply_op(name, images, level, sign), expected)


def test_cutout_is_a_square_about_its_centre() -> None:
    """Rows cy - h .. cy + h - 1, as far as they are in the image, and columns likewise; h is 4 level, cut off."""
    images = batch(3, 40, 50)
    centers = np.array([(0, 0), (39, 49), (20, 13)])
    found = apply_op("Cutout", images, 1.3, center=centers)
    y, x = np.mgrid[:40, :50]
    for image, out, (cy, cx) in zip(images, found, centers, strict=True):
        inside = (y >= cy - 5) & (y < cy + 5) & (x >= cx - 5) & (x < cx + 5)
        assert torch.equal(out, torch.where(torch.from_numpy(inside), 128, image).to(torch.uint8))
    middle = apply_op("Cutout", images, 1.3, center=(20, 25))
    assert torch.equal(apply_op("Cutout", images, 1.3), middle)


def test_black_pixels_are_not_taken_for_missing_ones() -> None:
    """What is outside is 128; what is black inside stays black."""
    black = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    for name in SIGNED:
        out = apply_op(name, black, 1)
        assert set(out.unique().tolist()) == {0, 128}
        assert out[0, :, 10, 9].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 2), (3, 3), (4, 2)])
def test_tiny_images_are_no_error(name: str, size: tuple[int, int]) -> None:
    """Images too small to be smoothed are returned as they are; no images give none."""
    images = batch(2, *size)
    for level in (0, 1, 10, 30):
        assert apply_op(name, images, level, -1).shape == images.shape
    assert apply_op(name, images[:0], 10).shape == (0, 3, *size)
    if name == "Sharpness" and min(size) < 3:
        assert torch.equal(apply_op(name, images, 10), images)


@pytest.mark.parametrize("name", NAMES)
def test_each_image_may_have_its_own_level_sign_and_centre(name: str) -> None:
    """A batch with parameters for each image equals the images alone."""
    images = batch(6)
    levels, signs, centers = [1, 9, 9, 15, 9, 0.5], [1, -1, 1, -1, -1, 1], np.arange(12).reshape(6, 2)
    together = apply_op(name, images, levels, torch.tensor(signs), centers)
    for i in range(6):
        assert torch.equal(together[i : i + 1], apply_op(name, images[i : i + 1], levels[i], signs[i], centers[i]))


# ---- layouts


@pytest.mark.parametrize("augment", BOTH)
def test_every_memory_format_gives_the_same_and_keeps_its_own(augment: Augment) -> None:
    """Channels last, channels first, and a part of a larger tensor; the images given are not changed."""
    images = batch(20, 24, 31)
    whole = torch.zeros(20, 3, 30, 40, dtype=torch.uint8)
    whole[:, :, 3:27, 5:36] = images
    before = images.clone()
    expected = augment(images, seed=4)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    first = augment(images.contiguous(), seed=4)
    assert first.is_contiguous()
    assert torch.equal(first, expected)
    assert torch.equal(augment(whole[:, :, 3:27, 5:36], seed=4), expected)
    assert torch.equal(images, before)


@pytest.mark.parametrize("augment", BOTH)
def test_batched_equals_one_at_a_time(augment: Augment, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, however many images are worked on together."""
    images = batch(60, 33, 26)
    plan = augment.plan(3, 8, range(60), (33, 26))
    alone = torch.cat([augment(images[i : i + 1], Plan(*(a[:, i : i + 1] for a in plan))) for i in range(60)])  # type: ignore[arg-type]
    for cached in (1, 20_000, 10**9):
        monkeypatch.setattr(randaugment, "_CACHED", cached)
        assert torch.equal(augment(images, seed=3, step=8), alone)


# ---- RandAugment


def test_the_call_is_its_plan_layer_by_layer() -> None:
    """Every operation that is drawn is carried out, at the magnitude, with its sign and centre."""
    augment, images = RandAugment(3, 12), batch(40, 40, 28)
    plan = augment.plan(5, 6, range(40), (40, 28))
    found = augment(images, plan)
    assert torch.equal(found, augment(images, seed=5, step=6))
    for i in range(40):
        one = images[i : i + 1]
        for layer in range(3):
            name, sign = OPERATIONS[plan.op[layer, i]], int(plan.sign[layer, i])
            one = apply_op(name, one, 12, sign, plan.center[layer, i])
        assert torch.equal(found[i : i + 1], one)


@pytest.mark.parametrize("augment", BOTH)
def test_a_plan_depends_on_its_keys_and_not_on_the_split(augment: Augment) -> None:
    """The draws of a slot are those of (seed, step, slot, layer, attempt), whichever slots are asked for with it."""
    size = (30, 50)
    whole = augment.plan(1, 2, range(64), size)
    for slots in ([5], [63, 0, 17], range(20, 30)):
        part = augment.plan(1, 2, slots, size)
        for a, b in zip(part, whole, strict=True):
            assert np.array_equal(a, b[:, list(slots)])
    others = [
        augment.plan(2, 2, range(64), size),
        augment.plan(1, 3, range(64), size),
        augment.plan(1, 2, range(64), size, attempt=1),
        augment.plan(1, 2, range(64, 128), size),
    ]
    for other in others:
        assert (other.op != whole.op).mean() > 0.3
        assert (other.center != whole.center).mean() > 0.8
        assert 0.2 < (other.sign != whole.sign).mean() < 0.8
    assert np.array_equal(augment.plan(1, 2, range(64), size, 0).op, whole.op)


def test_layers_draw_for_themselves_and_more_layers_keep_the_first() -> None:
    """No two layers agree more often than by chance."""
    plan = RandAugment(4, 10).plan(0, 0, range(2000), 32)
    for i in range(4):
        for j in range(i):
            assert abs((plan.op[i] == plan.op[j]).mean() - 1 / 16) < 5 * np.sqrt(1 / 16 / 2000)
    assert np.array_equal(RandAugment(2, 5).plan(0, 0, range(2000), 32).op, plan.op[:2])


def chi2(counts: NDArray[np.int64]) -> float:
    """In standard deviations from its mean, for equally likely bins."""
    expected, freedom = counts.sum() / len(counts), len(counts) - 1
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / np.sqrt(2 * freedom))


def test_operations_signs_and_centres_are_evenly_drawn() -> None:
    """16 operations, each with 2 signs, and every row and column, are equally likely (five standard deviations)."""
    plan = RandAugment(4, 10).plan(9, 1, range(20_000), (24, 40))
    assert np.array_equal(np.unique(plan.sign), [-1, 1])
    assert abs(chi2(np.bincount((plan.op * 2 + (plan.sign > 0)).ravel(), minlength=32))) < 5
    for axis, size in ((0, 24), (1, 40)):
        counts = np.bincount(plan.center[..., axis].ravel(), minlength=size)
        assert len(counts) == size
        assert abs(chi2(counts)) < 5


def test_magnitude_is_the_level_of_all_and_is_not_cut_off() -> None:
    """A plan's levels are the magnitude, also beyond 10; and 15 gives other images than 10."""
    assert (RandAugment(2, 15).plan(0, 0, range(5), 8).level == 15).all()
    images = batch(30)
    assert not torch.equal(RandAugment(1, 15)(images), RandAugment(1, 10)(images))


def test_no_layers_change_nothing() -> None:
    """RandAugment(0) is a copy."""
    images = batch(3)
    found = RandAugment(0)(images)
    assert torch.equal(found, images)
    assert found.data_ptr() != images.data_ptr()


def test_a_plan_can_be_applied_by_hand() -> None:
    """`apply_plan` takes operations, levels and signs for each image; -1 leaves an image as it is."""
    images = batch(2)
    op = np.array([[OPERATIONS.index("Invert"), -1]])
    ones = np.ones((1, 2))
    out = apply_plan(images, Plan(op, ones, ones.astype(np.int64), np.zeros((1, 2, 2), np.int64)))
    assert torch.equal(out[0], 255 - images[0])
    assert torch.equal(out[1], images[1])


# ---- AutoAugment


def test_the_policy_is_the_published_one(about: dict[str, Any]) -> None:
    """25 pairs of operation, probability and level."""
    assert [[list(choice) for choice in pair] for pair in POLICY_V0] == about["policy"]


def test_autoaugment_draws_its_sub_policies_evenly_and_with_their_probabilities() -> None:
    """What is carried out, pair by pair, comes as often as the table says (chi-square of all outcomes)."""
    n = 50_000
    plan = AutoAugment().plan(2, 0, range(n), 32)
    assert set(np.unique(plan.sign)) == {-1, 1}
    outcomes: Counter[tuple[tuple[int, float], ...]] = Counter()
    for first, second in POLICY_V0:
        for fires_first in (0, 1):
            for fires_second in (0, 1):
                share = 1 / 25
                key = []
                for fires, (name, probability, level) in ((fires_first, first), (fires_second, second)):
                    share *= probability if fires else 1 - probability
                    key.append((OPERATIONS.index(name), float(level)) if fires else (-1, 0.0))
                outcomes[tuple(key)] += share  # type: ignore[assignment]
    expected = {key: n * share for key, share in outcomes.items() if share > 1e-9}
    ops, levels = plan.op.T.tolist(), np.where(plan.op < 0, 0.0, plan.level).T.tolist()
    counts = Counter(tuple(zip(o, v, strict=True)) for o, v in zip(ops, levels, strict=True))
    assert set(counts) <= set(expected)
    statistic = sum((counts[key] - e) ** 2 / e for key, e in expected.items())
    freedom = len(expected) - 1
    assert abs(statistic - freedom) < 5 * np.sqrt(2 * freedom)


def test_autoaugment_is_its_plan_and_translates_further() -> None:
    """Operations that do not fire are left out, and level 9 translates by 225 pixels, not 90."""
    augment, images = AutoAugment(), batch(300, 240, 20)
    plan = augment.plan(5, 6, range(300), (240, 20))
    found = augment(images, seed=5, step=6)
    translated = 0
    for i in range(300):
        one = images[i : i + 1]
        for op, level, sign in zip(plan.op[:, i], plan.level[:, i], plan.sign[:, i], strict=True):
            if op >= 0:
                translated += OPERATIONS[op] == "TranslateY"
                factor = 2.5 if OPERATIONS[op] == "TranslateY" else 1.0
                one = apply_op(OPERATIONS[op], one, float(level) * factor, int(sign))
        assert torch.equal(found[i : i + 1], one)
    assert translated


def test_autoaugment_and_randaugment_share_no_draws() -> None:
    """Both may be used at once: their signs do not agree more often than by chance."""
    rand, auto = (a.plan(0, 0, range(5000), 32).sign for a in (RandAugment(4), AutoAugment()))
    for r in rand:
        for a in auto:
            assert abs((r == a).mean() - 0.5) < 5 * 0.5 / np.sqrt(5000)


# ---- mistakes

WRONG: list[tuple[Callable[[], Any], str]] = [
    (lambda: apply_op("Rotat", batch(1), 5), "unknown operation 'Rotat'; did you mean 'Rotate'"),
    (lambda: apply_op("translatex", batch(1), 5), "did you mean 'TranslateX'"),
    (lambda: apply_op("", batch(1), 5), "there are AutoContrast, Equalize, .*, SolarizeAdd"),
    (lambda: apply_op("Rotate", batch(1), -1), "a level must be finite and at least 0, not -1"),
    (lambda: apply_op("Rotate", batch(1), float("nan")), "a level must be finite"),
    (lambda: apply_op("Rotate", batch(1), 5, 0), "a sign must be 1 or -1, not 0"),
    (lambda: apply_op("Rotate", batch(1).float(), 5), r"images must be uint8 \(N, 3, H, W\), not torch.float32"),
    (lambda: apply_op("Rotate", batch(1)[0], 5), "images must be uint8"),
    (lambda: apply_op("Rotate", batch(1).permute(0, 2, 3, 1), 5), "images must be uint8"),
    (lambda: RandAugment()(batch(1)[:, :1]), "images must be uint8"),
    (lambda: AutoAugment()(batch(1)[:, :1]), "images must be uint8"),
    (lambda: RandAugment()(batch(3), RandAugment().plan(0, 0, range(4), 9)), "the plan is for 4 images, not 3"),
    (lambda: RandAugment(-1), "layers must be at least 0, not -1"),
    (lambda: RandAugment(2, -1), "magnitude must be finite and at least 0, not -1"),
    (lambda: RandAugment(2, float("nan")), "magnitude must be finite"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_what_does_not_fit_is_an_error(call: Callable[[], Any], message: str) -> None:
    """Each mistake is a ValueError that says what was expected."""
    with pytest.raises(ValueError, match=message):
        call()


def test_settings_do_not_change() -> None:
    """RandAugment is frozen and compares by its settings."""
    assert RandAugment(4, 10) == RandAugment()
    with pytest.raises(FrozenInstanceError):
        RandAugment().layers = 2  # type: ignore[misc]


# ---- accelerators


def on_cuda(run: Callable[[], Tensor]) -> Tensor:
    """The result of the second run, in which waiting for the device is an error; the first one loads kernels."""
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        return run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_operations_on_the_gpu_give_the_same_bits(name: str) -> None:
    """CUDA equals the processor on every pixel, and nothing waits for the device."""
    images = batch(32, 50, 70)
    there = images.cuda()
    for level in (1, 9, 10, 15):
        for sign in (1, -1):
            expected = apply_op(name, images, level, sign)
            assert torch.equal(on_cuda(lambda: apply_op(name, there, level, sign)).cpu(), expected)  # noqa: B023


@pytest.mark.gpu
@pytest.mark.parametrize("augment", BOTH)
@pytest.mark.parametrize("last", [True, False])
def test_the_gpu_gives_the_same_bits_and_is_not_waited_for(augment: Augment, last: bool) -> None:
    """CUDA equals the processor bit for bit and keeps the memory format."""
    images = batch(128, 64, 48, last)
    there = images.cuda()
    found = on_cuda(lambda: augment(there, seed=3, step=1))
    assert found.stride() == there.stride()
    assert torch.equal(found.cpu(), augment(images, seed=3, step=1))
