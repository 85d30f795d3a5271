"""Routers that learn from texts while nothing else changes."""
