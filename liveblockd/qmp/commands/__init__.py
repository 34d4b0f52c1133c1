"""QMP commands, an area a module."""
