"""``make demo``: the two recipes on an embedded chain, with a guest that checks every byte."""
