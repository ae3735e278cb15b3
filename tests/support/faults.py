"""These are the ways in which `FaultServer` fails."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from typing import Literal

FaultKind = Literal[
    "refuse",
    "reset",
    "stall",
    "trickle",
    "truncate",
    "lie",
    "wrong",
    "ignore_range",
    "status",
    "new_etag",
    "redirect",
]


@dataclass(frozen=True)
class Fault:
    """One kind of failure, and the requests that it is injected into.

    - `refuse`: the connection is reset before there is an answer. (`FaultServer.down()` refuses
      connections for real.)
    - `reset`: the connection is reset within the body.
    - `stall`: the rest of the body never comes. Ends when the client gives up or the server closes.
    - `trickle`: the body comes in small pieces, with pauses in between.
    - `truncate`: the body ends early, though `Content-Length` promised more.
    - `lie`: the body ends early, and `Content-Length` says so, against `Content-Range`.
    - `wrong`: status 200 with `body`, as the login pages of hotels do.
    - `ignore_range`: status 200 with the whole file.
    - `status`: an HTTP error, with `Retry-After` if given.
    - `new_etag`: the file, but under another ETag.
    - `redirect`: status 302 to `location`.
    """

    kind: FaultKind
    _: KW_ONLY
    path: str = "*"
    """Files that it is for, as a shell pattern."""
    nth: int | None = None
    """Only the n-th request that `path` matches, counted from 1."""
    first: int | None = None
    """Only the first so many requests that `path` matches. Neither: all of them."""
    after_bytes: int = 0
    """Bytes of the body that are sent before a `reset`, a `stall`, or the end of a short one."""
    status: int = 503
    """The status that `status` answers with."""
    retry_after: str = ""
    """The Retry-After header of `status`: seconds, or an HTTP date."""
    pause_s: float = 0.01
    """Between the pieces of `trickle`."""
    piece_bytes: int = 1024
    """Their size."""
    body: bytes = b"<html>Please sign in</html>"
    """The body that `wrong` and `status` send."""
    location: str = ""
    """The target of `redirect`."""
