"""Attacks: one module, one attack; shared parts start with an underscore."""
