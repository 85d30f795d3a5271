"""Every error that a user can meet, and the exit code that the command gives for it.

MergetoolError
|- RequestError     exit 2: the request is wrong; nothing was written
|  |- RecipeError       a recipe file: unknown key, wrong type, value out of range
|  |- SourceError       a model: not found, unreadable header, not plain floats
|  |- PlanError         recipe and models do not fit together, or not into disk or memory
|  `- OutputError       the output folder is taken: finished, foreign or in use
`- RunError         exit 1: the work failed while running; the same command goes on from there
   |- ReadError         an input is truncated, unreadable or changed while it was read
   |- NonFiniteError    NaN or infinity in an input
   |- WriteError        the disk is full or refuses to write
   |- VerifyError       a written model is not what its plan says
   `- ScoreError        a model could not be scored
"""


class MergetoolError(Exception):
    """One line: where, what was found, what is allowed, what to do."""

    exit_code = 1


class RequestError(MergetoolError):
    exit_code = 2


class RecipeError(RequestError):
    """A recipe that cannot be meant; the message starts with file and line."""


class SourceError(RequestError):
    """A model that cannot be opened."""


class PlanError(RequestError):
    """A recipe whose models, memory or disk do not fit together."""


class OutputError(RequestError):
    """An output folder that must not be touched."""


class RunError(MergetoolError):
    exit_code = 1


class ReadError(RunError):
    """An input that could be opened but not be read to its end, or that changed."""


class NonFiniteError(RunError):
    """NaN or infinity in an input; names model, tensor and position."""


class WriteError(RunError):
    """The operating system refused to write."""


class VerifyError(RunError):
    """A written model that differs from its plan."""


class ScoreError(RunError):
    """A model that could not be scored."""
