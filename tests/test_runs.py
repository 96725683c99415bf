"""Whole runs, as a user starts them: real images, real processes, files opened afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from conftest import Command, make_folder, run_command
from image_sets import samples
from normfree.cli import main
from normfree.data.sources import open_data
from test_tables import forms

# a run of seconds: 20 images, 16 for training, 4 steps an epoch
TINY = ["--train.batch-size", "4", "--train.log-every", "1", "--train.device", "cpu"]


def train_tiny(folder: Path, images: Path, name: str, *more: str) -> Path:
    """A finished run on a folder."""
    done = run_command(
        "train", "--data.root", images, "--run-dir", name, "--train.epochs", "3", *TINY, *more, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    return folder / name


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three epochs on two classes."""
    home = tmp_path_factory.mktemp("finished")
    return train_tiny(home, make_folder(home / "images"), "run")


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_folder_has_what_it_promises(finished: Path) -> None:
    """config, metrics, summary, weights with classes and preprocessing, checkpoints, pictures, report."""
    summary = read_json(finished / "summary.json")
    for key in ("top1", "top5", "loss", "epochs", "wall_seconds", "images_per_second", "model", "params"):
        assert key in summary
    assert summary["epochs"] == 3
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 13))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 8, 12]
    assert all(0 <= line["clip_share"] <= 1 for line in lines if line["kind"] == "train")
    with safe_open(finished / "best.safetensors", "pt") as f:
        about = json.loads(f.metadata()["normfree"])
    assert about["classes"] == ["dark", "light"]
    assert about["preprocessing"]["size"] == 32
    assert len(list((finished / "checkpoints").glob("step-*"))) == 2
    report = (finished / "report.html").read_text()
    assert report.count("data:image/png;base64,") == 5
    assert "http" not in report.replace("http-equiv", "")
    for name in ("curves", "confusion", "batch", "mistakes"):
        assert (finished / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    held_out = read_json(finished / "validation.json")
    assert len(held_out) == 4
    assert sum(name.startswith("dark") for name in held_out) == 2


def test_evaluate_repeats_the_summary_exactly(finished: Path, command: Command) -> None:
    """To the last bit, from the run folder; and from the weights alone with the images named."""
    summary = read_json(finished / "summary.json")
    scores = json.loads(command("evaluate", finished, "--json").stdout)
    assert scores == {k: summary[k] for k in ("top1", "top5", "loss", "images")}
    every = json.loads(
        command(
            "evaluate", summary["model"], "--weights", finished / "best.safetensors",
            "--data.root", finished.parent / "images", "--json",
        ).stdout
    )  # fmt: skip
    assert every["images"] == 20


def test_predict_reproduces_the_accuracy_exactly(finished: Path, command: Command, tmp_path: Path) -> None:
    """Over the held-out files, laid out as a validation folder."""
    for name in read_json(finished / "validation.json"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(finished.parent / "images" / name, tmp_path / "val" / name)
    rows = json.loads(command("predict", finished, "val", "--json").stdout)
    right = sum(row["label"] == Path(row["path"]).parent.name for row in rows)
    assert right / len(rows) == read_json(finished / "summary.json")["top1"]
    assert all(abs(sum(t["probability"] for t in row["top5"]) - 1) < 1e-9 for row in rows)
    assert all(row["top5"][0] == {"label": row["label"], "probability": row["probability"]} for row in rows)
    table = command("predict", finished, "val").stdout
    assert all(row["path"] in table for row in rows)


def _start(folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "normfree", *map(str, arguments)],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        metrics = run / "metrics.jsonl"
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"step {step} was not reached: {process.communicate()}")


def _same(a: Path, b: Path) -> None:
    """Two finished runs have the same weights, average, momentum and metrics, to the last bit."""
    newest = [sorted((run / "checkpoints").glob("step-*"))[-1] for run in (a, b)]
    assert newest[0].name == newest[1].name
    ours, theirs = (load_file(path / "state.safetensors") for path in newest)
    assert ours.keys() == theirs.keys()
    assert {name.split(".")[0] for name in ours} == {"model", "ema", "momentum_buffer"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert all(
        torch.equal(t, load_file(b / "best.safetensors")[n]) for n, t in load_file(a / "best.safetensors").items()
    )
    clock = ("images_per_second", "seconds", "wait_share")
    lines = [
        [{k: v for k, v in json.loads(line).items() if k not in clock} for line in text.splitlines()]
        for text in ((run / "metrics.jsonl").read_text() for run in (a, b))
    ]
    assert lines[0] == lines[1]


STOPPED = ["train", "--train.epochs", "4", *TINY, "--data.workers", "1"]
STOPPED += ["--model.drop-rate", "0.3", "--model.stochastic-depth", "0.3"]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four epochs with workers and masks, beside its images."""
    home = tmp_path_factory.mktemp("unbroken")
    images = make_folder(home / "images", per_class=40)
    done = run_command(*STOPPED, "--data.root", images, "--run-dir", "run", cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "run"


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGKILL, -9)],
)
def test_a_stopped_and_resumed_run_ends_bit_identical(unbroken: Path, tmp_path: Path, number: int, code: int) -> None:
    """Stopped twice, by an interrupt, a request or a kill, with workers and masks, against one never stopped."""
    begin = [*STOPPED, "--data.root", str(unbroken.parent / "images"), "--run-dir", "cut"]
    for step, command in ((9, begin), (37, ["train", "--run-dir", "cut", "--resume"])):
        process = _start(tmp_path, *command)
        _wait_for_step(tmp_path / "cut", step, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        assert number == signal.SIGKILL or "Traceback" not in err  # a killed process takes its workers by surprise
        assert number == signal.SIGKILL or "--resume" in out
    done = run_command("train", "--run-dir", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    _same(unbroken, tmp_path / "cut")


def test_the_number_of_workers_changes_nothing(finished: Path, tmp_path: Path) -> None:
    """Weights and metrics are bit-equal with 0 and 2 workers; with another seed they are not."""
    images = finished.parent / "images"
    assert read_json(finished / "config.json")["data"]["workers"] == 0
    _same(finished, train_tiny(tmp_path, images, "run2", "--data.workers", "2"))
    other = train_tiny(tmp_path, images, "other", "--train.seed", "1")
    with pytest.raises(AssertionError):
        _same(finished, other)


def test_a_broken_newest_checkpoint_is_passed_over(finished: Path, tmp_path: Path) -> None:
    """The run goes on from the one before, says which and why, and ends as it would have."""
    cut = shutil.copytree(finished, tmp_path / "cut")
    newest = sorted((cut / "checkpoints").glob("step-*"))[-1] / "state.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = run_command("train", "--run-dir", "cut", "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "step-00000012: state.safetensors does not have its checksum" in done.stdout
    assert "at step 8" in done.stdout
    _same(finished, cut)


def test_resuming_on_other_images_is_refused(tmp_path: Path) -> None:
    """A file that came or went since would change the order of all samples."""
    images = make_folder(tmp_path / "images")
    train_tiny(tmp_path, images, "run")
    (images / "dark/000.jpg").rename(images / "dark/new.jpg")
    done = run_command("train", "--run-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 1
    assert "are not those" in done.stderr


def test_bad_images_are_skipped_counted_and_named(tmp_path: Path) -> None:
    """A truncated file, an empty one and a text file with an image's name, in training and validation."""
    images = make_folder(tmp_path / "images", per_class=60)
    whole = (images / "dark/000.jpg").read_bytes()
    (images / "dark/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (images / "light/empty.png").touch()
    (images / "light/text.jpg").write_text("no image")
    (images / "light/notes.txt").write_text("no image by its name either")
    run = train_tiny(tmp_path, images, "run", "--train.batch-size", "16", "--data.bad-images", "0.1")
    named = (run / "bad_images.txt").read_text()
    summary = read_json(run / "summary.json")
    for name, reason in (
        ("dark/truncated.jpg", "truncated"),
        ("light/empty.png", "empty"),
        ("light/text.jpg", "format"),
    ):
        line = next(line for line in named.splitlines() if line.startswith(name))
        assert reason in line
        assert name in (run / "report.html").read_text()
    assert "light/notes.txt" in named
    assert (summary["bad_images"], summary["ignored_files"]) == (3, 1)
    held_out = set(read_json(run / "validation.json"))
    bad_held_out = held_out & {"dark/truncated.jpg", "light/empty.png", "light/text.jpg"}
    assert summary["images"] == len(held_out) - len(bad_held_out)


def test_too_many_bad_images_stop_the_run(tmp_path: Path, command: Command) -> None:
    """With the count, the limit and the first name."""
    images = make_folder(tmp_path / "images")
    for i in range(8):
        (images / f"dark/{i:03d}.jpg").write_bytes(b"broken")
    done = command("train", "--data.root", images, "--train.epochs", "3", *TINY)
    assert done.returncode == 1
    assert "cannot be read" in done.stderr
    assert "dark/" in done.stderr


def test_divergence_is_diagnosed(tmp_path: Path, command: Command, image_folder: Path) -> None:
    """A learning rate of 10^12 without effective clipping ends with the settings to lower, and no checkpoint of NaN."""
    done = command(
        "train", "--data.root", image_folder, "--run-dir", "run", "--train.epochs", "9", *TINY,
        "--optim.lr", "1e12", "--optim.clipping", "1e9",
    )  # fmt: skip
    assert done.returncode == 1
    assert "--optim.lr" in done.stderr
    for state in (tmp_path / "run").glob("checkpoints/*/state.safetensors"):
        assert all(torch.isfinite(t).all() for t in load_file(state).values())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["trian"], 2, ["trian", "did you mean 'train'"]),
        (["train", "digit"], 1, ["did you mean 'digits'"]),
        (["train", "--train.epoch", "3"], 2, ["--train.epochs"]),
        (["train", "--model.name", "nfnet_tin"], 1, ["did you mean nfnet_tiny"]),
        (["train", "--optim.lr", "-1"], 1, ["optim.lr must be positive"]),
        (["train", "--train.precision", "fp8"], 1, ["fp32 or bf16"]),
        (["train", "--train.device", "tpu"], 1, ["unknown device 'tpu'"]),
        (["train", "--train.device", "cuda:99"], 1, ["cuda:99"]),
        (["train", "--train.device", "cpu:"], 1, ["unknown device 'cpu:'"]),
        (["train", "--data.mean", "nan", "0", "0"], 1, ["data.mean must be finite"]),
        (["train", "--model.skip-init", "inf"], 1, ["model.skip_init must be finite"]),
        (["train", "--train.epochs", "1e300"], 1, ["train.epochs must be in"]),
        (["train", "--data.eval-crop", "middle"], 1, ["center or squash or pad"]),
        (["train", "digits", "--data.root", "photos"], 1, ["'digits' has its own images"]),
        (["train", "--data.root", "nowhere"], 1, ["nowhere is missing", "ROOT/CLASS/IMAGES"]),
        (["train", "--run-dir", "nothing", "--resume"], 1, ["nothing is not a run folder"]),
        (["train", "--resume"], 1, ["no run"]),
        (["evaluate", "nfnet_tin"], 1, ["did you mean 'nfnet_tiny'"]),
        (["evaluate", "nfnet_tiny"], 1, ["--weights"]),
        (["evaluate", "nfnet_tiny", "--weights", "none.safetensors"], 1, ["none.safetensors is missing"]),
        (["evaluate", "nfnet_tiny", "--weights", "hub"], 1, ["no weights are published for nfnet_tiny"]),
        (["predict", "nowhere/run", "x.jpg"], 1, ["nowhere/run is missing"]),
        (["train", "--model.options", "squeez=none"], 1, ["did you mean 'squeeze'"]),
        (["train", "--model.options", "squeeze"], 1, ["name=value"]),
        (["train", "--model.options", "drop_rate=0.5"], 1, ["--model.drop-rate"]),
        (["train", "--model.options", "pointwise_groups=3"], 1, ["must divide"]),
        (["train", "--model.weights", "none.npz"], 1, ["none.npz is missing"]),
        (["study", "singal"], 2, ["did you mean 'signal'"]),
        (["study", "signal", "nfnet_tin"], 1, ["did you mean nfnet_tiny"]),
        (["study", "signal", "--images", "1"], 1, ["at least 2"]),
        (["list", "nfnet_tin"], 1, ["did you mean 'nfnet_tiny'"]),
        (["data", "sampel", "x"], 2, ["did you mean 'sample'"]),
        (["data", "sample", "x", "--per-class", "0"], 1, ["positive"]),
    ],
)
def test_misuse_gets_one_clear_line(arguments: list[str], code: int, words: list[str], command: Command) -> None:
    """A non-zero exit and the nearest name, never a traceback."""
    done = command(*arguments)
    assert done.returncode == code
    message = " ".join(done.stderr.split())
    assert all(word in message for word in words), done.stderr
    assert code == 2 or len(done.stderr.splitlines()) == 1


def test_folders_that_cannot_be_trained_on(tmp_path: Path, command: Command) -> None:
    """Empty, one class, a class without images: each named."""
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "one", classes=("only",))
    make_folder(tmp_path / "hollow")
    (tmp_path / "hollow" / "void").mkdir()
    for folder, word in (("empty", "no class folders"), ("one", "one class only"), ("hollow", "'void' has no images")):
        done = command("train", "--data.root", folder)
        assert done.returncode == 1
        assert word in done.stderr
        assert not (tmp_path / "runs").exists()


def test_the_images_are_found_from_anywhere(tmp_path: Path) -> None:
    """The root is stored whole: evaluate and resume work from another folder, and however the root was typed."""
    make_folder(tmp_path / "images")
    run = train_tiny(tmp_path, Path("images"), "run")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    scores = json.loads(run_command("evaluate", run, "--json", cwd=elsewhere).stdout)
    assert scores["images"] == 4
    for root in ("images/", "./images", str(tmp_path / "images")):
        done = run_command("train", "--data.root", root, "--run-dir", "run", "--resume", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert "A.1 of the paper" in (run / "report.html").read_text()  # the reasons outlive a resume


def test_a_run_folder_is_not_made_among_the_images(image_folder: Path) -> None:
    """It would be taken for a class; the message names the way out, and nothing is left behind."""
    done = run_command("train", "--data.root", ".", cwd=image_folder)
    assert done.returncode == 1
    assert "--run-dir" in done.stderr
    assert sorted(p.name for p in image_folder.iterdir()) == ["dark", "light"]


def test_a_failed_start_leaves_nothing(command: Command, image_folder: Path, tmp_path: Path) -> None:
    """So the same command, corrected, is not refused; and a folder with other files is."""
    arguments = ["train", "--data.root", image_folder, "--run-dir", "run", "--train.epochs", "1", "--train.batch-size"]
    done = command(*arguments, "64")
    assert (done.returncode, "more than the 16 training images" in done.stderr) == (1, True)
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "keep.txt").write_text("mine")
    done = command(*arguments, "4")
    assert (done.returncode, "not empty" in done.stderr) == (1, True)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["keep.txt"]


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("batch_size", 8, "is not what its checkpoints were made with"),
        ("batch_size", 0, "train.batch_size must be positive"),
        ("device", "gpu", "unknown device 'gpu'"),
        ("precision", "fp64", "fp32 or bf16"),
        ("seed", "one", "config.json.train.seed must be int"),
    ],
)
def test_a_config_edited_by_hand_is_refused(
    finished: Path, tmp_path: Path, name: str, value: object, word: str
) -> None:
    """Another value, out of range or not, gets one line that names it."""
    shutil.copytree(finished, tmp_path / "run")
    config = read_json(tmp_path / "run" / "config.json")
    config["train"][name] = value
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    done = run_command("train", "--run-dir", "run", "--resume", cwd=tmp_path)
    assert done.returncode == 1
    assert word in done.stderr


def test_damaged_side_files_do_no_harm(finished: Path, tmp_path: Path) -> None:
    """Garbage in metrics.jsonl is left out; a lost one, or lost reasons, cost a picture and a column only."""
    shutil.copytree(finished, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as f:
        f.write('garbage\n{"kind": "x", "step": 1}\n')
    for lost in (None, "metrics.jsonl", "reasons.json"):
        if lost:
            (tmp_path / "run" / lost).unlink()
        done = run_command("train", "--run-dir", "run", "--resume", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    (tmp_path / "run" / "validation.json").write_text("[]")
    assert "no images" in run_command("evaluate", "run", cwd=tmp_path).stderr
    (tmp_path / "run" / "validation.json").write_text('["bird/1.jpg"]')
    assert "was held out for validation" in run_command("evaluate", "run", cwd=tmp_path).stderr


def test_an_existing_run_is_refused_and_untouched(finished: Path, command: Command) -> None:
    """Without --resume; and with --resume and another model."""
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    images = finished.parent / "images"
    done = command("train", "--data.root", images, "--run-dir", finished)
    assert done.returncode == 1
    assert "--resume" in done.stderr
    done = command("train", "--run-dir", finished, "--resume", "--model.name", "nfnet_small")
    assert done.returncode == 1
    assert "model.name is 'nfnet_tiny' there, not 'nfnet_small'" in done.stderr
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_predicting_what_is_no_image(finished: Path, command: Command, tmp_path: Path) -> None:
    """The file is named, the exit is 1, and the good ones are still predicted."""
    (tmp_path / "letter.txt").write_text("dear reader")
    done = command("predict", finished, "letter.txt", "--json")
    assert (done.returncode, done.stdout) == (1, "[]\n")
    assert "letter.txt" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    good = next((finished.parent / "images" / "dark").iterdir())
    done = command("predict", finished, good, "letter.txt", "--json")
    assert done.returncode == 1
    assert [row["path"] for row in json.loads(done.stdout)] == [str(good)]


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path: Path, finished: Path) -> None:
    """A real limit on the size of files: one clear line, exit 1, the run folder still resumable."""
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from normfree.cli import main; main(sys.argv[1:])"
    )
    images = finished.parent / "images"
    arguments = ["train", "--data.root", str(images), "--run-dir", "run", "--train.epochs", "3", *TINY]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "File too large" in done.stderr
    assert not list((tmp_path / "run").rglob("*.tmp"))
    again = run_command("train", "--run-dir", "run", "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    _same(tmp_path / "run", finished)


def test_a_folder_that_cannot_be_written(command: Command, image_folder: Path, tmp_path: Path) -> None:
    """A file stands where the run folder should be made."""
    (tmp_path / "taken").touch()
    done = command("train", "--data.root", image_folder, "--run-dir", "taken/run", *TINY)
    assert done.returncode == 1
    assert "taken/run cannot be written" in done.stderr


def test_choices_are_printed_with_reasons_and_can_be_overridden(command: Command, image_folder: Path) -> None:
    """Each with its name, its value and why; a given one says so."""
    done = command("train", "--data.root", image_folder, "--train.epochs", "1", "--optim.clipping", "0.05")
    assert done.returncode == 0, done.stderr
    assert "train.epochs           1              as given" in done.stdout
    for name in ("data.size", "model.name", "train.batch_size", "optim.lr", "data.flip", "train.device"):
        line = next(line for line in done.stdout.splitlines() if line.startswith(name))
        assert len(line.split()) > 2
    assert "normfree evaluate runs/folder-001" in done.stdout


def test_list_and_doctor_and_help(command: Command) -> None:
    """Run and say what they should."""
    assert "71,489,284" in command("list", "nfnet_f0").stdout
    doctor = command("doctor", fresh=True)
    assert doctor.returncode == 0
    assert "training step ok" in doctor.stdout
    for arguments in (["--help"], ["train", "--help"], ["evaluate", "-h"], ["predict", "-h"], ["data", "-h"]):
        done = command(*arguments, fresh=len(arguments) == 1)
        assert done.returncode == 0
        assert "usage" in done.stdout
    assert command("--version").stdout.startswith("normfree ")


def test_commands_can_follow_one_another_in_a_process(capsys: pytest.CaptureFixture[str]) -> None:
    """`list` too, whose module has the name of something built in."""
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            main(["list", "nfnet_tiny"])
        assert ended.value.code == 0
    assert capsys.readouterr().out.count("nfnet_tiny") == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_first_command_of_the_readme(tmp_path: Path) -> None:
    """`normfree train` reaches 98 % on the held-out digits, every command agrees with it, and so does a resumed run."""
    whole = run_command("train", cwd=tmp_path, timeout=600, fresh=True)
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "runs" / "digits-001"
    summary = read_json(run / "summary.json")
    assert summary["top1"] >= 0.98
    scores = json.loads(run_command("evaluate", run, "--json", cwd=tmp_path).stdout)
    assert scores == {k: summary[k] for k in scores}
    process = _start(tmp_path, "train", "--run-dir", "cut")
    _wait_for_step(tmp_path / "cut", 300, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    process.communicate()
    done = run_command("train", "--run-dir", "cut", "--resume", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    _same(run, tmp_path / "cut")


def test_two_epochs_of_digits(tmp_path: Path) -> None:
    """The default recipe learns at once; predictions over the digits as files reproduce its accuracy exactly."""
    done = run_command("train", "--train.epochs", "2", "--run-dir", "run", cwd=tmp_path, timeout=200, fresh=True)
    assert done.returncode == 0, done.stderr
    summary = read_json(tmp_path / "run" / "summary.json")
    assert summary["images"] == 1000
    assert summary["top1"] > 0.8
    val = open_data("digits", 0.2)[1]
    for i in range(len(val)):
        path = tmp_path / "val" / val.name(i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(val.read(i)).save(path)
    rows = json.loads(run_command("predict", "run", "val", "--json", cwd=tmp_path).stdout)
    assert len(rows) == 1000
    assert sum(row["label"] == Path(row["path"]).parent.name for row in rows) / 1000 == summary["top1"]


def test_every_form_of_a_set_trains_to_the_same_bits(tmp_path: Path) -> None:
    """A folder, tar shards, parquet and a saved data set, with mixing and RandAugment, in loader processes or not."""
    found = {}
    for form, root in forms(tmp_path, samples()).items():
        more = ["--data.mixup", "0.2", "--data.cutmix", "true", "--data.randaugment", "2", "--train.epochs", "2"]
        more += ["--data.workers", "0" if form == "folder" else "1"]
        done = run_command(
            "train", "--data.root", root, "--run-dir", f"of-{form}", *TINY, *more, cwd=tmp_path, fresh=form == "folder"
        )
        assert done.returncode == 0, done.stderr
        newest = sorted((tmp_path / f"of-{form}" / "checkpoints").glob("step-*"))[-1]
        found[form] = load_file(newest / "state.safetensors")
    reference = found.pop("folder")
    for form, tensors in found.items():
        assert tensors.keys() == reference.keys()
        assert all(torch.equal(tensors[n], reference[n]) for n in reference), form


def test_a_root_with_train_alone_is_evaluated_again(tmp_path: Path, command: Command) -> None:
    """What was held out of ROOT/train is found by its name."""
    make_folder(tmp_path / "images" / "train")
    run = train_tiny(tmp_path, tmp_path / "images", "run")
    done = command("evaluate", run, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert all(summary[name] == value for name, value in json.loads(done.stdout).items())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes with names")
def test_pipes_and_links_to_themselves_are_bad_images(tmp_path: Path) -> None:
    """In training and in validation, without waiting for them."""
    for half in ("train", "val"):
        folder = make_folder(tmp_path / "images" / half) / "dark"
        os.mkfifo(folder / "pipe.png")
        (folder / "me.png").symlink_to("me.png")
    run = train_tiny(tmp_path, tmp_path / "images", "run", "--data.bad-images", "0.2")
    assert json.loads((run / "summary.json").read_text())["bad_images"] == 4
    assert "not a regular file" in (run / "bad_images.txt").read_text()


def test_one_bad_image_is_too_many_where_none_may_be(tmp_path: Path) -> None:
    """--data.bad-images 0 stops at the first; a validation image counts against its own."""
    for half in ("train", "val"):
        images = make_folder(tmp_path / half / "train"), make_folder(tmp_path / half / "val", per_class=7)
        (images[half == "val"] / "dark" / "000.jpg").write_bytes(b"")
        settings = ["--data.bad-images", "0", *TINY, "--train.epochs", "2"]
        done = run_command("train", "--data.root", tmp_path / half, *settings, cwd=tmp_path)
        assert done.returncode == 1
        counted = {"train": 20, "val": 14}[half]
        assert f"--data.bad-images 0 of {counted}; the first is {half}/dark/000.jpg" in done.stderr


def test_classes_whose_names_are_no_text_are_drawn(tmp_path: Path) -> None:
    """Their bytes are escaped in pictures and on the page."""
    images = tmp_path / "images"
    make_folder(images, (os.fsdecode(b"caf\xe9 \xff"), "b\nc"))
    run = train_tiny(tmp_path, images, "run")
    assert (run / "report.html").exists()
