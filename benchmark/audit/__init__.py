"""Looks for natural and planted backdoors in pairs that nobody vouches for."""
