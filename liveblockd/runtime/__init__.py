"""Event loop, bounded worker pool and clock: what runs the rest."""
