"""How fast and how large: steps, optimizers, inference, input and memory, in turns with timm's where that is."""

from __future__ import annotations

import gc
import importlib.util
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from normfree.bench import growth, inference, input, latency, memory, optimizer, startup  # noqa: A004
from normfree.bench.peak import measure_peak
from normfree.bench.steps import SAM, TIMM, Task, step
from normfree.bench.timing import Work, ratio, spread, take_turns
from normfree.data.augment import Augment
from normfree.data.mix import MixUpCutMix
from normfree.data.randaugment import RandAugment
from normfree.data.sources import open_folder
from normfree.models import model_config
from normfree.models.count import parameters
from on_gpu.common import Part, Setup, timm_or_none


def environment(setup: Setup) -> dict[str, Any]:
    """The device, and what it can do at most."""
    found: dict[str, Any] = {"rivals": timm_or_none() is not None, "triton": bool(importlib.util.find_spec("triton"))}
    if setup.on_cuda:
        about = torch.cuda.get_device_properties(setup.where)
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
        found |= {
            "memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "capability": f"{about.major}.{about.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver, clock, power": driver,
        }
    seconds = setup.pick(0.2, 0.001)
    for precision in setup.pick(("fp32", "bf16", "fp16"), ()):
        found[f"multiply-adds/s, {precision}"] = measure_peak(setup.where, precision, seconds)
    return found | {"copied bytes/s": bandwidth(setup)}


def bandwidth(setup: Setup) -> float:
    """Bytes read and written by a copy, a second: the best of 20."""
    a = torch.zeros(setup.pick(2**30, 2**20), dtype=torch.uint8, device=setup.where)
    b = torch.empty_like(a)
    seconds = take_turns({"": lambda: b.copy_(a)}, setup.pick(20, 2), setup.where)[""]
    return 2 * a.numel() / min(seconds)


def table(seconds: Mapping[str, list[float]], images: int | None = None) -> dict[str, Any]:
    """A row for each; ratios are to the first, round by round."""
    first = next(iter(seconds.values()))
    rows = []
    for name, found in seconds.items():
        row: dict[str, Any] = {"name": name, "seconds": spread(found), "to_first": ratio(found, first)}
        rows.append(row | ({"images_per_second": images / row["seconds"]["median"]} if images else {}))
    return {"n": len(first), "rows": rows}


def update(setup: Setup) -> dict[str, Any]:
    """Clipping, update and average alone, beside timm's and beside the time that the bytes take."""
    found: dict[str, Any] = {"copied bytes/s": bandwidth(setup)}
    for name in setup.pick(("nfnet_f0", "nfnet_f5"), ("nfnet_tiny",)):
        works = optimizer.works(name, setup.device, rivals=timm_or_none() is not None)
        result = table(take_turns(works, setup.pick(50, 2), setup.where, warmup=5))
        # norms read w and g; the update reads w, g and v and writes w and v; the average reads w and e and writes e
        moved = (2 + 5 + 3) * 4 * parameters(model_config(name))
        floor = moved / found["copied bytes/s"]
        ours = result["rows"][0]["seconds"]["median"]
        found[name] = {**result, "bytes": moved, "floor_seconds": floor, "ours_to_floor": ours / floor}
        free()
    return found


def steps(setup: Setup, precision: str, compiled: bool) -> dict[str, Any]:
    """A whole step of F0, ours and timm's (AGC, SGD as it comes or fused, average), in turns."""
    size, n = setup.pick((192, 32), (32, 2))
    task = Task(setup.pick("nfnet_f0", "nfnet_tiny"), size, n, precision, setup.device, compiled=compiled)
    works: dict[str, Work] = {task.model: step(task)}
    if timm_or_none() is not None:
        rival = replace(task, model=rival_of_f0(setup))
        works[rival.model] = step(rival)
        if not compiled:
            works[f"{rival.model}, fused SGD"] = step(replace(rival, fused=True))
    seconds = take_turns(works, setup.pick(50, 2), setup.where, warmup=setup.pick(5, 1))
    return {"size": size, "batch": n, "precision": precision, "compiled": compiled, **table(seconds, n)}


def rival_of_f0(setup: Setup) -> str:
    """The network of the same name in timm, which it trains with its own clipping and average."""
    return TIMM + setup.pick("dm_nfnet_f0", "resnet10t")


def large(setup: Setup, tasks: Sequence[tuple[str, int]], remat: str = "none") -> dict[str, Any]:
    """Networks that are too large to be in memory together: each alone, all in turn and all again (A B A B)."""
    n, precision = setup.pick(32, 2), setup.pick("bf16", "fp32")
    wanted = setup.pick(tasks, [("nfnet_tiny", 32), (rival_of_f0(setup), 32)])
    rivals = timm_or_none() is not None
    chosen = [
        Task(name, size, n, precision, setup.device, remat=remat)
        for name, size in wanted
        if rivals or not name.startswith(TIMM)
    ]
    found = latency.apart(chosen, setup.pick(20, 2), setup.pick(3, 1))
    peak = measure_peak(setup.where, precision) if setup.on_cuda else 1.0
    return {"precision": precision, "n": len(found[0].seconds), "rows": latency.rows(found, peak)}


def infer(setup: Setup, compiled: bool) -> dict[str, Any]:
    """A forward pass in bfloat16 of 1, 32 and 256 images: made ready, as it is, and timm's."""
    name, size = setup.pick(("nfnet_f0", 256), ("nfnet_tiny", 32))
    found: dict[str, Any] = {"size": size, "precision": "bf16", "compiled": compiled}
    for n in setup.pick((1, 32, 256), (2,)):
        task = Task(name, size, n, "bf16", setup.device, compiled)
        works = {f"{name}, ready": inference.forward(task)}
        if not compiled:
            works[name] = inference.forward(task, ready=False)
        if timm_or_none() is not None:
            works["timm"] = inference.forward(replace(task, model=rival_of_f0(setup)))
        found[f"{n} images"] = table(take_turns(works, setup.pick(50, 2), setup.where, warmup=setup.pick(5, 1)), n)
        del works
        torch.compiler.reset()
        free()
    return found


def memories(setup: Setup) -> dict[str, Any]:
    """The most memory of a step by network, images, precision and remat, beside what a dry run says."""
    real = [
        Task("nfnet_f0", 192, n, p, setup.device, remat=r)
        for n, p, r in ((32, "fp32", "none"), (32, "bf16", "none"), (128, "bf16", "none"), (32, "bf16", "block"))
    ]
    real += [Task(m, s, 32, "bf16", setup.device) for m, s in (("nfnet_f1", 224), ("nfnet_f3", 320))]
    real += [Task(m, 224, 32, "bf16", setup.device) for m in ("nf_resnet50", "nf_regnet_b0")]
    real += [Task("nfnet_f0", 192, 128, "bf16", setup.device, micro_batch=32)]
    real += [Task(f"nfnet_f0{SAM}", 192, 32, "bf16", setup.device)]
    real += [Task(f"{TIMM}dm_nfnet_f0", 192, 32, "bf16", setup.device)] if timm_or_none() is not None else []
    rows = []
    for task in setup.pick(real, [Task("nfnet_tiny", 32, 4, device=setup.device)]):
        try:
            before, most = memory.measure(task)
        except (MemoryError, RuntimeError) as e:
            before, most = 0, None
            print(f"{task}: {e}")
        estimate = memory.estimate(task)
        row: dict[str, Any] = {key: getattr(task, key) for key in ("model", "size", "batch", "precision", "remat")}
        share = (most - before) / estimate if estimate and most else None
        rows.append({**row, "micro_batch": task.micro_batch, "peak": most, "baseline": before, "estimate": estimate})
        rows[-1]["to_estimate"] = share
        free()
    return {"rows": rows}


# kinds of work by the beginning of torch's name for an operation; the first that fits
KINDS = {
    "convolutions, backward": ("aten::convolution_backward", "aten::cudnn_convolution_b", "aten::_slow_conv2d_b"),
    "convolutions, forward": ("aten::cudnn_convolution", "aten::mkldnn_convolution", "aten::_conv", "aten::conv"),
    "activations": ("aten::gelu", "aten::silu", "aten::relu", "aten::threshold", "aten::tanh", "aten::sigmoid"),
    "standardisation": ("aten::var", "aten::native_batch_norm", "aten::std", "aten::rsqrt"),
    "linear layers": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear"),
    "update, norms and average": ("aten::_foreach", "aten::_fused", "aten::linalg_vector_norm", "aten::lerp"),
    "casts and copies": ("aten::copy_", "aten::to", "aten::_to_copy", "aten::clone", "aten::contiguous"),
    "sums": ("aten::sum", "aten::mean", "aten::add", "aten::addcmul"),
    "products": ("aten::mul", "aten::div", "aten::sub", "aten::neg", "aten::where"),
    "pooling and padding": ("aten::avg_pool", "aten::max_pool", "aten::constant_pad", "aten::pad"),
    "filling": ("aten::fill_", "aten::zero", "aten::ones"),
}


def profiled(setup: Setup) -> dict[str, Any]:
    """Where the time of a step goes, by kind of operation: milliseconds a step of the device."""
    size, n = setup.pick((192, 32), (32, 2))
    found: dict[str, Any] = {"size": size, "batch": n, "steps": (count := setup.pick(5, 1))}
    for precision in ("fp32", "bf16"):
        work = step(Task(setup.pick("nfnet_f0", "nfnet_tiny"), size, n, precision, setup.device))
        for _ in range(3):
            work()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if setup.on_cuda else [])]
        with profile(activities=activities) as record:
            for _ in range(count):
                work()
            if setup.on_cuda:
                torch.cuda.synchronize()
        found[precision] = by_kind(record.key_averages(), "device" if setup.on_cuda else "cpu", count)
    return found


def by_kind(events: Any, where: str, count: int) -> dict[str, Any]:
    """Milliseconds a step and shares of each kind, and the longest operations and kernels.

    An operation of torch's has the time of the kernels that it starts. Kernels are listed beside the operations, and
    their sum is all there is: the rest is of kernels that no operation of torch's started, or none of these kinds.
    """
    kernels: dict[str, float] = {}
    operations: dict[str, float] = {}
    for e in events:
        if e.key.startswith("Optimizer.") or getattr(e, "is_user_annotation", False):
            continue  # a span around others
        ms = getattr(e, f"self_{where}_time_total") / 1000 / count
        (kernels if e.device_type == DeviceType.CUDA else operations)[e.key] = ms
    total = sum((kernels or operations).values())
    kinds, rest = dict.fromkeys(KINDS, 0.0), {}
    for key, ms in operations.items():
        kind = next((k for k, starts in KINDS.items() if key.startswith(starts)), None)
        if kind is None:
            rest[key] = ms
        else:
            kinds[kind] += ms
    kinds["the rest"] = total - sum(kinds.values())
    return {
        "milliseconds": total,
        "kinds": {k: {"ms": round(ms, 3), "share": round(ms / total, 4)} for k, ms in kinds.items()},
        "longest of the rest": longest(rest, 8),
        "longest operations": longest(operations, 12),
        "longest kernels": longest(kernels, 12),
    }


def longest(milliseconds: Mapping[str, float], n: int) -> dict[str, float]:
    return {key[:100]: round(ms, 3) for key, ms in sorted(milliseconds.items(), key=lambda item: -item[1])[:n]}


def augment(setup: Setup) -> dict[str, Any]:
    """Mixing and RandAugment on the device: images a second, and milliseconds of a step's batch."""
    size, n = setup.pick((192, 256), (32, 4))
    images = torch.randint(256, (2 * n, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2).to(setup.where)
    cases = {
        "MixUp and CutMix": Augment(MixUpCutMix()),
        "RandAugment": Augment(None, RandAugment(4, 10)),
        "all": Augment(MixUpCutMix(), RandAugment(4, 10)),
    }
    works: dict[str, Work] = {name: augmenting(case, images[: n * case.reads]) for name, case in cases.items()}
    return {"size": size, "batch": n, **table(take_turns(works, setup.pick(20, 2), setup.where), n)}


def augmenting(case: Augment, images: Tensor) -> Work:
    labels = torch.arange(len(images), device=images.device) % 1000
    return lambda: case(images, labels, 1000, 0, 1)


def reading(setup: Setup) -> dict[str, Any]:
    """Images a second from JPEG files to batches on the device."""
    with tempfile.TemporaryDirectory() as scratch:
        size = input.write_photographs(Path(scratch), setup.pick(64, 4))
        source = open_folder(Path(scratch))
        what = input.Reading(source, setup.pick(192, 32), setup.pick(32, 2), setup.pick(32, 1), setup.device)
        works = input.pipelines(what, setup.pick((1, 4, 14), ()), timm_or_none() is not None)
        seconds = input.take_turns(works, setup.pick(3, 1))
    rows = [{"name": name, "images_per_second": spread([1 / s for s in found])} for name, found in seconds.items()]
    return {"mean_file_bytes": round(size), "n": setup.pick(3, 1), "rows": rows}


def grows(setup: Setup) -> dict[str, Any]:
    """Lines through the time of a step over images and pixels, and of the optimizer over parameters."""
    task = Task(setup.pick("nfnet_f0", "nfnet_tiny"), *setup.pick((192, 32, "bf16"), (32, 2, "fp32")), setup.device)
    batches, sizes = setup.pick(((16, 32, 64, 128), (128, 160, 192, 224, 256)), ((1, 2, 3), (24, 32, 40)))
    models = setup.pick(
        ("nfnet_tiny", "nf_resnet50", "nfnet_f0", "nfnet_f1", "nfnet_f2"), ("nfnet_tiny", "nfnet_small", "nf_regnet_b0")
    )
    rounds = setup.pick(10, 1)
    found = [growth.step_by_images(task, batches, rounds)]
    free()
    found.append(growth.step_by_pixels(task, sizes, rounds))
    free()
    found.append(growth.optimizer_by_parameters(models, setup.device, rounds))
    return {"n": rounds, "rows": [g.record() for g in found]}


def starts(setup: Setup) -> dict[str, Any]:
    """Seconds until Python has imported, and until the command line answers."""
    if setup.dry:
        return {"skipped": "a dry run"}
    return table(take_turns(startup.works(), 5, torch.device("cpu"), warmup=1))


def free() -> None:
    """Give back what is not used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


F1_B7 = (("nfnet_f1", 224), (f"{TIMM}efficientnet_b7", 600), (f"{TIMM}dm_nfnet_f1", 224))
F5 = (("nfnet_f5", 416), (f"{TIMM}dm_nfnet_f5", 416))

PARTS: dict[str, Part] = {
    "environment": Part(environment, 15, "the device, and what it can do at most"),
    "optimizer": Part(update, 25, "clipping, update and average beside timm's and the bytes"),
    "steps-bf16": Part(lambda s: steps(s, "bf16", False), 40, "F0, bfloat16, beside timm's"),
    "steps-fp32": Part(lambda s: steps(s, "fp32", False), 60, "F0, float32, beside timm's"),
    "steps-bf16-compiled": Part(lambda s: steps(s, "bf16", True), 240, "the same, compiled"),
    "steps-fp32-compiled": Part(lambda s: steps(s, "fp32", True), 240, "the same, compiled"),
    "f1-b7": Part(lambda s: large(s, F1_B7), 120, "F1 beside EfficientNet-B7, each at its own size"),
    "f5": Part(lambda s: large(s, F5), 150, "F5, 416 px, 32 images"),
    "inference": Part(lambda s: infer(s, False), 60, "a forward pass of 1, 32, 256 images beside timm's"),
    "inference-compiled": Part(lambda s: infer(s, True), 240, "the same, compiled"),
    "memory": Part(memories, 90, "the most memory of a step beside what a dry run says"),
    "profile": Part(profiled, 30, "where the time of a step goes"),
    "augment": Part(augment, 15, "mixing and RandAugment, images a second"),
    "input": Part(reading, 60, "from files to batches on the device"),
    "growth": Part(grows, 90, "lines through time over images, pixels and parameters"),
    "startup": Part(starts, 60, "imports and the command line's help"),
}
