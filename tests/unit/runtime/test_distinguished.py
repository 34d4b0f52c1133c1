"""The names are those that GnuTLS gave for certificates with these subjects."""

import pytest

from liveblockd.runtime.distinguished import distinguished_name


@pytest.mark.parametrize(("subject", "name"), [
    ((), ""),
    ([[("countryName", "GB")], [("organizationName", "#hash ")], [("commonName", "a+b/c")],
      [("surname", "sur")], [("initials", "I")]],
     r"C=GB,O=\#hash\ ,CN=a\+b/c,surName=sur,initials=I"),
    ([[("commonName", " ")], [("organizationName", "x\\y=z")],
      [("organizationalUnitName", "one"), ("organizationalUnitName", "two")]],
     r"CN=\ ,O=x\\y=z,OU=one+OU=two"),
    ([[("organizationName", 'Ex, "Inc" <a;b>')], [("commonName", " \u00e9 c")],
      [("emailAddress", "a@b")], [("domainComponent", "dd")], [("userId", "u1")],
      [("streetAddress", "S")]],
     'O=Ex\\, \\"Inc\\" \\<a\\;b\\>,CN=\\ \u00e9 c,EMAIL=a@b,DC=dd,UID=u1,street=S'),
    ([[("commonName", "x,CN=root")]], r"CN=x\,CN=root"),
    ([[("commonName", "  a  b  ")]], r"CN=\  a  b \ "),
])  # fmt: skip
def test_as_gnutls(subject, name):
    assert distinguished_name(subject) == name
