"""Draw a character in the browser and see what a finished run makes of it.

    python -m trainer.inference.demo RUN_DIR [--port N]

serves one page, on this machine alone, to draw on with mouse, pen, finger or keyboard; it shows the five likeliest
classes and the image that the model saw, anew at every stroke. The standard library's server and a page written by
hand do it: a framework would bring a hundred packages and load its parts from elsewhere.
"""

from __future__ import annotations

import argparse
import base64
import errno
import io
import json
import secrets
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from pipeline.ink.adapter import BlankImageError, UnusableImageError
from pipeline.preview import to_pil_image
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats import image as pictures
from shards import UserError
from shards.cli import program_name, run_command
from shards.errors import as_user_error
from trainer.inference.predictor import Predictor

_HOST = "127.0.0.1"  # never another one: whoever reaches the page may keep this machine busy
_PORT = 8028
_TOP = 5
_MOST_BYTES = 1 << 20  # of a drawing
_MOST_PIXELS = 1 << 21
_PATIENCE = 10.0  # seconds for a request to arrive
_LARGE = 224  # least side of the picture of what the model saw, pixels
_TEMPLATE = Path(__file__).with_name("demo.html.j2")


class DrawingClassifier:
    """Answers drawings, one at a time."""

    def __init__(self, predictor: Predictor) -> None:
        """Raises `UserError` for a run that was not trained on ink."""
        if predictor.adapter.frame is None:
            raise UserError(
                found=f"{predictor.run}, trained on pictures that are not ink on a plain background",
                expected="a run on characters, such as EMNIST or MNIST",
                hint=f"python -m trainer.predict {predictor.run} PICTURES",
            )
        self.predictor = predictor
        self._turn = threading.Lock()

    def answer(self, content: bytes) -> dict[str, Any]:
        """What the page shows for a drawing, a PNG; `top` is empty for a blank one.

        Raises `UnusableImageError` for anything that is no such picture.
        """
        try:
            header = pictures.header(content)
        except CorruptFileError as error:
            raise UnusableImageError(str(error)) from None
        if header.width * header.height > _MOST_PIXELS:
            raise UnusableImageError(f"{header.width}x{header.height} pixels, more than {_MOST_PIXELS:,}")
        with self._turn:
            try:
                taken = self.predictor.adapter.adapt(content)
            except BlankImageError:
                return {"top": []}
            seen = self.predictor.predict([taken.image])
        probabilities = seen.probabilities[0]
        best = (-probabilities).argsort(kind="stable")[:_TOP].tolist()
        return {
            "top": [{"class": self.predictor.classes[one], "probability": float(probabilities[one])} for one in best],
            "image": _data_address(to_pil_image(seen.images[0])),
            "side": self.predictor.resolution,
        }


def _data_address(picture: Image.Image) -> str:
    """A `data:` address of a picture, its pixels enlarged so that they can be seen."""
    factor = -(-_LARGE // picture.width)
    content = io.BytesIO()
    picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST).save(content, "PNG")
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST /predict` takes a PNG and gives JSON; nothing else is answered."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "inkstream", ""
    timeout = _PATIENCE

    def do_GET(self) -> None:
        if not self._is_ours():
            return
        if self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "only / is here")
            return
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = self.server.page.render(nonce=nonce, predictor=self.server.artist.predictor)
        self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def do_POST(self) -> None:
        if not self._is_ours():
            return
        if self.path != "/predict":
            self._refuse(HTTPStatus.NOT_FOUND, "only /predict takes drawings")
            return
        # No form of another site's page can send this type without asking first.
        if self.headers.get("Content-Type") != "image/png":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a drawing is image/png")
            return
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            self._refuse(HTTPStatus.BAD_REQUEST, "the length of the drawing is missing")
            return
        if len(length) > 9 or int(length) > _MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a drawing has up to {_MOST_BYTES:,} bytes")
            return
        content = self.rfile.read(int(length))
        if len(content) < int(length):
            self._refuse(HTTPStatus.BAD_REQUEST, "the drawing ended early")
            return
        try:
            answer = self.server.artist.answer(content)
        except UnusableImageError as error:
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
            return
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    def _is_ours(self) -> bool:
        """Whether the request was meant for this server, and not led here by a name or a page of somebody else's."""
        port = self.server.server_port
        hosts = {f"{host}:{port}" for host in (_HOST, "localhost")} | ({_HOST, "localhost"} if port == 80 else set())
        origin = self.headers.get("Origin")
        named = self.headers.get_all("Host") or []
        if len(named) == 1 and named[0].lower() in hosts and origin in (None, *(f"http://{host}" for host in hosts)):
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"this page is at http://{_HOST}:{port}/ alone")
        return False

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # What came after the header may not have been read, so the connection ends.
        self.close_connection = True
        self._send(status, json.dumps({"error": reason}).encode(), "application/json", {"Connection": "close"})

    def _send(self, status: HTTPStatus, content: bytes, kind: str, more: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            **(more or {}),
        }
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        """Nothing is said of single requests."""


class Server(ThreadingHTTPServer):
    """The page on a port of this machine; 0 takes a free one. Raises `UserError` if the port cannot be had."""

    daemon_threads = True

    def __init__(self, artist: DrawingClassifier, port: int) -> None:
        self.artist = artist
        environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        self.page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise as_user_error(error, f"port {port}") from None
            raise UserError(
                found=f"port {port} of {_HOST}, which another program has",
                expected="a free port",
                hint="stop that program, or name another port: --port 0 takes any that is free",
            ) from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away before its answer is no error; anything else is a bug of ours, and shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError
    return number


def main() -> int:
    parser = argparse.ArgumentParser(
        prog=program_name("trainer.inference.demo"),
        description="Draw a character in the browser and see what a finished run makes of it.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="directory of a run on characters")
    parser.add_argument(
        "--port",
        type=_port,
        default=_PORT,
        metavar="N",
        help=f"port on this machine (default {_PORT}; 0 takes a free one)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the model runs")
    arguments = parser.parse_args()
    with Server(DrawingClassifier(Predictor(arguments.run, arguments.device)), arguments.port) as server:
        print(f"draw at http://{_HOST}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    run_command(main)
