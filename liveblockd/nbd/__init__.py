"""The NBD protocol as values and bytes: negotiation, requests, replies (PURE)."""
