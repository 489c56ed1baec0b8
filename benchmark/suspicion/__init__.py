"""Scores of pairs, higher = more suspicious: pure functions that filters and `bench audit` share."""
