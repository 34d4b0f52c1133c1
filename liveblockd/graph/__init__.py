"""Nodes, backing chains and who uses them."""
