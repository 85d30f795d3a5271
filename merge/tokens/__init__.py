"""Tokens: vocabularies, the rows of embeddings that belong to them, stop tokens and chat templates.

vocabulary -> union (ids of the result) -> rows (where each row comes from; fill for those that nobody has)
           -> stop, templates (edits of the files beside the tensors) -> doctor (is that whole?)
"""
