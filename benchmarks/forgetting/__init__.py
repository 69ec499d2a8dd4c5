"""What is lost when something new is learned, by every method on one base model."""
