"""Measures models. The definitions are here and nowhere else."""
