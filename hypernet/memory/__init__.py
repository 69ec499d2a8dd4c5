"""What users said, kept as text with two time axes, searched, corrected and forgotten."""
