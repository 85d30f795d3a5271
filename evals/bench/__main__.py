"""The command line of the benchmark."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import candidates, memory, search, speed
from .measure import BenchError
from .peer import FLAGS, default_folder

EPILOG = "Without a command: speed. `COMMAND --help` lists what a command takes."
RUNS = {"memory": memory.run_memory, "tokens": memory.run_tokens, "plan70b": memory.run_plan70b}
WITH_PEER = {"speed": speed.run_speed, "candidates": candidates.run_candidates}
COMMANDS = (*WITH_PEER, "search", *RUNS)


def main(arguments: Sequence[str]) -> int:
    """Runs one command, `speed` where none is named; 1 after a failure."""
    named = bool(arguments) and (arguments[0] in COMMANDS or arguments[0] in ("-h", "--help"))
    asked = _parser().parse_args(arguments if named else ["speed", *arguments])
    try:
        if asked.command in WITH_PEER:
            return WITH_PEER[asked.command](_speed_options(asked))
        if asked.command == "search":
            return search.run_search(asked.candidates, asked.json)
        return RUNS[asked.command](_memory_options(asked))
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m evals.bench", description=__doc__, epilog=EPILOG
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_speed(
        commands.add_parser("speed", help="floor, mergetool and mergekit (the default)"),
        speed.METHODS,
    )
    one_more = commands.add_parser("candidates", help="one more candidate of a search in memory")
    _add_speed(one_more, candidates.METHODS)
    huge = commands.add_parser("memory", help="measured against projected peak, one huge tensor")
    huge.add_argument("--memory", dest="cap", default="512MiB", help="the cap (512MiB)")
    huge.add_argument("--sparse", action="store_true", help="zeros that take no room on disk")
    huge.add_argument("--small", action="store_true", help="a tensor of 131 MB instead of 2.1 GB")
    _add_common(huge)
    tokens = commands.add_parser("tokens", help="the same, of models with tokens of their own")
    tokens.add_argument("--memory", dest="cap", default="512MiB", help="the cap (512MiB)")
    tokens.add_argument("--small", action="store_true", help="134 MB instead of 8.6 GB")
    _add_common(tokens)
    plan = commands.add_parser("plan70b", help="time of `mergetool plan` for three 70 B models")
    plan.add_argument("--rounds", type=int, default=3, help="runs of each command (3)")
    _add_common(plan)
    searched = commands.add_parser("search", help="a candidate beyond the time of its model")
    searched.add_argument(
        "--candidates", type=int, default=search.CANDIDATES, help=f"({search.CANDIDATES})"
    )
    searched.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")
    return parser


def _add_speed(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    _add_common(parser)
    parser.add_argument("--small", action="store_true", help="47 M parameters instead of 1.24 B")
    parser.add_argument("--methods", type=_methods, default=methods, help=",".join(speed.METHODS))
    parser.add_argument("--only", choices=["ours"], help="ours: without mergekit")
    parser.add_argument("--no-peer", action="store_true", help="the same as --only ours")
    parser.add_argument(
        "--peer-venv", type=Path, default=default_folder(),
        help="virtual environment with mergekit, made where there is none (%(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--peer-flags", type=str.split, default=FLAGS, help=f"of mergekit-yaml ({' '.join(FLAGS)})"
    )
    parser.add_argument("--rounds", type=int, help="runs of each (floor and ours 3, mergekit 1)")
    parser.add_argument("--threads", type=int, help="of ours and of the floor (as ours chooses)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=Path, help="where models are put (a temporary folder)")
    parser.add_argument("--keep", action="store_true", help="use models found there, leave them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all figures there")


def _methods(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    if unknown := [name for name in chosen if name not in speed.METHODS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}; there are {', '.join(speed.METHODS)}")
    return chosen


def _speed_options(asked: argparse.Namespace) -> speed.Options:
    return speed.Options(
        small=asked.small,
        folder=asked.folder,
        keep=asked.keep,
        methods=asked.methods,
        peer=not asked.no_peer and asked.only != "ours",
        peer_folder=asked.peer_venv.expanduser().absolute(),
        peer_flags=tuple(asked.peer_flags),
        rounds=asked.rounds,
        threads=asked.threads,
        json=asked.json,
    )


def _memory_options(asked: argparse.Namespace) -> memory.Options:
    return memory.Options(
        small=getattr(asked, "small", False),
        folder=asked.folder,
        keep=asked.keep,
        sparse=getattr(asked, "sparse", True),
        cap=getattr(asked, "cap", "512MiB"),
        rounds=getattr(asked, "rounds", 1),
        json=asked.json,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
