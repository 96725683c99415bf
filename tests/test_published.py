"""Published weights in use: downloaded, evaluated as published, fine-tuned, listed and drawn."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import normfree
from authors import load
from normfree.cli import _main
from normfree.config import Given, UserError
from normfree.data.crop import Preprocessing
from normfree.data.resize import resize_bicubic
from normfree.data.sources import open_data
from normfree.evaluate import published_preprocessing
from normfree.models import MODELS, download
from normfree.models.count import PAPER, multiply_adds, parameters
from normfree.recipes import RECIPES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Server(ThreadingHTTPServer):
    """Serves `files` on the loopback; `breaks` answers end in the middle, and `log` has what was asked for."""

    files: dict[str, bytes]
    redirects: dict[str, str]
    tags: dict[str, str]
    breaks = 0
    ranges = True
    log: list[tuple[str, str | None]]


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        s = self.server
        s.log.append((self.path, self.headers["Range"]))
        if self.path in s.redirects:
            self.send_response(302)
            self.send_header("Location", s.redirects[self.path])
            if self.path in s.tags:
                self.send_header("X-Linked-ETag", f'"{s.tags[self.path]}"')
            self.end_headers()
            return
        if self.path not in s.files:
            self.send_error(404)
            return
        content, wanted = s.files[self.path], self.headers["Range"]
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and s.ranges else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        rest = content[start:]
        if s.breaks:
            s.breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    s = Server(("127.0.0.1", 0), _Handler)
    s.files, s.redirects, s.tags, s.log = {}, {}, {}, []
    monkeypatch.setenv("NORMFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", address(s))
    monkeypatch.setattr("time.sleep", lambda _: None)
    thread = threading.Thread(target=s.serve_forever)
    thread.start()
    yield s
    s.shutdown()
    thread.join()
    s.server_close()


def address(s: Server) -> str:
    return f"http://127.0.0.1:{s.server_address[1]}"


def _as_timm(name: str, path: Path) -> tuple[normfree.models.Network, bytes]:
    """A random network and its weights as timm would have them."""
    torch.manual_seed(0)
    model = normfree.create_model(name, 7, skip_init=1.0).eval()
    normfree.export_weights(model, path, "timm")
    return model, path.read_bytes()


def test_pretrained_fetches_from_the_hub_once(
    narrow: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through a redirect, checked against the sum that the Hub sends; the second model takes the file of the cache."""
    source, content = _as_timm(narrow, tmp_path / "tiny.safetensors")
    monkeypatch.setitem(download.PUBLISHED, narrow, download.Published("timm/tiny"))
    path = "/timm/tiny/resolve/main/model.safetensors"
    server.redirects[path], server.tags[path] = "/cdn/blob", hashlib.sha256(content).hexdigest()
    server.files["/cdn/blob"] = content
    x = torch.randn(2, 3, 32, 32)
    for _ in range(2):
        model = normfree.create_model(narrow, 7, pretrained=True).eval()
        assert torch.equal(model(x), source(x))
    assert [p for p, _ in server.log] == [path, "/cdn/blob"]
    assert capsys.readouterr().err.count("downloading") == 1
    with pytest.warns(UserWarning, match="7 classes, the model for 3"):
        body = normfree.create_model(narrow, 3, pretrained=True).eval()
    assert torch.equal(body.forward_features(x), source.forward_features(x))


def test_a_wrong_sum_is_refused_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    """Of the Hub's SHA-256 and of a given MD5."""
    server.files["/blob"], server.redirects["/file"], server.tags["/file"] = b"x" * 1000, "/blob", "0" * 64
    with pytest.raises(UserError, match="sha256"):
        download.download(f"{address(server)}/file")
    with pytest.raises(UserError, match="md5"):
        download.download(f"{address(server)}/blob", md5="0" * 32)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_connection_is_taken_up_again(server: Server, ranges: bool) -> None:
    """Two answers end in the middle; the file is whole in the end, whether the server can go on or starts anew."""
    content = np.random.default_rng(0).bytes(100_000)
    server.files["/blob"], server.breaks, server.ranges = content, 2, ranges
    found = download.download(f"{address(server)}/blob", md5=hashlib.md5(content).hexdigest())
    assert found.read_bytes() == content
    assert server.log[0][1] is None
    assert len(server.log) == 3


def test_what_cannot_be_had_is_said(server: Server, tmp_path: Path) -> None:
    """A file that is not there, a connection that always breaks, addresses that are no http, unknown names."""
    with pytest.raises(UserError, match="404"):
        download.download(f"{address(server)}/nothing")
    server.files["/blob"], server.breaks = b"x" * 1000, 99
    with pytest.raises(UserError, match="the connection ended after"):
        download.download(f"{address(server)}/blob")
    for url in ("file:///etc/passwd", "ftp://host/x"):
        with pytest.raises(UserError, match="no http address"):
            normfree.create_model("nfnet_tiny", pretrained=url)
    server.redirects["/away"] = "ftp://host/x"
    with pytest.raises(UserError, match="no http address"):
        download.download(f"{address(server)}/away")
    with pytest.raises(UserError, match="no weights are published for nfnet_tiny"):
        normfree.create_model("nfnet_tiny", pretrained=True)
    with pytest.raises(UserError, match="authors published no weights for timm_nfnet_l0"):
        download.find_weights("timm_nfnet_l0", "authors")
    with pytest.raises(UserError, match="is missing"):
        normfree.create_model("nfnet_tiny", pretrained=tmp_path / "none")


def test_every_published_name_is_a_model() -> None:
    """And every row of the paper's numbers."""
    assert download.PUBLISHED.keys() <= MODELS.keys()
    assert PAPER.keys() <= MODELS.keys()


# Evaluation as published


EVAL = load("authors_eval")[0]


@pytest.mark.parametrize("case", sorted({k.split("/")[1] for k in EVAL if k.startswith("resize/")}))
def test_the_resize_is_tensorflows(case: str) -> None:
    """Bicubic without antialiasing, up, down, extreme and of one pixel: equal to the last bit."""
    theirs = EVAL[f"resize/{case}/out"].numpy()
    ours = resize_bicubic(EVAL[f"resize/{case}/in"].numpy(), *theirs.shape[:2])
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize(("crop", "key"), [("squash", "resize_crop_32"), ("center", "crop_resize")])
@pytest.mark.parametrize("size", [32, 48])
def test_the_evaluation_crops_are_the_authors(crop: str, key: str, size: int) -> None:
    """Both, for every aspect, unclipped: equal to the last bit; normalised, to rounding."""
    prepare = Preprocessing(size, crop, 32, MEAN, STD, antialias=False)
    names = [k.rsplit("/", 1)[1] for k in EVAL if k.startswith(f"{key}/{size}/")]
    assert len(names) == 6
    for name in names:
        out = prepare(EVAL[f"images/{name}"].numpy())
        assert np.array_equal(out, EVAL[f"{key}/{size}/{name}"].numpy())
        if crop == "squash":
            x = prepare.normalize(torch.from_numpy(out).permute(2, 0, 1)[None])[0].permute(1, 2, 0)
            torch.testing.assert_close(x, EVAL[f"normalized/{key}/{size}/{name}"], rtol=1e-5, atol=1e-5)


def test_an_odd_margin_is_cut_as_the_authors_do() -> None:
    """The larger half at the top and left."""
    prepare = Preprocessing(48, "squash", 5, MEAN, STD, antialias=False)
    for key in [k for k in EVAL if k.startswith("resize_crop_0.9/")]:
        image = EVAL[f"images/{key.rsplit('/', 1)[1]}"].numpy()
        assert np.array_equal(prepare(image), EVAL[key].numpy())


def test_published_preprocessing() -> None:
    """The NFNets as in A.1, at the test size of the variant; timm's own as timm does."""
    assert published_preprocessing("nfnet_f3") == Preprocessing(416, "squash", 32, MEAN, STD, antialias=False)
    assert published_preprocessing("nf_resnet50") == Preprocessing(224, "center", 32, MEAN, STD, antialias=False)
    assert published_preprocessing("timm_nf_resnet50") == Preprocessing(288, "center", 18, MEAN, STD)
    with pytest.raises(UserError, match="always antialiased"):
        Preprocessing(32, "pad", 0, MEAN, STD, antialias=False)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 12 random images, of several sizes."""
    rng = np.random.default_rng(1)
    for name in ("n01440764", "n01443537"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = rng.integers(0, 256, (40 + i, 50, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i:02d}.png")
    return tmp_path / "photos"


def test_evaluate_with_the_authors_file(
    narrow: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`normfree evaluate MODEL --weights FILE.npz --data.root DIR` scores as a plain loop over the images does."""
    torch.manual_seed(1)
    model = normfree.create_model(narrow, 2, skip_init=1.0).eval()
    torch.nn.init.normal_(model.fc.weight)
    file = tmp_path / "tiny.npz"
    normfree.export_weights(model, file, "authors")
    assert _main(["evaluate", narrow, "--weights", str(file), "--data.root", str(photos), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    prepare, hits = published_preprocessing(narrow), 0
    for label, folder in enumerate(sorted(photos.iterdir())):
        for image in folder.iterdir():
            pixels = np.asarray(Image.open(image))
            x = prepare.normalize(torch.from_numpy(prepare(pixels)).permute(2, 0, 1)[None])
            hits += int(model(x).argmax() == label)
    assert found["images"] == 24
    assert found["top1"] == pytest.approx(hits / 24)
    changed = ["--data.test-size", "24", "--data.eval-crop", "center", "--data.antialias", "True"]
    assert _main(["evaluate", narrow, "--weights", str(file), "--data.root", str(photos), *changed]) == 0


def test_unnamed_classes_must_be_as_many_as_outputs(
    narrow: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder of two classes is no match for five outputs; and a foreign file alone does not name its model."""
    file = tmp_path / "tiny.npz"
    normfree.export_weights(normfree.create_model(narrow, 5), file, "authors")
    assert _main(["evaluate", narrow, "--weights", str(file), "--data.root", str(photos)]) == 1
    assert "has 2 classes, nfnet_narrow 5 outputs" in capsys.readouterr().err
    assert _main(["evaluate", str(file), "--data.root", str(photos)]) == 1
    assert "name its model" in capsys.readouterr().err


def test_predict_with_the_authors_file(
    narrow: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without stored names, classes go by number."""
    file = tmp_path / "tiny.npz"
    normfree.export_weights(normfree.create_model(narrow, 5), file, "authors")
    assert _main(["predict", narrow, str(photos), "--weights", str(file), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 24
    assert {row["label"] for row in rows} <= set("01234")


def test_training_starts_from_given_weights(
    narrow: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The body of the file, with a new classifier; at a rate of 1e-12 it is still there at the end."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    model = normfree.create_model(narrow, 5, skip_init=0.7)
    normfree.export_weights(model, "tiny.npz", "authors")
    arguments = ["train", "--data.root", str(photos), "--model.name", narrow, "--model.weights", "tiny.npz"]
    arguments += ["--train.epochs", "1", "--train.batch-size", "4", "--optim.lr", "1e-12", "--run-dir", "run"]
    assert _main(arguments) == 0
    found, about = normfree.models.weights.load_model(Path("run/best.safetensors"))
    assert about["classes"] == ["n01440764", "n01443537"]
    for name, tensor in model.state_dict().items():
        if not name.startswith("fc."):
            torch.testing.assert_close(found.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_fine_tuning_as_in_the_paper(photos: Path) -> None:
    """A.5, scaled to the batch; at the sizes that the network was trained and is tested at."""
    train, _ = open_data(str(photos), 0.2)
    values = {"data.root": str(photos), "train.batch_size": 16, "train.epochs": 9.0, "model.name": "nfnet_f0"}
    run = RECIPES["folder"](Given(values | {"model.weights": "x.npz"}), train)
    o, d, m = run.optim, run.data, run.model
    assert (o.lr, o.clipping, o.warmup, o.weight_decay, o.ema_decay) == (0.1 * 16 / 2048, 0.01, 3.0, 1e-5, 0.9999)
    assert (d.size, d.test_size, d.eval_crop, d.margin) == (192, 256, "squash", 32)
    assert (m.drop_rate, m.stochastic_depth) == (0.25, 0.1)
    run = RECIPES["folder"](Given(values | {"model.weights": "x.npz", "model.name": "nf_resnet50"}), train)
    assert (run.optim.weight_decay, run.model.drop_rate, run.model.stochastic_depth) == (0.0, 0.0, 0.0)
    with pytest.raises(UserError, match="name the network"):
        RECIPES["folder"](Given({"data.root": str(photos), "model.weights": "x.npz"}), train)


def test_options_of_the_network_can_be_trained_with(photos: Path, tmp_path: Path) -> None:
    """--model.options reaches the network, and the file of weights remembers them."""
    options = ["--model.options", "squeeze=straddle", "pointwise_groups=2", "group_width=8,8,16,16"]
    arguments = ["train", "--data.root", str(photos), "--model.name", "nfnet_tiny", *options, "--train.epochs", "1"]
    assert _main([*arguments, "--train.batch-size", "4", "--run-dir", str(tmp_path / "run")]) == 0
    model, _ = normfree.models.weights.load_model(tmp_path / "run" / "best.safetensors")
    c = model.config
    assert (c.squeeze, c.pointwise_groups, c.group_width) == ("straddle", 2, (8, 8, 16, 16))


def test_a_file_is_not_taken_for_another_function_of_the_same_shapes(tmp_path: Path) -> None:
    """Our own header, and what the authors' and timm's code can build, tell them apart; nothing is read silently."""
    normfree.save_weights(normfree.create_model("nfnet_tiny", 5, activation="silu"), tmp_path / "own")
    with pytest.raises(UserError, match="its activation is silu, the model's gelu"):
        normfree.create_model("nfnet_tiny", 5, pretrained=tmp_path / "own")
    normfree.create_model("nfnet_tiny", 5, activation="silu", drop_rate=0.1, pretrained=tmp_path / "own")
    normfree.export_weights(normfree.create_model("nf_resnet50", 5), tmp_path / "authors", "authors")
    with pytest.raises(UserError, match="no such network"):
        normfree.create_model("timm_nf_resnet50", 5, pretrained=tmp_path / "authors")
    with pytest.raises(UserError, match="fold"):
        normfree.load_weights(
            normfree.fold(normfree.create_model("nfnet_tiny", 5, activation="silu")), tmp_path / "own"
        )


def test_a_folded_network_is_saved_and_evaluated_from_one_file(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file says which network it is, and that it is folded; the scores are those of the unfolded one."""
    torch.manual_seed(3)
    model = normfree.create_model("nfnet_tiny", 2, skip_init=1.0).eval()
    torch.nn.init.normal_(model.fc.weight)
    scores = []
    for name, network in (("plain", model), ("folded", normfree.fold(model))):
        normfree.save_weights(network, tmp_path / name)
        assert _main(["evaluate", str(tmp_path / name), "--data.root", str(photos), "--json"]) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], rel=1e-6)
    assert scores[0]["top1"] == scores[1]["top1"]


# Numbers and pictures


DEEP = ("nfnet_f5", "nfnet_f6")  # take seconds to lay out, of the same blocks as the others


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n
        for n in PAPER
        if n not in ("nfnet_f4_plus", "bn_resnet50")
    ],
)
def test_table_3_to_the_printed_digit(name: str) -> None:
    """Parameters and multiply-adds at the test size; F4+ with 192 channels in stage 1 as in Table 5."""
    digits = (0, 0) if name == "nfnet_f4_plus_192" else (1, 2)
    config, (millions, billions) = MODELS[name], PAPER[name]
    assert round(parameters(config) / 1e6, digits[0]) == millions
    assert round(multiply_adds(config, config.test_size) / 1e9, digits[1]) == billions


def test_the_numbers_of_the_authors_code_for_f4_plus() -> None:
    """Exact, where the paper and its code differ; and those of the other families that are known."""
    assert parameters(MODELS["nfnet_f4_plus"]) == 524_954_484
    assert round(multiply_adds(MODELS["nfnet_f4_plus"], 512) / 1e9, 2) == 333.39
    assert parameters(MODELS["nfnet_f4_plus_192"]) == 527_033_076
    assert round(multiply_adds(MODELS["nfnet_f4_plus_192"], 512) / 1e9, 2) == 367.41
    resnets = [parameters(MODELS[f"nf_resnet{n}"]) for n in (50, 101, 152, 200)]
    assert resnets == [25_557_048, 44_549_193, 60_192_858, 64_673_898]


def test_list_prints_the_papers_numbers_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """As a table, in full width, and as JSON."""
    assert _main(["list", "nfnet_f0*", "--table"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.startswith("nfnet_f0 "))
    costs = "71.5M 71.5M = 12.38B 12.38B = 6.98B"
    assert " ".join(row[1:]) == f"1-2-6-3 256-512-1536-1536 192 256 0.2 5 {costs}"
    assert _main(["list", "nfnet_f4_plus", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)[0]
    assert (facts["parameters"], facts["paper_parameters"]) == (524_954_484, 527_000_000)


def test_study_signal_draws_a_picture(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three numbers of every block, on noise and on images, with the expectation; and the PNG is one."""
    out = tmp_path / "signal.png"
    arguments = ["study", "signal", "nfnet_tiny", "--data.root", str(photos), "--out", str(out), "--json"]
    assert _main([*arguments, "--images", "4"]) == 0
    curves = json.loads(capsys.readouterr().out)
    assert [c["images"] for c in curves] == ["noise", "images of photos"]
    assert len(curves[0]["blocks"]) == 1 + sum(MODELS["nfnet_tiny"].depths)
    assert curves[0]["expected_variance"][:3] == pytest.approx([1, 1.04, 1.04])
    with Image.open(out) as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10
