"""How good the rows are that a model gets for tokens it never had, beside mergekit-tokensurgeon.

python -m evals.tokens.transplant --peer-venv DIR
"""
