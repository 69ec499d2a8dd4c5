"""Learning from use: worlds in which a memory is acted upon, what is learned of that, and what it tells of a user."""
