"""Documents to chunks: reading files, cutting texts, the chat template around questions and answers."""
