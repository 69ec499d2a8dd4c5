"""What learning costs: new facts against what was known before, by method, at matched acquisition."""
