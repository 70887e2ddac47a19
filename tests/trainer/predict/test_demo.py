"""The page to draw on: answers drawings, and nothing and nobody else."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import ROOT
from PIL import Image, ImageDraw
from support import warm_process

from shards import UserError
from trainer.predict import demo
from trainer.predict.demo import DrawingClassifier, Server
from trainer.predict.predictor import Predictor

PNG = {"Content-Type": "image/png"}


@pytest.fixture(scope="module")
def server(digits_run: Path) -> Iterator[int]:
    """The command as a process; the port that it took. At its end it must stop as any command does on Ctrl-C."""
    process = warm_process.Popen(
        [sys.executable, "-m", "trainer.predict.demo", str(digits_run), "--port", "0"],
        cwd=ROOT,
        env=dict(os.environ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())
        assert found is not None
        yield int(found[1])
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors == "stopped\n"
    finally:
        process.kill()


def ask(port: int, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None):
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, response.headers, content


def drawing(size: tuple[int, int] = (256, 256), blank: bool = False) -> bytes:
    image = Image.new("RGB", size, "white")
    if not blank:
        ImageDraw.Draw(image).line((size[0] // 2, size[1] // 5, size[0] // 2, size[1] * 4 // 5), "black", 20)
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def test_the_page_needs_nothing_from_elsewhere(server: int) -> None:
    status, headers, content = ask(server, "GET", "/")
    page = content.decode()
    assert status == 200
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    nonce = re.search("script-src 'nonce-([^']+)'", headers["Content-Security-Policy"])
    assert nonce is not None
    assert page.count(f'nonce="{nonce[1]}"') == 2
    assert re.findall(r"(?:src|href)=\"(?!data:)", page) == []
    assert "10 classes" in page


def test_a_drawing_is_answered(server: int) -> None:
    status, _, content = ask(server, "POST", "/predict", drawing(), PNG)
    answer = json.loads(content)
    assert status == 200
    assert len(answer["top"]) == 5
    shares = [one["probability"] for one in answer["top"]]
    assert shares == sorted(shares, reverse=True)
    assert answer["top"][0]["class"] == "1"
    assert answer["image"].startswith("data:image/png;base64,")
    assert answer["size"] == [16, 16]
    assert json.loads(ask(server, "POST", "/predict", drawing(blank=True), PNG)[2]) == {"top": []}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),  # a name that was led to 127.0.0.1
        ({"Host": "evil.example:{port}"}, 403),
        ({"Host": "127.0.0.1:1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
    ],
)
def test_requests_that_others_led_here_are_refused(server: int, headers: dict[str, str], status: int) -> None:
    headers = {name: value.format(port=server) for name, value in headers.items()}
    assert ask(server, "GET", "/", headers=headers)[0] == status
    assert ask(server, "POST", "/predict", drawing(), {**PNG, **headers})[0] == status


def test_bad_requests_are_answered_as_such(server: int) -> None:
    whole = drawing()
    for method, path, body, headers, status in (
        ("GET", "/other", b"", {}, 404),
        ("GET", "/../etc/passwd", b"", {}, 404),
        ("POST", "/", whole, PNG, 404),
        ("POST", "/predict", whole, {"Content-Type": "text/plain"}, 415),
        ("POST", "/predict", b"", PNG, 400),
        ("POST", "/predict", b"no picture", PNG, 400),
        ("POST", "/predict", whole[: len(whole) // 2], PNG, 400),
        ("POST", "/predict", whole, {**PNG, "Content-Length": "-1"}, 400),
        ("POST", "/predict", whole, {**PNG, "Content-Length": "many"}, 400),
        ("POST", "/predict", whole, {**PNG, "Transfer-Encoding": "chunked"}, 400),
        ("POST", "/predict", b"", {**PNG, "Content-Length": "2000000"}, 413),
        ("POST", "/predict", b"", {**PNG, "Content-Length": "9" * 5000}, 413),
        ("POST", "/predict", drawing((3000, 1000)), PNG, 400),
        ("DELETE", "/", b"", {}, 501),
    ):
        assert ask(server, method, path, body, headers)[0] == status, (method, path, headers)
    assert ask(server, "POST", "/predict", whole, PNG)[0] == 200, "and goes on"


def test_it_is_reached_from_this_machine_alone(server: int) -> None:
    addresses = {entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    for address in addresses - {"127.0.0.1"}:
        with pytest.raises(OSError), socket.create_connection((address, server), timeout=5):
            pass


def test_slow_and_idle_clients_do_not_keep_others_out(server: int) -> None:
    """More connections than threads: silent ones, and ones in the middle of a head or a body."""
    starts = (b"", b"GET / HTTP/1.1\r\n", b"POST /predict HTTP/1.1\r\nHost: localhost:%d\r\n" % server)
    starts += (starts[2] + b"Content-Type: image/png\r\nContent-Length: 1000\r\n\r\nabc",)
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server), timeout=30)) for _ in range(120)]
        for number, client in enumerate(clients):
            with suppress(OSError):
                client.sendall(starts[number % len(starts)])
        start = time.monotonic()
        for _ in range(3):
            assert ask(server, "POST", "/predict", drawing(), PNG)[0] == 200
        assert time.monotonic() - start < 9, "before the deadline of the others"
        assert clients[0].recv(1) == b"", "the oldest was closed"


def test_a_slow_client_is_closed_at_its_deadline(digits_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_TIMEOUT", 0.5)
    with Server(DrawingClassifier(Predictor(digits_run)), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as client:
            start = time.monotonic()
            while time.monotonic() - start < 10:  # a byte each 0.1 s is never a timeout of the socket
                try:
                    client.sendall(b"G")
                except OSError:
                    break
                time.sleep(0.1)
            assert time.monotonic() - start < 8
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("system", ["posix", "nt"])
def test_the_port_is_not_shared(monkeypatch: pytest.MonkeyPatch, digits_run: Path, system: str) -> None:
    """On Windows SO_REUSEADDR would let another program open it as well."""
    classifier = DrawingClassifier(Predictor(digits_run))
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", system)
        server = Server(classifier, 0)
    with server:
        assert bool(server.socket.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) == (system == "posix")


def test_a_port_in_use_is_told(server: int, digits_run: Path) -> None:
    with pytest.raises(UserError, match=f"(?s)port {server} .*--port 0"):
        Server(DrawingClassifier(Predictor(digits_run)), server)


def test_a_person_draws_and_sees_an_answer(server: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api")
    troubles: list[str] = []
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 375, "height": 812}, color_scheme="dark")
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.goto(f"http://127.0.0.1:{server}/")
        assert page.get_by_role("button", name="Undo").is_disabled()
        box = page.locator("#canvas").bounding_box()
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 375
        middle = box["x"] + box["width"] / 2
        page.mouse.move(middle, box["y"] + 0.2 * box["height"])
        page.mouse.down()
        page.mouse.move(middle, box["y"] + 0.8 * box["height"], steps=8)
        page.locator("#top li").first.wait_for()  # while the pen is still down
        page.mouse.up()
        page.locator("#spoken", has_text="It looks like 1").wait_for()
        assert page.locator("#top li").count() == 5
        assert page.locator("#top li .class").first.inner_text() == "1"
        assert page.locator("#picture").evaluate("picture => picture.naturalWidth") >= 224
        assert page.locator("#picture").get_attribute("alt")

        page.keyboard.press("Control+z")
        page.locator("#top").wait_for(state="hidden")
        page.locator("#canvas").focus()
        for key in (*["ArrowUp"] * 12, "Space", *["ArrowDown"] * 24, "Space"):
            page.keyboard.press(key)
        page.locator("#spoken", has_text="It looks like 1").wait_for()
        page.get_by_role("button", name="Clear").click()
        page.locator("#top").wait_for(state="hidden")
        chromium.close()
    assert troubles == []


def test_a_run_on_pictures_is_refused(digits_run: Path) -> None:
    predictor = Predictor(digits_run)
    predictor.adapter = replace(predictor.adapter, frame=None)
    with pytest.raises(UserError, match=r"trainer\.predict"):
        DrawingClassifier(predictor)
