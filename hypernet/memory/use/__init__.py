"""What use teaches: how useful memories are, and principles of what was tried."""
