"""The model over HTTP and MCP: an OpenAI-compatible API in which each request may name an adapter or a memory."""
