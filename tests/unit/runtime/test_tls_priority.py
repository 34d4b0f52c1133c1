"""Priority strings of GnuTLS, as what ``ssl`` is told."""

import ssl

import pytest

from liveblockd.errors import BlockError
from liveblockd.runtime.tls_priority import Kind, apply_priority

V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3


def applied(priority, kind=Kind.X509):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    apply_priority(context, priority, kind)
    ciphers = {c["name"] for c in context.get_ciphers() if not c["name"].startswith("TLS_")}
    return context, ciphers


@pytest.mark.parametrize(("priority", "least", "most"), [
    (None, V12, V13), ("NORMAL", V12, V13), ("SECURE128", V12, V13), ("@QEMU,SYSTEM", V12, V13),
    ("NORMAL:-VERS-ALL:+VERS-TLS1.3", V13, V13), ("NORMAL:-VERS-TLS-ALL:+VERS-TLS1.2", V12, V12),
    ("NORMAL:-VERS-TLS1.2", V13, V13), ("NORMAL:-VERS-TLS1.3:-VERS-TLS1.0", V12, V12),
    ("NORMAL:!VERS-TLS1.3", V12, V12), ("SECURE256", V12, V12), ("NORMAL:-3DES-CBC", V12, V13),
])  # fmt: skip
def test_versions(priority, least, most):
    context, ciphers = applied(priority)
    assert (context.minimum_version, context.maximum_version) == (least, most)
    assert ciphers


@pytest.mark.parametrize(("priority", "gone", "left"), [
    ("SECURE256", "AES128", "ECDHE-RSA-AES256-GCM-SHA384"),
    ("SECURE192:-CHACHA20-POLY1305", "CHACHA20", "ECDHE-RSA-AES256-GCM-SHA384"),
    ("NORMAL:-VERS-TLS1.3:-AES-128-GCM", "AES128-GCM", "ECDHE-RSA-AES128-SHA256"),
    ("NORMAL:-VERS-TLS1.3:-AES-128-CBC:-AES-256-CBC", "-SHA$", "ECDHE-RSA-AES128-GCM-SHA256"),
    ("NORMAL:-VERS-TLS1.3:-CIPHER-ALL:+AES-256-GCM", "AES128", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ("NORMAL:-KX-ALL:+ECDHE-ECDSA", "RSA", "ECDHE-ECDSA-AES256-GCM-SHA384"),
    ("NORMAL:-DHE-RSA", "^DHE", "ECDHE-RSA-AES256-GCM-SHA384"),
    ("PFS", "^AES", "ECDHE-RSA-AES256-GCM-SHA384"),
    ("NORMAL:-RSA", "^AES", "DHE-RSA-AES256-SHA256"),
    ("NORMAL:-SHA1", "-SHA$", "ECDHE-RSA-AES256-GCM-SHA384"),
])  # fmt: skip
def test_what_is_taken_away(priority, gone, left):
    _, ciphers = applied(priority)

    def matches(name):
        if gone.startswith("^"):
            return name.startswith(gone[1:])
        return name.endswith(gone[:-1]) if gone.endswith("$") else gone in name

    assert left in ciphers
    assert not [name for name in ciphers if matches(name)]
    assert [name for name in applied("NORMAL")[1] if matches(name)]  # it was there


@pytest.mark.parametrize(("priority", "why"), [
    ("NONE", "'NONE' is not supported"), ("LEGACY", "'LEGACY' is not supported"),
    ("NORMAL:-VERS-ALL", "no version of TLS is left"),
    ("NORMAL:+VERS-TLS1.1", "TLS1.1 is not spoken"), ("NORMAL:+VERS-SSL3.0", "SSL3.0 is not"),
    ("NORMAL:-AES-128-GCM", "ciphers of TLS 1.3 cannot be chosen, add -VERS-TLS1.3"),
    ("SECURE256:+VERS-TLS1.3", "ciphers of TLS 1.3 cannot be chosen"),
    ("NORMAL:+ANON-DH", r"'\+ANON-DH' is not supported"), ("NORMAL:+3DES-CBC", "3DES"),
    ("NORMAL:-SIGN-ALL", "SIGN-ALL"), ("NORMAL:-GROUP-ALL", "GROUP-ALL"),
    ("NORMAL:%UNSAFE_RENEGOTIATION", "UNSAFE_RENEGOTIATION"), ("NORMAL:AES-128-GCM", "AES-128-GCM"),
    ("NORMAL:-VERS-TLS1.3:-CIPHER-ALL", "no cipher is left"), ("", "''"),
])  # fmt: skip
def test_refused(priority, why):
    with pytest.raises(BlockError, match=f"^Unable to set TLS session priority .*{why}"):
        applied(priority)


def test_options_and_kinds():
    context, _ = applied("NORMAL:%NO_TICKETS:%SERVER_PRECEDENCE:%SAFE_RENEGOTIATION:+COMP-NULL")
    assert context.options & ssl.OP_NO_TICKET
    assert applied("NORMAL:%PROFILE_HIGH")[0].security_level == 3
    context, ciphers = applied("NORMAL:+ANON-DH:-AES-128-GCM:-AES-128-CBC", Kind.ANON)
    assert context.maximum_version == V12
    assert ciphers and all(name.startswith("ADH-AES256") for name in ciphers)
    with pytest.raises(BlockError, match="no version"):
        applied("NORMAL:-VERS-TLS1.2", Kind.ANON)
    context, ciphers = applied("NORMAL:+PSK", Kind.PSK)
    assert context.maximum_version == V12 and all("PSK" in name for name in ciphers)
