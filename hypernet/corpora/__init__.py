"""Corpora: many documents, each an adapter of its own in a library, in one process or on a Ray cluster."""
