"""TLS without a proof of who is there (``tls-creds-anon``): against listeners, not impostors.

Specification: RFC 5246 (DH_anon), RFC 7919 for the group; QEMU's TLS setup (docs/system/tls) for
``dh-params.pem``. Who stands between the two ends reads everything: whoever has certificates or
keys uses these.

Runs on the event loop, which it holds for the reading of a small file. TLS 1.2 alone: 1.3 does not
have it. Errors: BlockError.
"""

from __future__ import annotations

import os
import ssl
from typing import Final

from liveblockd.errors import BlockError
from liveblockd.runtime.tls import TlsCredentials, path_in
from liveblockd.runtime.tls_priority import Kind, apply_priority

PARAMETERS: Final = "dh-params.pem"
#: the group ffdhe3072
_GROUP: Final = b"""-----BEGIN DH PARAMETERS-----
MIIBiAKCAYEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEfz9zeNVs7ZRkDW7w09N75nAI4YbRvydbmyQd62R0mkff3
7lmMsPrBhtkcrv4TCYUTknC0EwyTvEN5RPT9RFLi103TZPLiHnH1S/9croKrnJ32
nuhtK8UiNjoNq8Uhl5sN6todv5pC1cRITgq80Gv6U93vPBsg7j/VnXwl5B0rZsYu
N///////////AgEC
-----END DH PARAMETERS-----
"""


def load_anon(directory: str | None, *, server: bool, priority: str | None) -> TlsCredentials:
    """One end; a server's ``directory`` may have parameters of its own. BlockError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # there are no certificates
    apply_priority(context, priority, Kind.ANON)
    if server:
        own = None if directory is None else path_in(directory, PARAMETERS, needed=False)
        _load_group(context, own)
    return TlsCredentials(context, context, server)


def _load_group(context: ssl.SSLContext, path: str | None) -> None:
    if path is not None:
        try:
            context.load_dh_params(path)
        except (ssl.SSLError, OSError):
            raise BlockError(f"Unable to load DH parameters from {path}") from None
        return
    fd = os.memfd_create("dh-params")  # `ssl` takes a name only
    try:
        os.write(fd, _GROUP)
        context.load_dh_params(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
