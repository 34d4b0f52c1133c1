"""Work on images that no daemon has open: ``liveblockctl image ...`` (README.md)."""
