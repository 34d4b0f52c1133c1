"""Protocol drivers: where bytes are at last."""
