"""Published weights: where they are, and a file of them on this machine."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from normfree.config import UserError, suggestion
from normfree.files import cache_folder, sync_folder

_AUTHORS = "https://storage.googleapis.com/dm-nfnets"
_TIMEOUT = 30  # seconds without a byte
_ATTEMPTS = 4


@dataclass(frozen=True)
class Published:
    """hub: repository of timm's safetensors on the Hub. authors: file name and MD5 of the authors' own, or None."""

    hub: str
    authors: tuple[str, str] | None = None


# The MD5 sums are those that the authors' storage reports for its files.
PUBLISHED: dict[str, Published] = {
    "nfnet_f0": Published("timm/dm_nfnet_f0.dm_in1k", ("F0_haiku.npz", "0a41039da1cb43adf47f1b7d86ddfe0f")),
    "nfnet_f1": Published("timm/dm_nfnet_f1.dm_in1k", ("F1_haiku.npz", "c9126bbfaf855f9ddb7ff3b902558781")),
    "nfnet_f2": Published("timm/dm_nfnet_f2.dm_in1k", ("F2_haiku.npz", "7a018d8d1498020e2f5a8719a1e7f53f")),
    "nfnet_f3": Published("timm/dm_nfnet_f3.dm_in1k", ("F3_haiku.npz", "d8e1e78d26db659c486150dbaccbe78a")),
    "nfnet_f4": Published("timm/dm_nfnet_f4.dm_in1k", ("F4_haiku.npz", "f5974a7e3388aa81b91a9f1403e759a4")),
    "nfnet_f5": Published("timm/dm_nfnet_f5.dm_in1k", ("F5_haiku.npz", "8639e925de951030651ac775b9f915c3")),
    "nfnet_f6": Published("timm/dm_nfnet_f6.dm_in1k", ("F6_haiku.npz", "b16cca40ac1ecec2bd5e3273866da0c1")),
    "timm_nfnet_l0": Published("timm/nfnet_l0.ra2_in1k"),
    "timm_nf_resnet50": Published("timm/nf_resnet50.ra2_in1k"),
}


def find_weights(name: str, wanted: bool | str | Path) -> Path:
    """The file that `pretrained=` means for a model, downloaded if it is not here yet.

    Args:
        name: of the model.
        wanted: True or "hub": from the Hub; "authors": the file that the authors published; a path; or an http(s) URL.

    Raises:
        UserError: nothing is published for the model, or it cannot be downloaded.
    """
    if isinstance(wanted, Path) or (isinstance(wanted, str) and wanted not in ("hub", "authors")):
        return download(str(wanted)) if re.match(r"\w+://", str(wanted)) else Path(wanted)
    if name not in PUBLISHED:
        raise UserError(f"no weights are published for {name}{suggestion(name, PUBLISHED)}; name a file instead")
    known = PUBLISHED[name]
    if wanted == "authors":
        if known.authors is None:
            raise UserError(f"the authors published no weights for {name}")
        return download(f"{_AUTHORS}/{known.authors[0]}", md5=known.authors[1])
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return download(f"{endpoint}/{known.hub}/resolve/main/model.safetensors", known.hub.replace("/", "--"))


def download(url: str, name: str | None = None, md5: str | None = None) -> Path:
    """A file of the cache with the content of a URL; fetched once, whole and checked before it has its name.

    What is checked: the length that the server announced, an MD5 sum if one is given, and the SHA-256 that the Hub
    sends along. A broken connection is taken up where it broke.

    Raises:
        UserError: not http(s), no connection, or content that fails its check.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise UserError(f"{url} is no http address")
    plain = Path(urlsplit(url).path).name or "weights"
    folder = cache_folder()
    stem = name or hashlib.blake2b(url.encode(), digest_size=6).hexdigest()
    target = folder / f"{stem}--{plain}"
    if target.exists():
        return target
    part = folder / f".{target.name}.{os.getpid()}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        print(f"normfree: downloading {url} to {target}", file=sys.stderr)
        with open(part, "wb") as out:
            sha256 = _fetch(url, out)
            os.fsync(out.fileno())
        _verify(part, url, md5, sha256)
        os.replace(part, target)
        sync_folder(folder)
    except OSError as e:
        raise UserError(f"{url} cannot be kept in {folder}: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)
    return target


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects and remembers what the Hub says about the file, which only the first answer has."""

    sha256: str | None = None

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        self.remember(headers)
        if urlsplit(newurl).scheme not in ("http", "https"):
            raise UserError(f"{req.full_url} points to {newurl[:100]}, which is no http address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)

    def remember(self, headers: Any) -> None:
        tag = str(headers.get("X-Linked-ETag", "")).strip('"')
        if re.fullmatch(r"[0-9a-f]{64}", tag):
            self.sha256 = tag


def _fetch(url: str, out: BinaryIO) -> str | None:
    """Append the content to a file, over as many connections as it takes; returns the announced SHA-256."""
    redirects = _Redirects()
    opener = urllib.request.build_opener(redirects)
    for attempt in range(_ATTEMPTS):
        start = out.tell()
        headers = {"User-Agent": "normfree"} | ({"Range": f"bytes={start}-"} if start else {})
        request = urllib.request.Request(url, headers=headers)  # noqa: S310 (download allows http and https only)
        try:
            with opener.open(request, timeout=_TIMEOUT) as answer:
                redirects.remember(answer.headers)
                if answer.status != 206:  # the whole file again
                    out.seek(0)
                    out.truncate()
                length = answer.headers.get("Content-Length")
                expected = out.tell() + int(length) if length else None
                while block := answer.read(1 << 20):
                    out.write(block)
            out.flush()
            if expected is None or out.tell() >= expected:
                return redirects.sha256
            reason = f"the connection ended after {out.tell()} of {expected} bytes"
        except urllib.error.HTTPError as e:
            if e.code == 416 and start:  # nothing is left
                return redirects.sha256
            if e.code < 500:
                raise UserError(f"{url}: {e.code} {e.reason}") from e
            reason = f"{e.code} {e.reason}"
        except (OSError, ValueError) as e:
            reason = str(getattr(e, "reason", e))
        time.sleep(0.5 * attempt)
    raise UserError(f"{url} cannot be downloaded: {reason}")


def _verify(path: Path, url: str, md5: str | None, sha256: str | None) -> None:
    for kind, expected in (("md5", md5), ("sha256", sha256)):
        if expected is not None and (found := _digest(path, kind)) != expected:
            raise UserError(f"{url}: the {kind} sum of the content is {found}, expected {expected}")


def _digest(path: Path, kind: str) -> str:
    digest = hashlib.new(kind, usedforsecurity=False)
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
