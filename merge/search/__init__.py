"""Sweeps and evolution: ask -> recipe with values -> plan -> stream into a live model -> score -> tell."""

LOCK = "study.lock"  # in the folder of a study, which one run at a time holds
