"""What a document became: an adapter on disk, joining several, injecting them, compressing, merging, a library."""
