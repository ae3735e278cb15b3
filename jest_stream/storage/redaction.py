"""Removes secrets from texts that are shown: addresses, messages of other libraries, log lines.

Rather too much is hidden than too little: a query string is never shown, since presigned addresses
keep their signature there. Pure functions.
"""

from __future__ import annotations

import re

_HIDDEN = "[hidden]"

# scheme://userinfo@host/path?query#fragment, anywhere in a text.
_USERINFO = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)[^/\s'\"<>@?#]*(?:@[^/\s'\"<>@?#]*)*@")
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://[^\s'\"<>?#]*)([?#])[^\s'\"<>)]*")
_BARE_QUERY = re.compile(r"(/[^\s'\"<>?]*)\?[^\s'\"<>)]*=[^\s'\"<>)]*")
_HEADER = re.compile(
    r"(?i)((?:proxy-)?authorization['\"]?\s*[:=]\s*['\"]?)(?:[A-Za-z0-9\-]+\s+)?[^\s'\",}]+"
)
_SCHEME_TOKEN = re.compile(r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=\-]{6,}")
_NAMED = re.compile(
    r"(?i)\b([\w\-]*(?:secret|token|passw(?:or)?d|signature|credential|api[_-]?key|access[_-]?key)"
    r"[\w\-]*['\"]?\s*[=:]\s*)(['\"]?)(?!\s)[^\s'\"&,;)}\]]+"
)
_KNOWN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{8,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{16,}"
    r"|ya29\.[\w\-]+|eyJ[\w\-]{8,}\.[\w\-]+(?:\.[\w\-]*)?)"
)


def redacted(url_or_text: str) -> str:
    """Returns an address, or a text with addresses in it, without possible secrets.

    Hidden are query strings and fragments of addresses, user names and passwords in front of a
    host, authorization headers, values that are called token, secret, password, signature, key or
    credential, and tokens that are known by their shape (Hugging Face, AWS, Google, GitHub, JWT).

    >>> redacted("https://me:pw@host/a.tar?X-Amz-Signature=abc")
    'https://[hidden]@host/a.tar?[hidden]'
    """
    text = _USERINFO.sub(rf"\g<1>{_HIDDEN}@", url_or_text)
    text = _QUERY.sub(rf"\g<1>\g<2>{_HIDDEN}", text)
    text = _BARE_QUERY.sub(rf"\g<1>?{_HIDDEN}", text)
    text = _HEADER.sub(rf"\g<1>{_HIDDEN}", text)
    text = _SCHEME_TOKEN.sub(rf"\g<1> {_HIDDEN}", text)
    text = _NAMED.sub(rf"\g<1>\g<2>{_HIDDEN}", text)
    return _KNOWN.sub(_HIDDEN, text)
