"""Whether what was written loads, and which code of it may run."""
