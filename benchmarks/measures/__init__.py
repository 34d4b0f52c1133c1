"""One file a measure; every module here is imported, and registers what it measures."""
