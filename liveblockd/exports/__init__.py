"""Ways in for a guest: exports and the NBD server."""
