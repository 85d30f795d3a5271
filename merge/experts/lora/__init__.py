"""Mixtures of adapters as they are, on their base, with a modelling file of their own."""
