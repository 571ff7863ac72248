"""A Slurm of the test's own on 127.0.0.1: munged, slurmctld and three slurmd; all its files lie in the test's folder."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
from pathlib import Path

import psutil
import pytest
from sandbox import Started, run, wait_until

PATH = f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin"
NODES = ("n1", "n2", "n3")
SETTINGS = """\
ClusterName=farm
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdTimeout=10
SlurmctldTimeout=10
KillWait=2
MinJobAge=300
SchedulerParameters=sched_min_interval=0
JobRequeue=1
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=1000\n"
PARTITION = "PartitionName=farm Nodes={nodes} Default=YES State=UP MaxTime=INFINITE OverSubscribe=NO\n"


def need_slurm() -> None:
    """Without Slurm the test fails, unless FARM_TESTS_WITHOUT_SLURM admits that."""
    missing = [tool for tool in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(tool, path=PATH)]
    if missing and os.environ.get("FARM_TESTS_WITHOUT_SLURM"):
        pytest.skip("there is no Slurm, and FARM_TESTS_WITHOUT_SLURM is set")
    assert not missing, f"{missing} missing: apt install slurm-wlm munge, or set FARM_TESTS_WITHOUT_SLURM=1"


def find_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


class Slurm:
    """Three nodes of one processor each. Programs find it by `env`."""

    def __init__(self, folder: Path):
        need_slurm()
        self.folder, self.env = folder, {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": PATH}
        for name in (".", "munge", "state", *NODES):
            (folder / name).mkdir(mode=0o700)
        (folder / "munge/key").write_bytes(secrets.token_bytes(1024))
        (folder / "munge/key").chmod(0o600)
        controller, *ports = find_ports(4)
        told = {"host": socket.gethostname().split(".")[0], "user": getpass.getuser(), "folder": folder}
        nodes = [NODE.format(name=name, port=port, **told) for name, port in zip(NODES, ports, strict=True)]
        text = SETTINGS.format(port=controller, **told) + "".join(nodes) + PARTITION.format(nodes=",".join(NODES))
        (folder / "slurm.conf").write_text(text)
        self.processes: dict[str, Started] = {}

    def start(self) -> Slurm:
        munge = self.folder / "munge"
        words = [f"--{name}={munge / name}" for name in ("key-file", "pid-file", "log-file", "seed-file")]
        (munge / "key").rename(munge / "key-file")
        self.launch("munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock", *words)
        wait_until((self.folder / "munge.sock").exists, 20, "munged")
        self.start_controller()
        for name in NODES:
            self.launch("slurmd", "-D", "-N", name, name=name)
        wait_until(lambda: self.ask("sinfo", "-h", "-o", "%t %D").split() == ["idle", "3"], 40, "three idle nodes")
        return self

    def start_controller(self) -> None:
        self.launch("slurmctld", "-D")

    def launch(self, program: str, *args: str, name: str = "") -> None:
        env = {**os.environ, **self.env}
        path = str(shutil.which(program, path=PATH))
        with (self.folder / f"{name or program}.out").open("ab") as out:
            self.processes[name or program] = Started([path, *args], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env)

    def ask(self, *words: str) -> str:
        return run(words, env=self.env).stdout

    def jobs(self) -> list[list[str]]:
        """[name, index, id, state, node] of each that is not over."""
        return [line.split("|") for line in self.ask("squeue", "-h", "-r", "-o", "%j|%K|%F_%K|%T|%N").splitlines()]

    def kill(self, name: str, *, family: bool = True) -> None:
        """kill -9 of a daemon, with all that it runs."""
        process = psutil.Process(self.processes[name].pid)
        ended = [*(process.children(recursive=True) if family else ()), process]
        for one in ended:
            if one.is_running():
                one.kill()
        self.processes.pop(name).wait()

    def stop(self) -> None:
        for name in (*NODES, "slurmctld", "munged"):
            if name in self.processes:
                self.processes[name].terminate()
        for process in self.processes.values():
            process.wait(20)
