"""Answers to open questions, graded by a model behind any OpenAI-compatible server."""
