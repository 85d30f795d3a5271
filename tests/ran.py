"""The outcome of a command, for tests."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ran:
    """What a command did: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; more or fewer lines are a failure of the test."""
        lines = self.err.splitlines()
        assert self.code in (1, 2), f"exit {self.code}\n{self.out}{self.err}"
        assert len(lines) == 1, self.err
        assert lines[0].startswith("mergetool: "), self.err
        return lines[0].removeprefix("mergetool: ")
