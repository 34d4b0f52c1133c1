"""The monitor protocol: QMP and HMP."""
