"""What the server is measured by: its speed next to other ways to serve a document, a soak, and malformed requests."""
