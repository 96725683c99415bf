"""The end of a run: the best weights scored once more as every later command does it, the summary, the report."""

from __future__ import annotations

from typing import Any

import torch

from normfree.config import flat, from_dict, printable
from normfree.data.crop import Preprocessing
from normfree.data.decode import EXTENSIONS
from normfree.evaluate import infer, score
from normfree.files import write_atomic, write_json
from normfree.models.weights import load_model
from normfree.report import Findings, write_report
from normfree.runlog import duration, percent
from normfree.train.build import first_images
from normfree.train.job import Job, State


def finish(job: Job, state: State) -> dict[str, Any]:
    """Write summary.json, bad_images.txt, the pictures and report.html; returns the summary."""
    model, about = load_model(job.folder.weights)
    preprocessing = from_dict(Preprocessing, about["preprocessing"])
    device = job.run.train.device
    outputs = infer(model.to(device), job.val, preprocessing, about["eval_batch_size"], job.loading)
    ignored = _ignored(job)
    bad = ignored | state.bad | state.bad_val
    summary: dict[str, Any] = {
        **score(outputs, job.run.optim.loss).as_dict(),
        "epochs": state.step * job.run.train.batch_size / len(job.train),
        "steps": state.step,
        "wall_seconds": round(state.seconds, 3),
        "images_per_second": round(state.step * job.run.train.batch_size / state.seconds, 3),
        "model": job.run.model.name,
        "params": sum(p.numel() for p in model.parameters()),
        "train_images": len(job.train),
        "classes": len(job.train.classes),
        "bad_images": len(state.bad) + len(state.bad_val),
        "ignored_files": len(ignored),
        "best": state.best_is,
        "last": state.last,
        "torch": torch.__version__,
    }
    write_json(job.folder.summary, summary)
    lines = "".join(f"{printable(name)}\t{reason}\n" for name, reason in bad.items())
    write_atomic(job.folder.bad_images, lines.encode())
    why = job.folder.read_reasons()
    findings = Findings(
        title=f"{job.run.model.name} on {job.run.data.root}: {percent(summary['top1'])}",
        facts=_facts(summary, device),
        settings=[(n, str(v), why.get(n, "")) for n, v in flat(job.run).items()],
        metrics=job.folder.read_metrics(),
        outputs=outputs,
        val=job.val,
        training=first_images(job.run, job.train, 32),
        preprocessing=preprocessing,
        bad=bad,
    )
    write_report(job.folder.path, job.folder.report, findings)
    return summary


def _ignored(job: Job) -> dict[str, str]:
    """Files that lie among the images and are not used."""
    reason = f"not an image by its name ({', '.join(EXTENSIONS)}), or without a label"
    return {name: reason for source in (job.train, job.val) for name in source.ignored}


def _facts(summary: dict[str, Any], device: str) -> list[tuple[str, str]]:
    return [
        ("top-1", f"{percent(summary['top1'])} of {summary['images']} held-out images ({summary['best']})"),
        ("top-5", percent(summary["top5"])),
        ("loss", f"{summary['loss']:.4f}"),
        ("network", f"{summary['model']}, {summary['params']:,} parameters"),
        ("training", f"{summary['train_images']} images of {summary['classes']} classes, {summary['epochs']:g} epochs"),
        ("time", f"{duration(summary['wall_seconds'])}, {summary['images_per_second']:.0f} images/s on {device}"),
    ]
