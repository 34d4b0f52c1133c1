"""The qcow2 engine: see README.md of ``formats``."""
