"""Self-instruct: questions and answers that the model writes about memories, and what a person lets through."""
