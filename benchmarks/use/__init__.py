"""What use teaches: worlds in which a memory is acted upon, and whether what is learned of it helps."""
