"""The NBD protocol as pure state machines: bytes in, bytes and requests out."""
