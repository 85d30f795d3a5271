"""Text that others wrote, as people are shown it."""


def printable(text: str, kept: str = "") -> str:
    """Without what would move the cursor or turn the writing round; `kept`: such characters that may stay."""
    return "".join(c if c.isprintable() or c in kept else "?" for c in text)
