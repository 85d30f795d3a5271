"""Speed and memory of `mergetool`, beside the disk's floor and beside mergekit.

    python -m evals.bench            speed: floor, mergetool, mergekit
    python -m evals.bench memory     measured against projected peak, one huge tensor
    python -m evals.bench tokens     the same, of models with tokens of their own
    python -m evals.bench plan70b    time of `mergetool plan` for three 70 B models

The driver imports neither numpy nor torch and leaves all work to child processes: Linux counts the
peak memory of a parent as that of the child it starts, so the parent has to be the smaller one.
"""
