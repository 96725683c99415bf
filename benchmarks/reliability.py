"""Breaks runs in every way that tests/faults.py knows, goes on with them, and counts which end as if nothing had been.

python benchmarks/reliability.py                      what is not in the results yet, about 10 minutes on 2 cores
python benchmarks/reliability.py --parts kills soak   these, again
python benchmarks/reliability.py --quick              a few cases of each, written nowhere

Writes benchmarks/results/reliability.json, part by part, each with its conditions.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that bits are comparable whatever the number of processes

import numpy as np  # noqa: E402
import plain_step  # noqa: E402
import torch  # noqa: E402

import quick_runs as q  # noqa: E402
from faults import recorded  # noqa: E402
from normfree.bench.timing import conditions, spread, take_turns  # noqa: E402

Found = dict[str, Any]


def _recording(name: str) -> tuple[str, str]:
    return f"step:every:record={name}.draws", f"forward:every:record={name}.draws"


def _show(home: Path, what: object) -> None:
    """What the processes said last. It names folders of this machine, so that results do not keep it."""
    print(f"{what}: {q.said(home)[-1000:]}", file=sys.stderr, flush=True)


def _remove(home: Path, name: str) -> None:
    shutil.rmtree(home / name, ignore_errors=True)
    for path in (*home.glob(f"{name}.draws.*"), *home.glob("said.*")):
        path.unlink()


def _compare(home: Path, settings: Sequence[str], faulty: Sequence[str], world: Sequence[int] = (1,)) -> Found:
    """A broken run against the one in home/whole, which has not been: what differs, and whether the draws do."""
    codes = q.interrupted(home, "cut", settings, faulty, *_recording("cut"), worlds=world)
    ended = set(codes[-1]) == {0}
    differ = q.differences(home / "whole", home / "cut") if ended else ["it did not end"]
    if not ended:
        _show(home, faulty)
    draws = recorded(home / "whole.draws") == recorded(home / "cut.draws")
    _remove(home, "cut")
    return {"codes": codes, "differ": differ[:5], "draws_equal": draws}


def _counted(rows: dict[str, Found]) -> Found:
    """How many of the rows are as they should be, and those that are not."""
    bad = {name: row for name, row in rows.items() if row["differ"] or not row["draws_equal"]}
    return {"combinations": len(rows), "equal": len(rows) - len(bad), "not_equal": bad, "names": list(rows)}


def resumes(home: Path, quick: bool) -> Found:
    """One process: each situation stopped in each way. And what must be noticed when it goes wrong on purpose."""
    rows = {}
    for situation, settings in list(q.SITUATIONS.items())[: 2 if quick else None]:
        q.interrupted(home, "whole", settings, [], *_recording("whole"))
        for stop, faulty in q.STOPS.items():
            rows[f"{situation}, {stop}"] = _compare(home, settings, faulty)
        _remove(home, "whole")
    q.interrupted(home, "whole", (), [], *_recording("whole"))
    controls = {}
    for control, fault in q.CONTROLS.items():
        codes = q.interrupted(home, "cut", (), ["averaged:12:term", f"{fault} {q.END}"])
        controls[control] = codes[:2] == [[143], [0]] and q.differences(home / "whole", home / "cut") != []
        _remove(home, "cut")
    _remove(home, "whole")
    return _counted(rows) | {"noticed": controls}


def worlds(home: Path, quick: bool) -> Found:
    """1, 2, 3 and 4 processes on the same batches, without a fixed tree of sums: how far they are from one."""
    rows, alone = {}, None
    for world in (1, 2) if quick else (1, 2, 3, 4):
        q.interrupted(home, "run", ("--train.epochs", "12"), [], *_recording("run"), worlds=(world,))
        lines, draws = q.metrics(home / "run"), recorded(home / "run.draws")
        if alone is None:
            alone = lines, draws
        rows[world] = _distance(alone[0], lines) | {"draws_equal": draws == alone[1]}
        _remove(home, "run")
    return {"by_processes": rows}


def _distance(a: list[Found], b: list[Found]) -> Found:
    steps = [(x, y) for x, y in zip(a, b, strict=True) if x["kind"] == "train"]
    ends = [(x, y) for x, y in zip(a, b, strict=True) if x["kind"] == "eval"]
    return {
        "steps": len(steps),
        "loss_relative": {
            f"to step {n}": max(abs(x["loss"] - y["loss"]) / abs(x["loss"]) for x, y in steps[:n])
            for n in (8, 24, 96)
            if n <= len(steps)
        },
        "clip_share": max(abs(x["clip_share"] - y["clip_share"]) for x, y in steps),
        "tensors_clipped_alike": sum(x["clipped"] == y["clipped"] for x, y in ends) / len(ends),
        "evaluations": len(ends),
        "evaluations_equal": sum(
            x[kind][k] == y[kind][k] for x, y in ends for kind in ("raw", "ema") for k in ("top1", "top5", "images")
        )
        / (6 * len(ends)),
        "evaluation_loss_relative": max(
            abs(x[k]["loss"] - y[k]["loss"]) / x[k]["loss"] for x, y in ends for k in ("raw", "ema")
        ),
    }


def shards(home: Path, quick: bool) -> Found:
    """With --train.shards 4 runs go from one number of processes to another, and stay equal to the bit."""
    rows = {}
    for situation in q.SHARDED[: 1 if quick else None]:
        settings = (*q.SITUATIONS[situation], "--train.shards", "4")
        q.interrupted(home, "whole", settings, [], *_recording("whole"))
        every = not rows and not quick  # of the first situation; of the others two and two
        for before, after in q.WORLDS if every else q.WORLDS[::3]:
            for stop, faulty in list(q.SHARDED_STOPS.items())[: None if every else 2]:
                name = f"{situation}, {stop}, {before} to {after}"
                rows[name] = _compare(home, settings, faulty, (before, after))
        _remove(home, "whole")
    return _counted(rows)


def kills(home: Path, quick: bool) -> Found:
    """Ended by kill -9 at each named instant, and twice at random ones, half of them with loader processes."""
    q.interrupted(home, "whole", (), [], *_recording("whole"))
    named = {i: _compare(home, (), [i]) for i in q.INSTANTS[: 4 if quick else None]}
    rng, at_random = np.random.default_rng(0), {}
    while len(at_random) < (2 if quick else 30):
        settings = ("--data.workers", "2") if len(at_random) % 2 else ()
        moments = sorted(rng.uniform(0.05, 1.3, 2).round(3).tolist())
        done = [_killed_after(home, settings, seconds) for seconds in moments]
        row = _compare(home, settings, [])
        if -signal.SIGKILL in done:
            at_random[f"{len(at_random)}: after {moments} s, {len(settings)} workers"] = row | {"killed": done}
    _remove(home, "whole")
    return {"named": _counted(named), "random": _counted(at_random)}


def _killed_after(home: Path, settings: Sequence[str], seconds: float) -> int | None:
    """A process of a run that gets so many seconds; its exit code."""
    process = q.start(q.train(home, "cut", *settings), home, [*_recording("cut"), q.END])
    process.join(seconds)
    process.kill()
    process.join()
    return process.exitcode


def failures(home: Path, quick: bool) -> Found:
    """What else can fail: how each start ends, what is said, and whether the weights are those of a whole run."""
    q.interrupted(home, "whole", (), [])
    rows = {}
    for name, failure in list(q.FAILURES.items())[: 3 if quick else None]:
        codes = q.interrupted(home, "cut", failure.settings, failure.faulty)
        same = codes[-1] == [0] and q.differences(home / "whole", home / "cut") == []
        as_stated = codes == [[c] for c in failure.codes] and failure.says in q.said(home) and same == failure.same
        rows[name] = {"codes": [c for (c,) in codes], "says": failure.says, "same": same, "as_stated": as_stated}
        if not as_stated:
            _show(home, name)
        _remove(home, "cut")
    _remove(home, "whole")
    return rows


def torchrun(home: Path, quick: bool) -> Found:
    """Two processes under torchrun: how it ends, and whether the weights are those of one process."""
    settings = ("--train.shards", "8")
    q.interrupted(home, "whole", settings, [])
    rows = {}
    for name, (restarts, fault, expected) in list(q.TORCHRUN.items())[: 1 if quick else None]:
        codes = [q.torchrun(q.train(home, "cut", *settings), home, fault, q.END, restarts=restarts)]
        if codes != [0]:
            codes.append(q.torchrun(q.train(home, "cut", *settings), home, q.END))
        same = codes[-1] == 0 and q.differences(home / "whole", home / "cut") == []
        rows[name] = {"codes": codes, "same": same, "as_stated": same and codes == list(expected)}
        if not rows[name]["as_stated"]:
            _show(home, name)
        _remove(home, "cut")
    return rows


def memory(home: Path, quick: bool) -> Found:
    """Memory runs out in one of several processes: how all end, who says it, and what is trained on from there."""
    rows = {}
    for name, shortage in list(q.SHORTAGES.items())[: 2 if quick else None]:
        q.interrupted(home, "whole", shortage.settings, [], *_recording("whole"), worlds=(shortage.world,))
        lines, draws = q.metrics(home / "whole"), recorded(home / "whole.draws")
        _remove(home, "whole")
        found = q.short_of_memory(home, "cut", shortage, *_recording("cut"))
        rows[name] = found | {"as_stated": found == shortage.expected}
        if found == shortage.expected:
            rows[name] |= _distance(lines, q.metrics(home / "cut"))
            rows[name]["draws_equal"] = recorded(home / "cut.draws") == draws
        else:
            _show(home, name)
        _remove(home, "cut")
    return rows


def soak(home: Path, quick: bool) -> Found:
    """Thousands of steps and hundreds of saves with two loader processes: memory; then kill -9 of the parent."""
    steps = 200 if quick else 2000
    settings = ("--train.epochs", str(2 * steps // q.EPOCH), "--data.workers", "2", "--train.log-every", "10")
    process = q.start(q.train(home, "soak", *settings), home)
    memory: list[tuple[int, float, float]] = []  # (step, MiB of the process, MiB of a child's own)
    while process.is_alive() and (not memory or memory[-1][0] < steps):
        time.sleep(0.25)
        children = [_memory(pid, "Private") for pid in _children(process.pid or 0)]
        own = _memory(process.pid or 0)
        memory.append((_step(home / "soak"), own / 2**20, max(children, default=0) / 2**20))
    workers = _children(process.pid or 0)
    process.kill()
    gone = _seconds_until_gone(workers)
    process.join()
    _remove(home, "soak")
    tenths = {}
    for tenth in range(1, 10):  # the first is the start
        part = [m for m in memory if tenth * steps // 10 <= m[0] < (tenth + 1) * steps // 10]
        tenths[f"from step {tenth * steps // 10}"] = {
            "MiB": round(statistics.median(m[1] for m in part), 1),
            "MiB_of_a_loader_process": round(statistics.median(m[2] for m in part), 1),
        }
    return {
        "steps": memory[-1][0],
        "saves": memory[-1][0] // q.EPOCH,
        "median_memory": tenths,
        "loader_processes_at_the_kill": len(workers),
        "seconds_until_they_are_gone": gone,
    }


def _children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def _memory(pid: int, kind: str = "Rss") -> int:
    """Bytes of a process: all ("Rss"), or those that it has for itself alone ("Private"); 0 if it has gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(kind))


def _step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def _seconds_until_gone(pids: list[int]) -> float | None:
    began = time.monotonic()
    while time.monotonic() - began < 30:
        if not any(_memory(pid) for pid in pids):
            return round(time.monotonic() - began, 2)
        time.sleep(0.02)
    return None


def overhead(_home: Path, quick: bool) -> Found:
    """A step of the trainer against the same step written plainly, without a check, a count or a flag; in turns."""
    found = {}
    for name, size, batch in (("nfnet_tiny", 32, 64), ("nfnet_small", 64, 32)):
        work = plain_step.plain_and_safe(name, size, batch)
        seconds = take_turns(work, 5 if quick else 40, torch.device("cpu"), warmup=3)
        share = spread([a / b - 1 for a, b in zip(seconds["safe"], seconds["plain"], strict=True)])
        milliseconds = {key: spread([1000 * s for s in values]) for key, values in seconds.items()}
        found[f"{name}, {batch} images of {size} px"] = {"share": share, "milliseconds": milliseconds}
    return found


def agreement(_home: Path, quick: bool) -> Found:
    """What two processes take to agree on a flag, as they do before each step: by itself, and behind steps."""
    found = {}
    for name, size, batch in (("nfnet_tiny", 32, 64), ("nfnet_tiny" if quick else "nfnet_f0", 96, 4)):
        seconds = plain_step.agreement(name, size, batch, 5 if quick else 40, q.environments(2))
        share = spread([a / b for a, b in zip(seconds["agree"], seconds["step"], strict=True)])
        milliseconds = {key: spread([1000 * s for s in values]) for key, values in seconds.items()}
        found[f"{name}, {batch} images of {size} px"] = {"share": share, "milliseconds": milliseconds}
    return found


def save(_home: Path, quick: bool) -> Found:
    """Seconds to save all of F0 (tiny if quick) on the disk of temporary files, and to resume from it.

    held: of them, those that a training thread waits where the rest is done in the background.
    """
    from normfree.train.checkpoint import load_checkpoint, save_checkpoint
    from normfree.train.saving import Saver, copies

    learner = plain_step.learner("nfnet_tiny" if quick else "nfnet_f0", 64, 8)
    for p in learner.model.parameters():
        learner.optimizer.momentum(p)  # type: ignore[attr-defined]
    seconds: dict[str, list[float]] = {"save": [], "held": [], "in the background": [], "load": []}

    def note(what: str, began: float) -> None:
        seconds[what].append(round(time.perf_counter() - began, 2))

    with tempfile.TemporaryDirectory() as name, Saver(Path(name)) as saver:
        for step in range(1, 13, 2):  # from the third on two are there already, one of which is removed
            began = time.perf_counter()
            path = save_checkpoint(Path(name), step, learner.tensors(), {})
            note("save", began)
            began = time.perf_counter()
            saver.begin(step + 1, copies(learner.tensors()), {})
            note("held", began)
            saver.wait()
            note("in the background", began)
            began = time.perf_counter()
            learner.load_tensors(load_checkpoint(Path(name)).tensors, step)
            note("load", began)
            size = sum(f.stat().st_size for f in path.iterdir())
    medians = {what: statistics.median(times[1:]) for what, times in seconds.items()}  # the first finds memory cold
    return {"seconds": seconds, "medians_of_5": medians, "MB": round(size / 1e6, 1)}


PARTS: dict[str, Callable[[Path, bool], Found]] = {
    "resumes": resumes,
    "worlds": worlds,
    "shards": shards,
    "kills": kills,
    "failures": failures,
    "torchrun": torchrun,
    "memory": memory,
    "soak": soak,
    "overhead": overhead,
    "agreement": agreement,
    "save": save,
}


def measure(part: str, quick: bool) -> Found:
    """One part, in a folder in memory where there is one: hundreds of saves are synced."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        q.make_images(Path(name) / "images")
        began = time.monotonic()
        found = PARTS[part](Path(name), quick)
    return {"seconds": round(time.monotonic() - began), **conditions(torch.device("cpu")), "found": found}


def main() -> None:
    """Measure what is asked for, or what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reliability.json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for part in args.parts or [p for p in PARTS if args.quick or p not in results]:
        results[part] = measure(part, args.quick)
        print(part, json.dumps(results[part]["found"], indent=1), flush=True)
        if not args.quick:
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
