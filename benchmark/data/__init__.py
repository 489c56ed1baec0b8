"""Pairs, manifests, poison, packs and evaluation sets."""
