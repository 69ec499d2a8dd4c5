"""What came of a prompt: which memories were in it, how they moved the answer, and a retriever that learns from it."""
