"""Persona: a character's sheet as weights, by training on its lines, by a vector or by a hypernetwork that reads it."""
