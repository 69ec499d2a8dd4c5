"""What the benchmark compares: ways to answer questions on documents, each a class of its own."""
