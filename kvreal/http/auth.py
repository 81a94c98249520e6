"""Who may ask: bearer tokens with a role, and nobody that a web page has sent.

A tokens file has a line a token, ``role token``; roles are ``read`` and ``move``, and ``move`` may read as well:

    # dashboards
    read  v7Yc...
    move  pX31...

Without tokens everyone on this machine may ask, and only they (the controller then binds to loopback only); but not a
web page in somebody's browser, which reaches loopback just as well: requests that a browser marks as another site's
are refused, and so are those that name another host (DNS rebinding).
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Final, Optional, Tuple

from fastapi import Depends, HTTPException, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from fastapi.security.utils import get_authorization_scheme_param

from kvreal.endpoints import is_loopback

log = logging.getLogger("kvmove.auth")

ROLES: Final[Dict[str, Tuple[str, ...]]] = {"read": ("read",), "move": ("read", "move")}
"""Role of a token -> what it may do."""
SHORTEST: Final = 16
LONGEST: Final = 512
_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/=-]+")
_WHENCE: Final = frozenset({b"host", b"origin", b"sec-fetch-site"})
_CHALLENGE: Final = {"WWW-Authenticate": 'Bearer realm="kvmove"'}

AuthDependency = Callable[[str], Callable[..., Any]]
"""Role ("read" or "move") -> a dependency that raises HTTPException(401 or 403)."""


class TokensError(Exception):
    """One line: which file and line, and what was expected."""


class Tokens:
    """Digests of the tokens and what each may do; the tokens themselves are not kept."""

    def __init__(self, roles: Dict[bytes, str]) -> None:
        self.roles: Dict[bytes, str] = roles

    def role(self, token: str) -> Optional[str]:
        """The token's role, None if it is none. Takes as long whichever it is: every digest is compared in full."""
        digest = _digest(token)
        found: Optional[str] = None
        for known, role in self.roles.items():
            if hmac.compare_digest(known, digest):
                found = role
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def read_tokens(path: Path) -> Tokens:
    """TokensError names the file and line. A token itself is never repeated."""
    try:
        mode = path.stat().st_mode
        lines = path.read_text().splitlines()
    except OSError as error:
        raise TokensError(f"{path}: cannot read the tokens: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokensError(f"{path}: is no text file of tokens") from error
    roles: Dict[bytes, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        where = f"{path}:{number}"
        if len(words) != 2:
            raise TokensError(f"{where}: {len(words)} words, expected a role and a token")
        role, token = words
        if role not in ROLES:
            raise TokensError(f"{where}: unknown role {role[:20]!r}, expected one of {', '.join(ROLES)}")
        if not SHORTEST <= len(token) <= LONGEST:
            raise TokensError(f"{where}: a token of {len(token)} characters, expected {SHORTEST} to {LONGEST}")
        if not _TOKEN.fullmatch(token):
            raise TokensError(f"{where}: a token has letters, digits and ._~+/=- only (RFC 6750)")
        if _digest(token) in roles:
            raise TokensError(f"{where}: this token is there twice")
        roles[_digest(token)] = role
    if not roles:
        raise TokensError(f"{path}: no tokens, expected lines of a role and a token")
    if mode & 0o004:
        log.warning("%s: everyone on this machine can read it: chmod 600 is safer", path)
    return Tokens(roles)


class Guard:
    """What routes depend on: ``guard("move")``. ``admit`` asks the same at once."""

    def __init__(self, tokens: Optional[Tokens]) -> None:
        self.tokens: Optional[Tokens] = tokens

    def __call__(self, role: str) -> Callable[..., Any]:
        if self.tokens is None:
            return _only_from_here
        bearer = HTTPBearer(auto_error=False, description="A token of the controller's tokens file")

        async def check(
            request: Request,
            given: Optional[HTTPAuthorizationCredentials] = Depends(bearer),  # noqa: B008
        ) -> None:
            self.admit(role, request)

        return check

    def admit(self, role: str, request: Request) -> None:
        """HTTPException(401 or 403) if whoever asks may not."""
        if self.tokens is None:
            _here(request)
            return
        scheme, token = get_authorization_scheme_param(request.headers.get("authorization"))
        if not token or scheme.lower() != "bearer":
            raise HTTPException(401, "no token: send Authorization: Bearer TOKEN", _CHALLENGE)
        has = self.tokens.role(token)
        if has is None:
            raise HTTPException(401, "unknown token", _CHALLENGE)
        if role not in ROLES[has]:
            raise HTTPException(403, f"this token may {' and '.join(ROLES[has])}; this needs {role}")


def dependency(tokens: Optional[Tokens]) -> Guard:
    """With tokens: who has one. Without: whoever is on this machine, and no web page."""
    return Guard(tokens)


async def _only_from_here(request: Request) -> None:
    _here(request)


@lru_cache(1024)
def _names_here(host: str) -> bool:
    name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
    return is_loopback(name.lower())


def _here(request: Request) -> None:
    said: Dict[bytes, str] = {}
    for name, value in request.scope["headers"]:
        if name in _WHENCE:
            said.setdefault(name, value.decode("latin-1"))
    host = said.get(b"host", "")
    if not _names_here(host):
        raise HTTPException(403, f"without tokens this answers to localhost only, not to {host[:80]!r}")
    if said.get(b"sec-fetch-site", "none") in ("cross-site", "same-site"):
        raise HTTPException(403, "another site's page sent this")
    origin = said.get(b"origin", "")
    if origin and origin.partition("://")[2] != host:
        raise HTTPException(403, f"a page of {origin[:80]} sent this")
