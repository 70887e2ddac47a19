"""Credentials of addresses: hidden wherever they are displayed or stored, revealed to the clients of storages."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import urllib.parse
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_module
from PIL import Image
from support.http_server import serving
from support.wandb_server import wandb_server

from shards import UserError, credentials
from shards.credentials import canonical_address, hide, is_incomplete, parse_address, redact, reveal
from shards.remote import http_backend
from shards.remote.backends import open_storage
from trainer.config import load as config
from trainer.config.schema import Config, DataConfig

CANARY = "c4nary+Pa/ss"
QUOTED = urllib.parse.quote(CANARY, safe="")
# What of the canary must not be found anywhere; parts of it as well, where an address is cut in the wrong place.
TRACES = ("c4nary", base64.b64encode(f"anna:{CANARY}".encode()).decode()[:16], base64.b64encode(b"c4nary")[:7].decode())

FORMS = [
    (f"https://anna:{QUOTED}@host/set", "https://***@host/set"),
    (f"https://anna:{QUOTED}@host:8080/set?token={QUOTED}&x=1", "https://***@host:8080/set?***"),
    (f"http://host?token={CANARY}", "http://host?***"),
    (f"http://host/set#token={CANARY}", "http://host/set#***"),
    (f"http://host/set?email=a@b.org&sig={QUOTED}", "http://host/set?***"),
    (f"HTTPS://{QUOTED}@Host/set", "HTTPS://***@Host/set"),
    (f"https://anna:{CANARY}@host/set", "https://***@host/set"),
    (f"https://an@na:{CANARY}@host/set@v1", "https://***@host/set@v1"),
    (f"https://anna:{CANARY}?#@host/set", "https://***@host/set"),
    (f"https://anna:{CANARY}@[::1]:80/set", "https://***@[::1]:80/set"),
    (f"https://host/set?X-Amz-Credential=K%2F1&X-Amz-Signature={QUOTED}&X-Amz-Expires=9", "https://host/set?***"),
    (f"https://host/set?next=https://other/x&sig={QUOTED}", "https://host/set?***"),
    (f"https://anna:{QUOTED} with spaces@host/set", "https://***@host/set"),
    (f"s3://AKIAKEY:{CANARY}@bucket/set", "s3://***@bucket/set"),
    (f"s3://AKIAKEY:12/{CANARY}@bucket/set", "s3://***@bucket/set"),
    (f"S3A://AKIAKEY:{QUOTED}@bucket", "S3A://***@bucket"),
    (f"hf://user:{CANARY}@datasets/a/b@main", "hf://***@datasets/a/b@main"),
    (f"ftp://anna:{QUOTED}@host/set", "ftp://***@host/set"),
    (f"simplecache::https://anna:{QUOTED}@host/set", "simplecache::https://***@host/set"),
    (f"https:/anna:{QUOTED}@host/set", "https:/***@host/set"),
    (f"file:///data/set?token={QUOTED}", "file:///data/set?***"),
]
OPEN = [
    "data/shards/digits",
    "/data/a@b:c?d",
    "C:/data/a@b",
    "hf://datasets/user/name@main/train",
    "http://host:8000/set@v2",
    "s3://bucket/a@b",
    "https://USER:PASSWORD@HOST/...",
    "see https://host/page.html, or data/set",
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the addresses of other tests."""
    monkeypatch.setattr(credentials, "_addresses", {})
    monkeypatch.setattr(credentials, "_secrets", set())


@pytest.mark.parametrize(("address", "shown"), FORMS)
def test_an_address_is_hidden_and_revealed(address: str, shown: str) -> None:
    assert hide(address) == shown
    assert hide(shown) == shown
    assert reveal(shown) == address
    assert reveal(address) == address
    assert not is_incomplete(shown)
    assert "".join(parse_address(address)) == address
    parts = (CANARY, QUOTED, urllib.parse.quote(CANARY)) if address.count(f":{CANARY}@") else ()
    for text in (address, urllib.parse.quote(address), urllib.parse.quote_plus(address), *parts):
        assert "c4nary" not in redact(f"nothing at {text}: 404")


@pytest.mark.parametrize(("address", "shown"), FORMS)
@pytest.mark.parametrize("around", ["data.shards={}", "data.shards='{}'", 'data: {{shards: "{}"}}', "[{}]"])
def test_an_argument_with_an_address(address: str, shown: str, around: str) -> None:
    assert hide(around.format(address)) == around.format(shown)
    assert reveal(shown) == address


@pytest.mark.parametrize("text", OPEN)
def test_addresses_without_credentials_stay_as_they_are(text: str) -> None:
    assert hide(text) == reveal(text) == redact(text) == text


def test_addresses_of_which_nothing_is_known_are_redacted_in_text() -> None:
    """An endpoint of the environment, for instance, in an error of a library."""
    text = "Could not connect to the endpoint URL: 'https://anna:c4nary@host/x?sig=c4nary' (see http://a.org/b?c4nary)."
    assert redact(text) == "Could not connect to the endpoint URL: 'https://***@host/x?***' (see http://a.org/b?***)."


def test_credentials_of_the_environment_are_redacted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", CANARY)
    assert redact(f"The request signed with {CANARY} failed") == "The request signed with *** failed"


def test_two_addresses_that_look_alike() -> None:
    first, second = "https://host/set?id=1", "https://host/set?id=2"
    assert (hide(first), hide(second), hide(first)) == ("https://host/set?***", "https://host/set?***2", hide(first))
    assert [reveal(hide(address)) for address in (first, second)] == [first, second]


def test_an_address_is_the_same_file_with_another_signature() -> None:
    base = "https://anna:x@host/set/?id=1"
    assert canonical_address(base) == canonical_address(
        "https://host/set?id=1&X-Amz-Signature=abc&X-Amz-Date=5&token=x"
    )
    assert canonical_address(base) != canonical_address("https://host/set?id=2")
    assert canonical_address("s3://a:b@bucket/x") == "s3://bucket/x"


def test_settings_hold_no_credentials(tmp_path: Path) -> None:
    address, shown = FORMS[1]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data": {"shards": address}}))
    for settings in (
        config.load(recipe, []),
        config.load(Path("quickstart"), [f"data.shards={address}"]),
        Config(data=DataConfig(shards=address)),
        config.replace_settings(Config(data=DataConfig(shards=address)), {"trainer.epochs": 3}, "a test"),
    ):
        assert settings.data.shards == shown
        assert "c4nary" not in settings.to_yaml() + repr(settings) + settings.model_dump_json()
        assert reveal(settings.data.shards) == address
    # A stored recipe finds the credentials that the command line names.
    assert reveal(yaml.safe_load(settings.to_yaml())["data"]["shards"]) == address


def test_an_address_stored_without_its_credentials_is_named_again() -> None:
    with pytest.raises(
        UserError, match=r"https://\*\*\*@host/set\?\*\*\*, an address without its credentials"
    ) as caught:
        open_storage("https://***@host/set?***")
    assert "data.shards=ADDRESS" in caught.value.hint


def test_errors_and_logs_are_redacted(caplog: pytest.LogCaptureFixture) -> None:
    from shards import cli

    address, shown = FORMS[0]
    error = UserError(f"no way to reach {address}: 404", f"not {address}", f"try {address}")
    assert str(error) == f"error: no way to reach {shown}: 404\nexpected: not {shown}\nhint: try {shown}"
    factory = logging.getLogRecordFactory()
    try:
        logging.setLogRecordFactory(cli._redacted_record)
        logging.getLogger("botocore").warning("retrying %s", address)
    finally:
        logging.setLogRecordFactory(factory)
    assert caplog.messages == [f"retrying {shown}"]


CRASH = f"""
import logging, sys, threading, warnings
from shards.cli import hide_credentials
hide_credentials()
address, secret = "http://anna:{QUOTED}@host/x", "{CANARY}"
assert "c4nary" not in sys.argv[1]
warnings.warn(f"no {{address}}")
logging.warning("no %s", address)
def fail(form):
    raise OSError(f"{{form}}: {{address}} {{secret}}")
try:
    fail("logged")
except OSError:
    logging.exception("no %s", address)
thread = threading.Thread(target=fail, args=("thread",))
thread.start()
thread.join()
class Finalized:
    def __del__(self):
        fail("finalizer")
Finalized()
fail("main")
"""


def test_tracebacks_and_warnings_are_redacted() -> None:
    command = [sys.executable, "-W", "always", "-c", CRASH, f"http://anna:{QUOTED}@host/x"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == 1
    for form in ("logged", "thread", "finalizer", "main"):
        assert f"OSError: {form}: http://***@host/x ***\n" in process.stderr
    assert process.stderr.count("no http://***@host/x\n") == 3
    assert "c4nary" not in process.stderr + process.stdout


def test_the_keys_of_an_s3_address_are_used() -> None:
    pytest.importorskip("s3fs", reason="no s3fs (pip install -e '.[s3]')")
    storage = open_storage("s3://AKIAKEY:se%2Bcret/x@bucket/set")
    assert (storage._fs.key, storage._fs.secret, storage._root) == ("AKIAKEY", "se+cret/x", "bucket/set")


class Handler(SimpleHTTPRequestHandler):
    """Serves files to whoever knows the password or the token."""

    def do_GET(self) -> None:
        sent = base64.b64encode(f"anna:{CANARY}".encode()).decode()
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        if self.headers.get("Authorization") != f"Basic {sent}" and query.get("token") != [CANARY]:
            return self.send_error(403, f"not with {self.headers.get('Authorization')} and {self.path}")
        return super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def port(digits_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server with `digits`, a packed set, and `raw`, a directory of image files in two classes."""
    root = tmp_path_factory.mktemp("web")
    (root / "digits").symlink_to(digits_set)
    for name in ("raw/a/1.png", "raw/a/2.png", "raw/b/1.png", "raw/b/2.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), len(name)).save(root / name)
    shutil.make_archive(str(root / "raw"), "zip", root / "raw")
    with serving(ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root))) as server:
        yield server.server_port


def test_a_login_of_netrc_is_used_and_hidden(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    address = f"http://127.0.0.1:{port}/digits"
    with pytest.raises(UserError, match="no permission"):
        open_storage(address).info("train/manifest.json")
    (tmp_path / ".netrc").write_text(
        f"machine other login x password y\nmachine 127.0.0.1 login anna password {CANARY}\n"
    )
    (tmp_path / ".netrc").chmod(0o600)
    assert open_storage(address).info("train/manifest.json").bytes > 0
    assert redact(f"{CANARY} {QUOTED}") == "*** ***"
    with pytest.raises(UserError, match="no permission"):
        open_storage(f"http://anna:wrong@127.0.0.1:{port}/digits").info("train/manifest.json")
    http_backend._warn_of_netrc.cache_clear()
    for content, mode, reason in (
        (b"machine \xff\n", 0o600, "it is not UTF-8"),
        (f"machine 127.0.0.1\nlogin anna {CANARY}\n".encode(), 0o600, "near line 3 it cannot be read"),
        (f"machine 127.0.0.1 login anna password {CANARY}\n".encode(), 0o644, "~/.netrc access too permissive"),
    ):
        (tmp_path / ".netrc").write_bytes(content)
        (tmp_path / ".netrc").chmod(mode)
        caplog.clear()
        with pytest.raises(UserError, match="no permission"):
            open_storage(address).info("train/manifest.json")
        [message] = caplog.messages
        assert message.startswith(f"~/.netrc is ignored: {reason}") and CANARY not in message


@pytest.mark.parametrize(
    "entries", ["", "machine other login anna password {}\n", "machine 127.0.0.1x login a password b\n"]
)
def test_the_default_login_of_netrc_is_sent_to_no_server(
    port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path, address = tmp_path / ".netrc", f"http://127.0.0.1:{port}/digits"
    default = f"default login anna password {CANARY}\n"
    path.write_text(entries.format(CANARY) + default)
    path.chmod(0o600)
    with pytest.raises(UserError, match=r"no permission .* not with None"):
        open_storage(address).info("train/manifest.json")
    assert open_storage("http://default/digits")._authorization is None
    path.write_text(f"machine 127.0.0.1 login anna password {CANARY}\n{default}")
    assert open_storage(address).info("train/manifest.json").bytes > 0


def _search(directory: Path) -> list[str]:
    """The files below a directory whose name or content has a trace of the canary, compressed contents included."""
    found = []
    for folder, _, names in os.walk(directory):
        for path in (Path(folder) / name for name in names):
            content = path.read_bytes() if path.is_file() else b""
            with contextlib.suppress(OSError):
                content += gzip.decompress(content)
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    content += b"".join(map(archive.read, archive.namelist()))
            if any(trace in str(path) or trace.encode() in content for trace in TRACES):
                found.append(str(path))
    return found


RECIPE = """
data: {resolution: 8, val_fraction: 0.1}
model: {name: three_block_cnn}
loader: {batch_size: 256}
trainer: {epochs: 1, precision: fp32, profile: true, trace: [1, 2]}
logging: {tensorboard: true, wandb: auto}
device: cpu
"""
SEARCH = """
recipe: ../secret.yaml
dir: study
budget: {trials: 2}
space: {optim.lr: {type: float, low: 1.0e-4, high: 1.0e-2, log: true}}
"""


@dataclass
class User:
    """Somebody who types commands in a directory, none of which may print the canary."""

    home: Path
    environment: dict[str, str]

    @property
    def work(self) -> Path:
        return self.home / "work"

    def run(self, module: str, *arguments: object, status: int = 0) -> str:
        process = run_module(module, *arguments, cwd=self.work, timeout=600, **self.environment)
        output = process.stdout + process.stderr
        assert process.returncode == status, output
        for trace in TRACES:
            assert trace not in output, output
        return output

    def traces(self) -> list[str]:
        return _search(self.work) + _search(self.home / "cache")


@pytest.fixture
def user(tmp_path: Path) -> User:
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **dict.fromkeys([name for name in os.environ if name.lower().endswith("_proxy")], ""),
        **{"INKSTREAM_CACHE": str(tmp_path / "cache"), "WANDB_MODE": "offline", "PYTHONWARNINGS": "default"},
        **{"TMPDIR": str(work), "HOME": str(work)},
    }
    return User(tmp_path, environment)


def _write_recipes(user: User, digits: str) -> None:
    (user.work / "recipe.yaml").write_text(RECIPE)
    (user.work / "search.yaml").write_text(SEARCH)
    secret = RECIPE.replace("{resolution", f"{{shards: '{digits}', resolution")
    (user.home / "secret.yaml").write_text(secret)


HTTP_FORMS = [
    f"http://anna:{QUOTED}@127.0.0.1:PORT/{{}}?token={QUOTED}",
    f"http://127.0.0.1:PORT/{{}}?x=1&token={QUOTED}&X-Amz-Signature={QUOTED}",
    f"http://anna:{CANARY}@127.0.0.1:PORT/{{}}",
]


def test_no_command_writes_or_prints_credentials(port: int, user: User) -> None:
    address = HTTP_FORMS[0].replace("PORT", str(port))
    digits, wrong = address.format("digits"), address.format("absent")
    _write_recipes(user, digits)
    run, shards = user.run, f"data.shards={digits}"
    shown = digits.replace(f"anna:{QUOTED}", "***").replace(f"token={QUOTED}", "***")
    assert f"shards: {shown}" in run("trainer.run", "recipe.yaml", shards, "--dry-run")
    run("trainer.run", "recipe.yaml", shards, "run.dir=run")
    assert shown in (user.work / "run" / "config.yaml").read_text()
    assert f"data.shards={shown}" in json.loads((user.work / "run" / "env.json").read_text())["command"]
    # The stored recipe needs the credentials again, and takes them from the command line.
    output = run("trainer.run", "run/config.yaml", "run.dir=run", "resume=auto", status=2)
    assert f"{shown}, an address without its credentials" in output
    assert "run already complete" in run("trainer.run", "run/config.yaml", shards, "run.dir=run", "resume=auto")
    run("trainer.evaluate", "run", digits, "--json", "metrics.json")
    assert "an address without" in run("trainer.report", "run", status=2)
    for module, *arguments in _failing(digits, wrong)[:4]:
        run(module, *arguments, status=2)
    assert user.traces() == []


def _failing(digits: str, wrong: str) -> list[tuple[str, ...]]:
    """Commands that end with a message which may name an address."""
    return [
        ("trainer.run", "recipe.yaml", f"data.shards={wrong}"),
        ("trainer.run", "recipe.yaml", f"data.shard={wrong}"),
        ("trainer.run", "recipe.yaml", f"data={wrong}"),
        ("trainer.run", wrong),
        ("trainer.evaluate", "run", wrong),
        ("trainer.evaluate", wrong, digits, "--no-such-option", digits),
        ("trainer.predict", "run", wrong),
        ("trainer.export", "run", "--format", "onnx", "--shards", wrong),
        ("shards.verify", wrong),
        ("shards.convert", wrong, "there"),
        ("shards.index", wrong),
        ("pipeline.shard", "folder", "--raw", wrong, "--out", "there"),
        ("pipeline.shard", "digits", "--out", wrong),
        ("trainer.report", wrong),
        ("trainer.tune", "search.yaml", f"recipe={wrong}"),
        ("benchmarks.resolution_sweep", "--shards", wrong),
        ("benchmarks.ablation", "--shards", wrong),
        (str(ROOT / "inkstream.py"), wrong),
    ]


def _everything(user: User, digits: str, wrong: str, raw: str) -> None:
    """Every command that reads an address, with all outputs that there are."""
    _write_recipes(user, digits)
    run, shards = user.run, f"data.shards={digits}"
    run("trainer.run", "recipe.yaml", shards, "--dry-run")
    run("trainer.run", "recipe.yaml", shards, "run.dir=run")
    run("trainer.run", "../secret.yaml", "run.dir=second", "seed=1")
    run("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "trainer.run", "recipe.yaml", shards)
    run("trainer.report", "run", "--shards", digits)
    run("trainer.report", "run", "second")
    run("trainer.evaluate", "run", digits, "--json", "metrics.json")
    for form in ("onnx", "torch-export", "safetensors"):
        run("trainer.export", "run", "--shards", digits, "--format", form)
    outputs = ("--csv", "predictions.csv", "--json", "predictions.json", "--sheet", "sheet.png")
    run("trainer.predict", "run", digits, *outputs)
    run("trainer.predict.pseudo_label", "run", digits, "--confidence", 0.1, "--csv", "labels.csv")
    run("trainer.loop.find_batch_size", "recipe.yaml", shards)
    run("pipeline.dedup.overlap", digits, digits, "--csv", "overlap.csv")
    run("trainer.tune", "search.yaml", "--workers", 2)
    run("shards.verify", digits)
    run("shards.convert", digits, "converted", "--store", "zarr")
    run("pipeline.preview", digits, "--out", "preview.png")
    run("pipeline.shard", "folder", "--raw", raw, "--out", "packed", "--test-fraction", 0.5)
    sweep = ("--shards", digits, "--resolutions", "8", "--seeds", 1, "--epochs", 1, "--seconds", 0.2)
    run("benchmarks.resolution_sweep", *sweep, "--subset", 0.1, "--out", "sweep")
    for module, *arguments in _failing(digits, wrong):
        run(module, *arguments, status=2)
    assert user.traces() == []


@pytest.mark.slow
@pytest.mark.parametrize("form", HTTP_FORMS)
def test_no_file_holds_credentials_of_a_web_address(form: str, port: int, user: User) -> None:
    address = form.replace("PORT", str(port))
    git = ["git", "-c", "init.defaultBranch=main", "-C", str(user.home)]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "remote", "add", "origin", f"https://anna:{CANARY}@host/a.git"], check=True)
    with wandb_server() as (environment, received):
        user.environment |= environment | {"WANDB_MODE": "online"}
        _everything(user, address.format("digits"), address.format("absent"), address.format("raw.zip"))
    assert len(received) > 20
    assert [body for body in received if any(trace.encode() in body for trace in TRACES)] == []
