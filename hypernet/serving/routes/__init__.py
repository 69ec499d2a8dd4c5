"""What can be asked of the server, by the first part of the address."""
