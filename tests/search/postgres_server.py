"""A real PostgreSQL server, as long as tests last: from TEST_POSTGRES (a folder of programs) or PATH."""

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

USER, PASSWORD = "searcher", "wonder-wall-71"


def programs() -> Path | None:
    """The folder with initdb and postgres; None where there is none."""
    if named := os.environ.get("TEST_POSTGRES"):
        return Path(named)
    found = shutil.which("pg_ctl")
    return Path(found).resolve().parent if found else None


@contextmanager
def running(bin_folder: Path) -> Iterator[str]:
    """The address of a server that asks for a password; a database's name is to follow."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        home, word = Path(folder), Path(folder, "word")
        word.write_text(PASSWORD + "\n")
        as_user = _not_root(home, word)
        subprocess.run(
            [bin_folder / "initdb", "-D", home / "data", "-U", USER, "-A", "scram-sha-256",
             "--pwfile", word, "--no-sync"],
            check=True, capture_output=True, **as_user,
        )  # fmt: skip
        port = _free_port()
        server = subprocess.Popen(
            [bin_folder / "postgres", "-D", home / "data", "-p", str(port), "-k", home,
             "-c", "listen_addresses=127.0.0.1"],
            stderr=subprocess.DEVNULL, **as_user,
        )  # fmt: skip
        try:
            _wait_for(bin_folder, port)
            yield f"postgresql://{USER}:{PASSWORD}@127.0.0.1:{port}/"
        finally:
            server.send_signal(signal.SIGINT)  # whoever is connected
            server.wait()


def new_database(address: str) -> str:
    """The address of an empty database on that server."""
    import sqlalchemy

    name = f"empty_{secrets.token_hex(4)}"
    url = f"{address}postgres".replace("postgresql:", "postgresql+psycopg:")
    engine = sqlalchemy.create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(sqlalchemy.text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return address + name


def _not_root(*owned: Path) -> dict[str, Any]:
    """The server refuses to be root's."""
    if os.geteuid() != 0:
        return {"cwd": owned[0]}
    nobody = pwd.getpwnam("nobody")
    for each in owned:
        os.chown(each, nobody.pw_uid, nobody.pw_gid)
    return {"cwd": owned[0], "user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_for(bin_folder: Path, port: int) -> None:
    command = [bin_folder / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-t", "1"]
    for _ in range(300):
        if subprocess.run(command, capture_output=True).returncode == 0:
            return
        subprocess.run(["sleep", "0.1"], check=True)
    raise AssertionError("the server did not come up")
