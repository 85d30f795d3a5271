"""Sweeps and evolution: ask -> recipe with values -> plan -> stream into a live model -> score -> tell."""
