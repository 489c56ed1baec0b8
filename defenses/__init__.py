"""Defenses: one module, one defense; shared parts start with an underscore."""
