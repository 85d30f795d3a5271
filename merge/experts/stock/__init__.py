"""Mixtures that are stock models of transformers: dense models as their experts."""
