"""Classifies the failure of one attempt: another may help, none can, or the object has changed.

In: an exception of any library, or an HTTP status. Out: an `AttemptFailed` of one of three kinds,
with a reason that holds no secret. Pure functions, but for the clock that dates are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from jest_stream.storage.redaction import redacted

Kind = Literal["again", "never", "changed"]

_LONGEST_REASON = 300

# By name: none of these packages is imported to recognise its errors.
_TRANSIENT = {
    "aiohttp.client_exceptions.ClientError",
    "botocore.exceptions.ConnectionError",
    "botocore.exceptions.HTTPClientError",
    "botocore.parsers.ResponseParserError",
    "fsspec.exceptions.FSTimeoutError",
    "google.auth.exceptions.TransportError",
    "httpx.TransportError",
    "httpx2.TransportError",
    "urllib3.exceptions.HTTPError",
}
_HOPELESS = {
    "aiohttp.client_exceptions.ClientConnectorCertificateError",
    "aiohttp.client_exceptions.InvalidURL",
    "aiohttp.client_exceptions.TooManyRedirects",
    "botocore.exceptions.InvalidProxiesConfigError",
    "huggingface_hub.errors.OfflineModeIsEnabled",
}


class AttemptFailed(Exception):
    """One attempt that did not work; never seen by users.

    Attributes:
      kind: "again" if it may work later, "never", or "changed" for an object that is another now.
      status: the HTTP status, where there was one.
      retry_after_s: how long the server asks to wait, if it does.
    """

    def __init__(
        self, kind: Kind, reason: str, *, status: int = 0, retry_after_s: float | None = None
    ) -> None:
        super().__init__(reason)
        self.kind = kind
        self.status = status
        self.retry_after_s = retry_after_s


def failure_of(error: BaseException) -> AttemptFailed:
    """Returns an exception of any library as a failure of one of the three kinds."""
    if isinstance(error, AttemptFailed):
        return error
    # There are four cases:
    # 1. An HTTP status decides, where there is one.
    # 2. A file that is missing or forbidden: stores raise these in place of 404 and 403.
    # 3. A class known to be hopeless, before those known to pass: a bad certificate is also a
    #    `ClientError`, and an `OSError`.
    # 4. Errors of the network pass. The others, such as a mistake in a program, stay.
    status, headers, code = _http_response_in(error)
    if code == "RequestTimeout":  # S3 says 400 to a connection that was too slow
        return AttemptFailed("again", _reason(error), status=status)
    if status:
        return failure_of_status(status, headers, _reason(error))
    kinds = type(error).__mro__
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in kinds}
    # Also without the module: httpx, for one, defines its classes in a private one.
    names |= {f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}" for kind in kinds}
    if isinstance(error, FileNotFoundError):
        return AttemptFailed("never", _reason(error), status=404)
    if isinstance(error, PermissionError):
        return AttemptFailed("never", _reason(error), status=403)
    if names & _HOPELESS or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return AttemptFailed("never", _reason(error))
    if names & _TRANSIENT or isinstance(error, OSError | TimeoutError | EOFError):
        return AttemptFailed("again", _reason(error))
    return AttemptFailed("never", _reason(error))


def failure_of_status(status: int, headers: Mapping[str, str], text: str = "") -> AttemptFailed:
    """Returns an HTTP status other than success as a failure.

    Args:
      status: the HTTP status.
      headers: of the response, names in lower case.
      text: more about it, without secrets.
    """
    reason = f"HTTP status {status}" + (f" ({text})" if text else "")
    # 412: the ETag of If-Match is not that of the object; 416: it ends before the range begins.
    if status in (412, 416):
        return AttemptFailed("changed", reason, status=status)
    # Too slow, too early, too many; and servers in trouble, but for those that lack a feature.
    if status in (408, 425, 429) or (status >= 500 and status not in (501, 505)):
        wait_s = retry_after_s(headers.get("retry-after", ""))
        return AttemptFailed("again", reason, status=status, retry_after_s=wait_s)
    return AttemptFailed("never", reason, status=status)


def retry_after_s(value: str) -> float | None:
    """Returns the seconds that a Retry-After header (a number or a date) asks for, or None."""
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:  # a date of the past means: at once
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _http_response_in(error: BaseException) -> tuple[int, Mapping[str, str], str]:
    """Returns status, headers and error code of the HTTP response that an exception is about."""
    seen: BaseException | None = error
    for _ in range(4):  # s3fs and huggingface_hub hide the response in the cause
        if seen is None:
            break
        response: Any = getattr(seen, "response", None)
        if isinstance(response, dict):  # botocore
            meta = response.get("ResponseMetadata", {})
            code = str(response.get("Error", {}).get("Code", ""))
            if status := int(meta.get("HTTPStatusCode", 0)):
                return status, _lowered(meta.get("HTTPHeaders", {})), code
        elif status := int(getattr(response, "status_code", 0) or 0):  # httpx, requests
            return status, _lowered(response.headers), ""
        own = getattr(seen, "status", None)
        if isinstance(own, int) and own >= 100:  # aiohttp
            return own, _lowered(getattr(seen, "headers", None) or {}), ""
        code = str(getattr(seen, "code", ""))
        if type(seen).__module__.startswith("gcsfs") and code.isdigit():
            return int(code), {}, ""
        seen = seen.__cause__
    return 0, {}, ""


def _lowered(headers: Mapping[str, Any]) -> dict[str, str]:
    return {str(name).lower(): str(value) for name, value in headers.items()}


def _reason(error: BaseException) -> str:
    """Returns type and text of an exception, on one line and without secrets."""
    text = " ".join(redacted(str(error)).split())
    if len(text) > _LONGEST_REASON:
        text = text[:_LONGEST_REASON] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
