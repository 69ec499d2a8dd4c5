"""The token tier on disk: times, versions, conflicts, the database and its full-text index."""
