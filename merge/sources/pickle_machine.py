"""What a pickle describes, without running anything: its opcodes build inert values of our own.

A pickle is a program for a stack machine that may call whatever it can import. `pickletools` splits it
into opcodes; here each is either one that builds plain data, or refused. Classes and functions are
names (`Global`) of a closed list, and "calling" one gives data. Python's own unpickler would not do:
it sets attributes of what `find_class` returns, hashes what is nested exponentially deep, and takes
memory for whatever number a memo opcode states.
"""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

from merge.sources.foreign import CLASSES

PICKLE_LIMIT = 16 << 20  # bytes; a tensor takes 80 to 200, and a value in memory at most 100 a byte
LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    )
)
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,
    "EMPTY_DICT": lambda: Table([]),
}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
STORES = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
FETCHES = ("GET", "BINGET", "LONG_BINGET")


class MalformedError(ValueError):
    """A pickle that builds nothing; the caller says in which file."""


@dataclass(frozen=True)
class Global:
    """A class or function that the pickle names."""

    name: str


@dataclass(frozen=True)
class Table:
    """A dict as pairs in their order: keys of a hostile file are not to be hashed."""

    pairs: list[tuple[Any, Any]]


@dataclass(frozen=True)
class Called:
    """What a pickle says to make by calling `function`; nobody calls it."""

    function: str
    arguments: tuple[Any, ...]


def read_pickle(stream: BytesIO, known: frozenset[str], stored: Callable[[Any], Any]) -> Any:
    """The value of the pickle at the place of `stream`, which then stands behind it.

    Numbers, texts, bytes, None, lists, tuples, Table, Global, Called, and what `stored` gives for a
    persistent id. Raises MalformedError for anything but a pickle of globals in `known`, whatever it is.
    """
    machine = _Machine(known, stored)
    for name, argument in _opcodes(stream):
        if name == "STOP":
            return machine.pop()
        machine.step(name, argument)
    raise MalformedError("it is cut off")


def _opcodes(stream: BytesIO) -> Iterator[tuple[str, Any]]:
    opcodes = pickletools.genops(stream)
    while True:
        try:
            opcode, argument, _ = next(opcodes)
        except StopIteration:
            return
        except Exception as error:  # of no closed set: struct.error, ValueError, UnicodeDecodeError
            raise MalformedError(" ".join(str(error).split())[:100]) from None
        yield opcode.name, argument


@dataclass
class _Machine:
    known: frozenset[str]
    stored: Callable[[Any], Any]
    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise MalformedError("it takes a value where there is none")
        return self.stack.pop()

    def pop_marked(self) -> list[Any]:
        """The values since the last mark, which goes too."""
        if not self.marks:
            raise MalformedError("it goes back to a mark where there is none")
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def top(self, kind: type) -> Any:
        """The value on top, which stays; it must be of this kind."""
        value = self.pop()
        if type(value) is not kind:
            raise MalformedError(
                f"it fills a {type(value).__name__} as if it were a {kind.__name__}"
            )
        self.stack.append(value)
        return value

    def step(self, name: str, argument: Any) -> None:
        """One opcode; long, as it is the whole language."""
        push = self.stack.append
        match name:
            case "PROTO" | "FRAME":
                pass
            case _ if name in LITERALS:
                push(argument)
            case _ if name in CONSTANTS:
                push(CONSTANTS[name]())
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_marked()
            case _ if name in TUPLES:
                push(tuple(reversed([self.pop() for _ in range(TUPLES[name])])))
            case "TUPLE":
                push(tuple(self.pop_marked()))
            case "LIST" | "FROZENSET":
                push(self.pop_marked())
            case "DICT":
                push(Table(_pairs(self.pop_marked())))
            case "APPEND":
                value = self.pop()
                self.top(list).append(value)
            case "APPENDS" | "ADDITEMS":
                values = self.pop_marked()
                self.top(list).extend(values)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                self.top(Table).pairs.append((key, value))
            case "SETITEMS":
                pairs = _pairs(self.pop_marked())
                self.top(Table).pairs.extend(pairs)
            case "GLOBAL":
                push(self.named(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                last, module = self.pop(), self.pop()
                push(self.named(f"{module!s:.200}.{last!s:.200}" if _texts(last, module) else "?"))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                push(_called(function, arguments))
            case "BUILD":  # attributes: state_dict() has _metadata in one
                self.pop()
                push(self.pop())
            case "BINPERSID":
                push(self.stored(self.pop()))
            case _ if name in STORES:
                value = self.pop()
                push(value)
                place = len(self.memo) if name == "MEMOIZE" else argument
                if not 0 <= place < PICKLE_LIMIT:  # large ones can be chosen to collide
                    raise MalformedError("it stores a value at a place of no use")
                self.memo[place] = value
            case _ if name in FETCHES:
                if argument not in self.memo:
                    raise MalformedError("it recalls a value that it never stored")
                push(self.memo[argument])
            case _:
                raise MalformedError(f"opcode {name} is not one that a checkpoint needs")

    def named(self, name: str) -> Global:
        if name not in self.known:
            kind = CLASSES.get(name.partition(".")[0])
            what = f"a {kind} tensor" if kind else "code, which is never run"
            raise MalformedError(f"it wants {name[:100]!r}, {what}")
        return Global(name)


def _pairs(values: list[Any]) -> list[tuple[Any, Any]]:
    if len(values) % 2:
        raise MalformedError("it fills a table with a key that has no value")
    return list(zip(values[::2], values[1::2], strict=True))


def _texts(*values: Any) -> bool:
    return all(type(value) is str for value in values)


def _called(function: Any, arguments: Any) -> Any:
    """A value for the call. Nothing is copied: what is shared would be copied as often as it is named."""
    if type(function) is not Global or type(arguments) is not tuple:
        raise MalformedError("it calls what is no function")
    match function.name, arguments:
        case "collections.OrderedDict", ():
            return Table([])
        case "torch.Size", (tuple() as extents,):
            return extents
    return Called(function.name, arguments)
