"""Credentials in addresses: this process knows them, and everything that it writes or prints holds *** instead.

Command lines and settings are hidden when they are read, so that the rest of the program never sees a credential.
Only the client of a remote storage reveals them.
"""

from __future__ import annotations

import base64
import os
import re
import urllib.parse
from typing import Any, NamedTuple

HIDDEN = "***"
PLACEHOLDER = "USER:PASSWORD@"  # in hints
_START = re.compile(r"(?:[a-z0-9]{1,20}::){0,3}[a-z][a-z0-9+.-]{1,20}:/+", re.I)
_IN_TEXT = re.compile(rf"{_START.pattern}[^\s'\"<>`]+", re.I)
_HOST_END = re.compile("[/?#]")
_PATH_END = re.compile("[?#]")
_PORT = re.compile(r"(?:\[[^]]*\]|[^:]*):\d*")
_CLOSED_BY = {"'": "'", '"': '"', "[": "]", "{": "}", "(": ")"}
_SHORTEST = 6  # characters of a credential that is searched for in text outside of addresses
_ENVIRONMENT = re.compile(r"(SECRET|TOKEN|PASSWORD|SECRET_ACCESS_KEY|API_?KEY)$", re.I)

# Parameters of signed addresses of S3, Google, CloudFront and Azure, and of tokens.
_SIGNATURE = re.compile(
    r"(X-(Amz|Goog)-.*|.*(token|sig|signature|key|key-?id|policy|expires|secret|password|auth)|s[evprt]|sk\w+|AWSAccessKeyId)$",
    re.I,
)

_addresses: dict[str, str] = {}
"""Addresses by their hidden form."""
_secrets: set[str] = set()
"""Credentials of these addresses, in all forms in which a message may contain them."""


class AddressParts(NamedTuple):
    """The parts of an address; their concatenation is the address."""

    scheme: str
    """With colon and slashes."""
    user: str
    """User and password up to the @, which is included; empty if there is none."""
    path: str
    """Host and path."""
    query: str
    """Query and fragment, from their ? or # on."""


def parse_address(address: str) -> AddressParts:
    """Divide an address. A password may contain a slash or a question mark, as the keys of S3 do."""
    match = _START.match(address)
    scheme = match[0] if match else ""
    rest = address[len(scheme) :]
    user = _user_before_host(rest)
    after = rest[len(user) :]
    host = _HOST_END.split(after, 1)[0]
    if ":" in host and "@" in after and (scheme.lower().startswith(("s3", "gs")) or not _PORT.fullmatch(host)):
        password, at, after = after.partition("@")
        user += password + at + _user_before_host(after)
    path = _PATH_END.split(rest[len(user) :], 1)[0]
    return AddressParts(scheme, user, path, rest[len(user) + len(path) :])


def _user_before_host(text: str) -> str:
    return text[: _HOST_END.split(text, 1)[0].rfind("@") + 1]


def hide(value: Any, depth: int = 3) -> Any:
    """Return a setting or an argument with *** for the credentials of an address in it, which `reveal` restores.

    Values that hold no credentials, and those of other types, are returned unchanged. Dictionaries and lists are
    searched to a depth.
    """
    if isinstance(value, dict) and depth:
        return {name: hide(inner, depth - 1) for name, inner in value.items()}
    if isinstance(value, list) and depth:
        return [hide(inner, depth - 1) for inner in value]
    if not isinstance(value, str) or ":/" not in value or (match := _START.search(value)) is None:
        return value
    before, address, after = value[: match.start()], value[match.start() :], ""
    if before and before[-1] in _CLOSED_BY:
        closing = address.rfind(_CLOSED_BY[before[-1]])
        address, after = (address[:closing], address[closing:]) if closing > 0 else (address, "")
    shown = _shown(address)
    number = 1
    while shown != address and _addresses.setdefault(shown, address) != address:
        number += 1  # another address looks the same
        shown = _shown(address, f"{HIDDEN}{number}")
    if shown != address:
        _remember(address)
    return before + shown + after


def reveal(address: str) -> str:
    """Return an address with the credentials that `hide` has replaced."""
    match = _START.search(address)
    start = match.start() if match else 0
    return address[:start] + _addresses.get(address[start:], address[start:])


def canonical_address(address: str) -> str:
    """Return a text that is the same for two addresses of one file, however they are signed, for hashing."""
    scheme, _, path, query = parse_address(reveal(address))
    kept = [pair for pair in urllib.parse.parse_qsl(query[1:]) if not _SIGNATURE.match(pair[0])]
    return f"{scheme.lower()}{path.rstrip('/')} {kept}" if kept else f"{scheme.lower()}{path.rstrip('/')}"


def is_incomplete(address: str) -> bool:
    """Whether an address has *** in place of credentials that this process does not know."""
    parts = parse_address(reveal(address))
    return parts.user.startswith(HIDDEN) or parts.query[1:].startswith(HIDDEN)


def redact(text: str) -> str:
    """Return a message with *** for the credentials of all addresses in it, and for those known to this process."""
    for shown, address in sorted(_addresses.items(), key=lambda pair: len(pair[1]), reverse=True):
        text = text.replace(address, shown)
    named = (value for name, value in os.environ.items() if len(value) > _SHORTEST and _ENVIRONMENT.search(name))
    for secret in sorted({*_secrets, *named}, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_TEXT.sub(lambda match: _shown(match[0]), text) if ":/" in text else text


def known_addresses() -> dict[str, str]:
    """Return what `restore_addresses` needs in a process that does not inherit the memory of this one."""
    return dict(_addresses)


def restore_addresses(addresses: dict[str, str]) -> None:
    """Add the addresses of another process."""
    _addresses.update(addresses)
    for address in addresses.values():
        _remember(address)


def _shown(address: str, hidden: str = HIDDEN) -> str:
    scheme, user, path, query = parse_address(address)
    if user:
        user = user if user.startswith(HIDDEN) or user == PLACEHOLDER else f"{hidden}@"
    if query.strip("?#") and not query[1:].startswith(HIDDEN):
        end = query[len(query.rstrip("].,:;)}")) :]  # punctuation of the text around
        query = query[0] + hidden + end
    return scheme + user + path + query


def _remember(address: str) -> None:
    """Add the credentials of an address to those that `redact` removes."""
    _, user, _, query = parse_address(address)
    name, _, password = user[:-1].partition(":")
    values = [pair.partition("=")[2] for pair in re.split("[&;]", query[1:])]
    plain = {address, user, user[:-1], name, password, query[1:], *values}
    plain |= {urllib.parse.unquote(text) for text in plain}
    encoded = {base64.b64encode(text.encode()).decode() for text in plain}
    quoted = {urllib.parse.quote(text, safe) for text in plain for safe in ("", "/")}
    quoted |= set(map(urllib.parse.quote_plus, plain))
    # A short name of a user is a common word.
    _secrets.update(
        text for text in plain | encoded | quoted if len(text) >= _SHORTEST and (text != name or len(text) > 9)
    )
