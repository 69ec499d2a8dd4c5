"""Experts: weights of which a router takes some for each question."""
