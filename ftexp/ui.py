"""`python -m ftexp.ui`: the MLflow UI on this machine only."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from pathlib import Path

from ftexp import config, track, verb
from ftexp.config import Track
from ftexp.errors import MachineError

HOST = "127.0.0.1"
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
"""What MLflow serves from; a server serves a UI of its own."""


def command(uri: str, port: int) -> list[str]:
    """Return the command that serves a tracking store.

    Raises:
        ConfigError: the store is no database.
        MachineError: it is a SQLite file that is not there yet.
    """
    config.require(uri.partition("://")[0].partition("+")[0] in DATABASES and "://" in uri, "--uri", uri,
                   f"an address of a database, as sqlite:///outputs/mlflow.db ({', '.join(DATABASES)})")  # fmt: skip
    path = Path(uri.removeprefix("sqlite:///"))
    if uri.startswith("sqlite:///") and not path.is_file():
        raise MachineError(f"{path}: there are no runs to show yet; start with python -m ftexp.run lora.r=8,16,64 -m")
    serve = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--backend-store-uri",
        uri,
        "--host",
        HOST,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    if uri.startswith("sqlite:///"):
        serve += ["--default-artifact-root", (path.parent / "mlartifacts").resolve().as_uri()]
    return serve


def check_port(port: int) -> None:
    """Refuse a port that a server could not listen on; MLflow tells after ten seconds, among its own lines.

    Raises:
        ConfigError: there is no such port.
        MachineError: another program has it, or it is not ours to take.
    """
    config.require(0 < port < 65536, "--port", port, "from 1 to 65535")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise MachineError(f"--port {port}: {error.strerror}; choose another, such as {port + 1}") from error


def main() -> int:
    """Run the command line; returns only where it could not start."""
    parser = argparse.ArgumentParser(prog="ftexp ui", description="Show runs and sweeps in the MLflow UI.")
    parser.add_argument("--uri", default=Track().uri, help="tracking store (default: %(default)s)")
    parser.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (default: %(default)s)")
    args = parser.parse_args()
    os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # a pickled model in the store is code
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"
    return verb.ended(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    serve = command(args.uri, args.port)
    check_port(args.port)
    print(f"MLflow UI: http://{HOST}:{args.port}  (stop with ctrl-c)", flush=True)
    if (place := track.viewed(args.uri)) is not None:
        print(f"newest sweep: http://{HOST}:{args.port}/{place}", flush=True)
    os.execv(serve[0], serve)


if __name__ == "__main__":
    sys.exit(main())
