"""Data: records, the synthetic encyclopedia, collation, curricula and the Lightning data module."""
