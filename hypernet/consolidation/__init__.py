"""Memories moved into weights behind a gate, as versions that can be rolled back."""
