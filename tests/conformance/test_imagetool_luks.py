"""LUKS in ``liveblockctl image``: create, convert and amend, beside qemu-img on the same images."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.imagetool import Answer, ours, qemu, qemu_io
from tests.support.qcow2_images import needs

pytest.importorskip("cryptography", reason="the extra crypto is not installed")
pytestmark = needs("qemu-img", "qemu-io")

OLD, NEW = "secret,id=s0,data=abc", "secret,id=s1,data=def"
SECRETS = ("--object", OLD, "--object", NEW)
KINDS = ("qcow2", "luks")


def opened(kind: str, secret: str = "s0") -> str:
    prefix = "encrypt." if kind == "qcow2" else ""
    return f"driver={kind},file.filename=i.{kind},{prefix}key-secret={secret}"


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made here: qemu-img measures the processor first, which takes it minutes if that is busy."""
    path = tmp_path_factory.mktemp("luks")
    luks = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=1"
    target = path / "i.qcow2"
    assert ours("create", *SECRETS, "-q", "-f", "qcow2", "-o", luks, target, "1M")[0] == 0
    luks = "key-secret=s0,iter-time=1"
    target = path / "i.luks"
    assert ours("create", *SECRETS, "-q", "-f", "luks", "-o", luks, target, "1M")[0] == 0
    return path


@pytest.fixture
def images(templates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """i.qcow2 and i.luks."""
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        shutil.copy(templates / f"i.{kind}", tmp_path)
    return tmp_path


def amend(run: object, kind: str, options: str, *more: str) -> Answer:
    prefix = "encrypt." if kind == "qcow2" else ""
    given = ",".join(prefix + option for option in options.split(","))
    words = ("amend", *SECRETS, *more, "--image-opts", "-o", given, opened(kind))
    return run(*words)  # type: ignore[operator,no-any-return]


def opens(kind: str, secret: str) -> bool:
    words = ("map", *SECRETS, "--image-opts", opened(kind, secret), "--output=json")
    answers = [run(*words)[0] for run in (ours, qemu)]
    assert answers[0] == answers[1]
    return answers[0] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_passphrases(images: Path, kind: str) -> None:
    before = qemu("convert", *SECRETS, "--image-opts", opened(kind), "-O", "raw", "before")
    assert before[0] == 0
    assert not opens(kind, "s1")
    assert amend(ours, kind, "state=active,new-secret=s1,iter-time=1") == (0, "", "")
    assert opens(kind, "s0") and opens(kind, "s1")
    assert amend(ours, kind, "state=inactive,old-secret=s0") == (0, "", "")
    assert opens(kind, "s1") and not opens(kind, "s0")
    qemu("convert", *SECRETS, "--image-opts", opened(kind, "s1"), "-O", "raw", "after")
    assert Path("after").read_bytes() == Path("before").read_bytes()
    if kind == "qcow2":
        check = qemu("check", *SECRETS, "--image-opts", opened(kind, "s1"))
        assert check[0] == 0


REFUSED = [
    "new-secret=s1", "state=active", "state=foo,new-secret=s1", "state=active,new-secret=nope",
    "format=luks", "state=active,new-secret=s1,keyslot=9", "state=inactive",
    "state=inactive,keyslot=1", "state=inactive,keyslot=0", "state=inactive,old-secret=s0",
    "cipher-alg=aes-256", "keyslot=x,state=active", "state=active,new-secret=s1,keyslot=0",
    "state=active,new-secret=s1,old-secret=s0", "state=inactive,new-secret=s1", "foo=1",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", REFUSED)
def test_same_refusal(images: Path, kind: str, options: str) -> None:
    before = Path(f"i.{kind}").read_bytes()
    found, expected = amend(ours, kind, options), amend(qemu, kind, options)
    assert found == expected
    assert found[0] == 1
    assert Path(f"i.{kind}").read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_passphrase_goes_by_force(images: Path, kind: str) -> None:
    assert amend(ours, kind, "state=inactive,keyslot=0", "--force") == (0, "", "")
    assert not opens(kind, "s0")


def test_what_is_not_encrypted_or_has_no_data_file(images: Path) -> None:
    qemu("create", "-f", "qcow2", "p", "1M")
    qemu("create", "-f", "qcow2", "-o", "data_file=d,data_file_raw=on", "x", "1M")
    for words in (
        "p -o encrypt.state=active,encrypt.new-secret=s1", "p -o data_file_raw=on",
        "p -o data_file=y", "p -o data_file_raw=off", "x -o data_file_raw=off",
        "x -o data_file_raw=on", "p -o cluster_size=4k", "p -o lazy_refcounts=maybe",
    ):  # fmt: skip
        name, *rest = words.split()
        shared = ("amend", *SECRETS, "-f", "qcow2", *rest)
        before = Path(name).read_bytes()
        expected = qemu(*shared, name)
        Path(name).write_bytes(before)
        found = ours(*shared, name)
        assert found[:2] == expected[:2]
        assert found[2].splitlines()[:1] == expected[2].splitlines()[:1], words
    info = json.loads(qemu("info", "--output=json", "x")[1])
    assert not info["format-specific"]["data"]["data-file-raw"]


@pytest.mark.parametrize(
    "options",
    [
        "",
        ",preallocation=metadata",
        ",preallocation=full",
        ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv",
    ],
)
def test_create(images: Path, options: str) -> None:
    given = "key-secret=s0,iter-time=1" + options
    status, out, _ = ours("create", *SECRETS, "-f", "luks", "-o", given, "o.luks", "1000000")
    assert status == 0
    assert out.startswith("Formatting 'o.luks', fmt=luks size=1000000 key-secret=s0 ")
    info = json.loads(qemu("info", "--output=json", "o.luks")[1])
    assert info["virtual-size"] == 1000448
    data = info["format-specific"]["data"]
    essiv = "essiv" in options
    assert (data["cipher-mode"], data["ivgen-alg"]) == (
        ("cbc", "essiv") if essiv else ("xts", "plain64")
    )
    assert data["payload-offset"] == (528384 if essiv else 2068480)  # as of qemu-img
    assert Path("o.luks").stat().st_size == data["payload-offset"] + 1000448
    name = "driver=luks,key-secret=s0,file.filename=o.luks"
    command = ["-c", "write -P 7 4k 64k", "-c", "read -P 7 4k 64k"]
    subprocess.run(
        ["qemu-io", *SECRETS, "--image-opts", *command, name],
        check=True, timeout=60, stdout=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    ["-o key-secret=s0,cipher-alg=foo n 1M", "n 1M", "-b i.luks n", "-o key-secret=nope n 1M",
     "-o key-secret=s0,foo=1 n 1M", "-o key-secret=s0 n"],
)  # fmt: skip
def test_create_refused(images: Path, words: str) -> None:
    found = ours("create", *SECRETS, "-f", "luks", *words.split())
    expected = qemu("create", *SECRETS, "-f", "luks", *words.split())
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert not Path("n").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_convert(images: Path, kind: str) -> None:
    qemu("create", "-f", "qcow2", "p", "3M")
    qemu_io("p", "write -P 3 0 64k", "write -P 4 1M 200k")
    prefix = "encrypt." if kind == "qcow2" else ""
    given = f"{prefix}key-secret=s0,{prefix}iter-time=1"
    given += ",encrypt.format=luks" if kind == "qcow2" else ""
    answer = ours("convert", *SECRETS, "-O", kind, "-o", given, "p", f"i.{kind}")
    assert answer == (0, "", "")
    same = ("compare", *SECRETS, "--image-opts", opened(kind), "driver=qcow2,file.filename=p")
    assert qemu(*same)[0] == 0, qemu(*same)
