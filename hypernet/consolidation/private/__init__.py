"""Pooled consolidation: what many users have in common becomes weights, what one user said alone should not."""
