"""Exports: how clients outside reach a node of the graph."""
