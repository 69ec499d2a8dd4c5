"""What gradient steps after generation are worth, next to other ways to keep a document."""
