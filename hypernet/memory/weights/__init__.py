"""Versions of weights that memories went into: as files, whatever trained them."""
