"""An sshd of the test's own on 127.0.0.1, with a key and a door for each host; all its files lie in the test's folder."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from farm_calls import FARM
from sandbox import Started, run, wait_until


def need_sshd() -> str:
    """The path of sshd. Without one the test fails, unless FARM_TESTS_WITHOUT_SSHD admits that."""
    path = shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")
    if path is None and os.environ.get("FARM_TESTS_WITHOUT_SSHD"):
        pytest.skip("there is no sshd, and FARM_TESTS_WITHOUT_SSHD is set")
    assert path, "there is no sshd: apt install openssh-server, or set FARM_TESTS_WITHOUT_SSHD=1"
    return path


class Sshd:
    """The server; hosts reach it as `hub` by `ssh(name)`."""

    def __init__(self, folder: Path, repo: Path):
        self.folder, self.repo, self.path = folder, repo, need_sshd()
        folder.mkdir()
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "server"], check=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        given = ("HOME", "TEST_TOKEN", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM", "FARM_HOST_LEASE_SECONDS")
        lines = {
            "Port": self.port,
            "ListenAddress": "127.0.0.1",
            "HostKey": folder / "server",
            "AuthorizedKeysFile": folder / "authorized",
            "PidFile": folder / "pid",
            "StrictModes": "no",
            "UsePAM": "no",
            "PasswordAuthentication": "no",
            "PermitRootLogin": "prohibit-password",
            "MaxStartups": "100",
            "SetEnv": " ".join(f"{name}={os.environ[name]}" for name in given if name in os.environ),
        }
        (folder / "config").write_text("".join(f"{key} {value}\n" for key, value in lines.items()))
        (folder / "authorized").write_text("")
        self.process: Started | None = None

    def start(self) -> Sshd:
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        argv = [self.path, "-D", "-f", str(self.folder / "config"), "-E", str(self.folder / "log")]
        self.process = Started(argv, stdin=subprocess.DEVNULL)

        def answers() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(answers, 10, "sshd")
        return self

    def kill(self) -> None:
        """kill -9 of the server and of every connection that it has."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        self.process.kill()
        self.process.wait()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family, timeout=5)

    def let_in(self, host: str) -> str:
        """A key for the host, with its door; the ssh command that the host is to use."""
        key = self.folder / host
        argv = [sys.executable, FARM, "--repo", self.repo, "spoke-key", host, "-o", key]
        line = run(argv, check=True).stdout
        with (self.folder / "authorized").open("a") as file:
            file.write(line)
        words = [f"  HostName 127.0.0.1\n  Port {self.port}\n  IdentityFile {key}\n  IdentitiesOnly yes\n"]
        words += [f"  UserKnownHostsFile {self.folder}/known\n  StrictHostKeyChecking accept-new\n  LogLevel ERROR\n"]
        (self.folder / f"{host}.conf").write_text("Host hub\n" + "".join(words))
        return f"ssh -F {self.folder / host}.conf"
