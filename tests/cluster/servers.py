"""Real servers for the tests of this folder, each started in a folder of its own and ended with the block."""

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest


def port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def found(name: str, *folders: str) -> str:
    """Find a program, or skip: which package has it is in the message."""
    for place in (shutil.which(name), *(str(p) for f in folders for p in sorted(Path("/").glob(f"{f}/{name}")))):
        if place:
            return place
    pytest.skip(f"needs {name}; `make test-cluster` installs it")


@contextmanager
def postgres():
    """Start PostgreSQL on loopback and give the address of a database; as root it runs as the user postgres."""
    initdb, ctl, createdb = (found(n, "usr/lib/postgresql/*/bin") for n in ("initdb", "pg_ctl", "createdb"))
    user = {"user": "postgres"} if os.geteuid() == 0 else {}
    folder, at = Path(tempfile.mkdtemp(dir="/tmp")), port()
    if user:
        shutil.chown(folder, "postgres")

    def call(*words):
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=folder, timeout=60, **user)

    call(initdb, "-D", f"{folder}/data", "-A", "trust", "-U", "ftexp")
    call(
        ctl,
        "-D",
        f"{folder}/data",
        "-o",
        f"-p {at} -k {folder} -c listen_addresses=127.0.0.1",
        "-w",
        "-l",
        f"{folder}/log",
        "start",
    )
    try:
        call(createdb, "-h", "127.0.0.1", "-p", str(at), "-U", "ftexp", "ftexp")
        yield f"postgresql://ftexp@127.0.0.1:{at}/ftexp"
    finally:
        call(ctl, "-D", f"{folder}/data", "-m", "immediate", "stop")
        shutil.rmtree(folder)


@contextmanager
def slurm(folder: Path):
    """Start a Slurm of one node on loopback: controller, node and munge; the environment leads to it."""
    controller, node, munged = (found(n, "usr/sbin") for n in ("slurmctld", "slurmd", "munged"))
    if os.geteuid() != 0:
        pytest.skip("a Slurm node has to be started by root")
    folder = Path(tempfile.mkdtemp(dir="/tmp"))  # munge wants a short path that only root can write
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o600)
    ports, host, cores = (port(), port()), socket.gethostname(), os.cpu_count() or 1
    (folder / "slurm.conf").write_text(
        f"""ClusterName=ftexp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={getpass.getuser()}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/ctl.pid
SlurmdPidFile={folder}/d.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MpiDefault=none
ReturnToService=2
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
    )
    env = {**os.environ, "SLURM_CONF": f"{folder}/slurm.conf"}
    log = (folder / "log").open("ab")
    started = []

    def start(*words):
        started.append(subprocess.Popen(words, env=env, stdout=log, stderr=log))

    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = env["SLURM_CONF"]
    try:
        start(munged, "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}",
              f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed")  # fmt: skip
        time.sleep(1)
        start(controller, "-D", "-c")
        time.sleep(1)
        start(node, "-D")
        until = time.monotonic() + 40
        while "idle" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True, env=env).stdout:
            if time.monotonic() > until:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--full", f"--user={getpass.getuser()}"], env=env, capture_output=True)
        for process in reversed(started):
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ray_nodes(count: int):
    """Start a Ray cluster of several nodes, each a set of processes here; gives its address."""
    pytest.importorskip("ray", reason="needs ray; `make test-cluster` installs it")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        for _ in range(count - 1):
            cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def mlflow(folder: Path, at: int):
    """Start a tracking server on loopback that takes artifacts itself, its store in a folder; gives its address."""
    uri = f"http://127.0.0.1:{at}"
    env = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(at), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/kept"]  # fmt: skip
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        until = time.monotonic() + 90
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{uri}/health", timeout=2):
                break
            if time.monotonic() > until or server.poll() is not None:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
