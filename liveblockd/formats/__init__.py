"""Image formats: where the bytes of a guest live."""
