"""liveblockd: a QMP storage daemon that keeps disk images live."""

__version__ = "0.1.0"
