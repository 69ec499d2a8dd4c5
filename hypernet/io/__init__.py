"""Files that are written completely or not at all, and what libraries log."""
