"""From a chunk's tokens to LoRA matrices: context encoder, aggregator, heads, and the checkpoint that holds them."""
