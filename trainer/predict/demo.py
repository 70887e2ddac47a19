"""Draw a character in the browser and see the prediction of a trained model.

    python -m trainer.predict.demo RUN_DIR [--port N]

The command serves one page on this machine only. Drawing works with mouse, pen, finger and keyboard. The page shows the
five most probable classes and the model input, updated with every stroke. It uses the standard library's server: a web
framework would add a hundred packages and load files from other servers.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.ink.geometry import NoInkError
from pipeline.preview import to_pil_image
from pipeline.readers.archives.files import CorruptFileError
from pipeline.readers.formats import image as images
from shards import UserError
from shards.cli import command_parser, run_command
from shards.errors import quote
from trainer.predict.predictor import Predictor, add_run_arguments
from trainer.report.html import image_url, render

_HOST = "127.0.0.1"  # not configurable: every client of the page can keep this machine busy
_PORT = 8028
_TOP = 5
_MAX_BYTES = 1 << 20  # of a drawing
_MAX_PIXELS = 1 << 21
_TIMEOUT = 10.0  # seconds for a request to arrive
_ANSWER_TIMEOUT = 600.0  # seconds
_MAX_CONNECTIONS = 32
_MIN_SIDE = 224  # of the displayed model input, in pixels


class DrawingClassifier:
    """Classifies drawings, one at a time."""

    def __init__(self, predictor: Predictor) -> None:
        """Wrap a predictor.

        Raises:
            UserError: The run was not trained on ink.
        """
        if predictor.adapter.frame is None:
            raise UserError(
                found=f"{predictor.run}, trained on images that are not ink on a plain background",
                expected="a run on characters, such as EMNIST or MNIST",
                hint=f"python -m trainer.predict {quote(predictor.run)} IMAGES",
            )
        self.predictor = predictor
        self._lock = threading.Lock()

    def classify(self, content: bytes) -> dict[str, Any]:
        """Classify a drawing.

        Args:
            content: The drawing as PNG.

        Returns:
            `top`: the most probable classes with probabilities, empty for a blank drawing; `image`: the model input as
            a data URL; `size`: its height and width in pixels.

        Raises:
            CorruptFileError: The content is not an image, or is too large.
        """
        header = images.header(content)
        if header.width * header.height > _MAX_PIXELS:
            raise CorruptFileError(f"{header.height} x {header.width} pixels, more than {_MAX_PIXELS:,}")
        with self._lock:
            try:
                adapted = self.predictor.adapter.adapt(content)
            except NoInkError:
                return {"top": []}
            probabilities, (pixels, *_), _ = self.predictor.predict([adapted.image])
        classes = (-probabilities[0]).argsort(kind="stable")[:_TOP].tolist()
        height, width = pixels.shape[:2]
        factor = -(-_MIN_SIDE // height)
        enlarged = to_pil_image(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        return {
            "top": [
                {"class": self.predictor.classes[label], "probability": float(probabilities[0, label])}
                for label in classes
            ],
            "image": image_url(enlarged),
            "size": [height, width],
        }


class _Handler(BaseHTTPRequestHandler):
    """`GET /` returns the page, `POST /predict` accepts a PNG and returns JSON."""

    server: Server
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "inkstream", ""
    timeout = _TIMEOUT

    def parse_request(self) -> bool:
        """Refuse requests for other hosts or from other sites' pages (DNS rebinding, cross-site requests)."""
        if not super().parse_request():
            return False
        port = self.server.server_port
        hosts = {f"{host}:{port}" for host in (_HOST, "localhost")} | ({_HOST, "localhost"} if port == 80 else set())
        requested = [host.lower() for host in self.headers.get_all("Host") or []]
        origins = {None, *(f"http://{host}" for host in hosts)}
        if len(requested) == 1 and requested[0] in hosts and self.headers.get("Origin") in origins:
            return True
        self._refuse(HTTPStatus.FORBIDDEN, f"this page is available at http://{_HOST}:{port}/ only")
        return False

    def do_GET(self) -> None:
        if self.path != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "the page is /")
            return
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; img-src data:; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        predictor = self.server.classifier.predictor
        page = render("demo.html.j2", Path(__file__).parent, nonce=nonce, predictor=predictor)
        self._send(HTTPStatus.OK, page.encode(), "text/html; charset=utf-8", {"Content-Security-Policy": policy})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if self.path != "/predict":
            return self._refuse(HTTPStatus.NOT_FOUND, "drawings are sent to /predict")
        # A form on another site cannot send image/png without a preflight request.
        if self.headers.get("Content-Type") != "image/png":
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "a drawing is image/png")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            return self._refuse(HTTPStatus.BAD_REQUEST, "no length of the drawing")
        if len(length) > 9 or int(length) > _MAX_BYTES:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a drawing has up to {_MAX_BYTES:,} bytes")
        drawing = self.rfile.read(int(length))
        self.server.extend(self.connection, _ANSWER_TIMEOUT)
        try:
            answer = self.server.classifier.classify(drawing)
        except CorruptFileError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        self._send(HTTPStatus.OK, json.dumps(answer).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, reason: str) -> None:
        # Close the connection: the body may not have been read.
        self._send(status, json.dumps({"error": reason}).encode(), "application/json", {"Connection": "close"})

    def _send(self, status: HTTPStatus, content: bytes, kind: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(len(content)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        } | (headers or {})
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
        self.server.extend(self.connection)

    def log_message(self, format: str, *arguments: object) -> None:
        """Do not log single requests."""


class Server(ThreadingHTTPServer):
    """The page on a port of this machine."""

    daemon_threads = True
    request_queue_size = _MAX_CONNECTIONS

    def __init__(self, classifier: DrawingClassifier, port: int) -> None:
        """Bind the port; 0 selects a free one.

        Raises:
            UserError: The port is in use or not permitted.
        """
        self.classifier = classifier
        self._free = threading.Semaphore(_MAX_CONNECTIONS)
        self._deadlines: dict[socket.socket, float] = {}
        self.allow_reuse_address = os.name != "nt"  # there it would share the port with another program
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise UserError(
                found=f"port {port} of {_HOST}: {error.strerror}",
                expected="a free port that this user may open",
                hint="stop the program that uses it, or take a free port: --port 0",
            ) from None

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a connection in a thread; beyond the maximum, the connection nearest to its deadline is closed."""
        if not self._free.acquire(blocking=False):
            self._close_before(min(self._deadlines.copy().values(), default=0.0))
            self._free.acquire()
        self.extend(request)
        super().process_request(request, client_address)

    def extend(self, request: socket.socket, seconds: float | None = None) -> None:
        """Give a connection time: for an answer, or for its next request (the default)."""
        self._deadlines[request] = time.monotonic() + (_TIMEOUT if seconds is None else seconds)

    def service_actions(self) -> None:
        """Close the connections whose time is over. `serve_forever` calls this twice a second."""
        self._close_before(time.monotonic())

    def _close_before(self, deadline: float) -> None:
        for request, its_deadline in self._deadlines.copy().items():
            if its_deadline <= deadline:
                with suppress(OSError):  # already closed
                    request.shutdown(socket.SHUT_RDWR)

    def shutdown_request(self, request: Any) -> None:
        """Close a connection, after its thread has ended or could not be started."""
        super().shutdown_request(request)
        if self._deadlines.pop(request, None) is not None:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore browsers that disconnect before the answer; report all other exceptions."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _port(text: str) -> int:
    if not 0 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return int(text)


def main() -> int:
    """Run the command until Ctrl-C."""
    parser = command_parser("trainer.predict.demo", __doc__)
    add_run_arguments(parser)
    parser.add_argument(
        "--port", type=_port, default=_PORT, metavar="N", help=f"port on this machine (default {_PORT}; 0: a free port)"
    )
    arguments = parser.parse_args()
    with Server(DrawingClassifier(Predictor(arguments.run, arguments.device)), arguments.port) as server:
        print(f"draw at http://{_HOST}:{server.server_port}/ (stop with Ctrl-C)", flush=True)
        server.serve_forever()
    return 0


if __name__ == "__main__":
    run_command(main)
