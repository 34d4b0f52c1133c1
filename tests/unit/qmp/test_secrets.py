"""What a secret object holds."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from liveblockd.errors import BlockError
from liveblockd.qapi import parse
from liveblockd.qmp.commands.objects import ObjectRegistry, Secret


def secret(name: str = "s", **members: str) -> Secret:
    return parse(Secret, {"qom-type": "secret", "id": name, **members})


def value(**members: str) -> bytes:
    registry = ObjectRegistry()
    registry.add(secret(**members))
    return registry.secret("s")


def test_plain(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"from file\n")
    assert value(data="abc") == b"abc"
    assert value(data="YWJj", format="base64") == b"abc"
    assert value(file=str(tmp_path / "f")) == b"from file\n"


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "Must provide 'file' or 'data'"),
        ({"data": "a", "file": "b"}, "mutually exclusive"),
        ({"data": "%", "format": "base64"}, "Base64"),
        ({"file": "/nonexistent/x"}, "Unable to read /nonexistent/x: No such file"),
        ({"data": "a", "keyid": "k"}, "No secret with id 'k'"),
    ],
)
def test_refused(members: dict[str, str], message: str) -> None:
    with pytest.raises(BlockError, match=message):
        value(**members)


def test_encrypted() -> None:
    ciphers = pytest.importorskip("cryptography.hazmat.primitives.ciphers")
    key, iv = bytes(range(32)), bytes(range(16))
    plain = b"swordfish" + b"\7" * 7
    cipher = ciphers.Cipher(ciphers.algorithms.AES(key), ciphers.modes.CBC(iv))
    data = base64.b64encode(cipher.encryptor().update(plain)).decode()
    registry = ObjectRegistry()
    registry.add(secret("k", data=base64.b64encode(key).decode(), format="base64"))
    text = base64.b64encode(iv).decode()
    registry.add(secret("s", data=data, format="base64", keyid="k", iv=text))
    assert registry.secret("s") == b"swordfish"
    with pytest.raises(BlockError, match="IV is required to decrypt secret"):
        registry.add(secret("t", data=data, format="base64", keyid="k"))
    registry.remove("s")
    with pytest.raises(BlockError, match="No secret with id 's'"):
        registry.secret("s")
