"""Text as people are shown it: what others wrote, and counts."""


def printable(text: str, kept: str = "") -> str:
    """Without what would move the cursor or turn the writing round; `kept`: such characters that may stay."""
    return "".join(c if c.isprintable() or c in kept else "?" for c in text)


def counted(count: int, noun: str) -> str:
    """`1 model`, `2 models`."""
    return f"{count} {noun}{'s' * (count != 1)}"
