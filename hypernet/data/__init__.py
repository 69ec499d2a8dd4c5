"""Data: records, the synthetic encyclopedia, sources, curricula, batches and the Lightning data module."""
