"""Secrets are taken out of addresses and texts, and nothing else is.

pytest tests/storage/test_redaction.py
"""

from __future__ import annotations

import pytest

from jest_stream.storage.redaction import redacted


@pytest.mark.parametrize(
    "text",
    [
        "https://me:SECRET@host/a.tar",
        "https://SECRET@host/a.tar",
        "https://host/a.tar?X-Amz-Signature=SECRET&X-Amz-Expires=3",
        "https://host/a.tar#access_token=SECRET",
        "cannot open url='https://host/a.tar?sig=SECRET', status=403",
        "404, message='Not Found', url='https://u:SECRET@host/x'",
        "see <https://host/a?b=SECRET> and (https://host/c?d=SECRET)",
        "/resolve/main/a.tar?Signature=SECRET&Key-Pair-Id=SECRET",
        "Authorization: Bearer SECRET",
        "{'Authorization': 'Bearer SECRET', 'Range': 'bytes=0-1'}",
        "'authorization': 'AWS4-HMAC-SHA256 Credential=SECRET/2024, Signature=SECRET'",
        "bearer SECRETSECRET",
        "token=SECRET",
        "aws_secret_access_key: SECRET",
        "{'key': 'x', 'secret': 'SECRET'}",
        "password='SECRET'",
        "HF_TOKEN=SECRET",
        "hf_SECRETabcdefgh",
        "AKIASECRETSECRET1234",
        "eyJSECRETabc.eyJSECRET.SECRET",
        "ya29.SECRET",
        "ghp_SECRETabcdefghijkl",
    ],
)
def test_secrets_are_hidden(text: str) -> None:
    assert "SECRET" not in redacted(text)
    assert "[hidden]" in redacted(text)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/pairs/00000.tar",
        "/data/a?.tar",
        "http://127.0.0.1:8000/a.tar",
        "the tokenizer of https://host/name@v1.2/a.tar said: bytes 0-10",
        "hf://datasets/org/name@0123456789abcdef/x.tar",
        "Is it there? Ask again.",
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redacted(text) == text


def test_redacting_twice_changes_nothing() -> None:
    once = redacted("https://me:pw@host/a.tar?token=abc Authorization: Basic abcdefgh")
    assert redacted(once) == once
