"""What all tests share: a command that runs in this process, and repeatable examples."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, settings
from ran import Ran

settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What transformers tells is kept for this run of tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MERGETOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ran]:
    """Runs `mergetool ...` in this process, in an empty folder."""
    from merge.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Ran:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Ran(result.exit_code, result.stdout, result.stderr)

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="record the bytes of merges anew")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The README's commands take minutes in one test: begun first, no worker waits for it at the end."""
    items.sort(key=lambda item: "test_readme" not in item.nodeid)
