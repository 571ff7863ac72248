"""Several machines, all played by this one: an sshd of its own on 127.0.0.1, whose key opens a shell under each of their names.

For the demo and the tests. Nothing but OpenSSH is needed, and nothing outside of the folder is written, but /run/sshd as root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from paths import ROOT

SSH = """#!/bin/sh
for word; do
  if [ -e {folder}/"off-$word" ]; then echo "ssh: $word: No route to host" >&2; exit 255; fi
done
exec ssh -F {folder}/client "$@"
"""


def find_sshd() -> str | None:
    return shutil.which("sshd", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/usr/local/sbin")


class Boxes:
    """`names` are what one can ssh to, and each of them can come back to the farm of `repo` as a host of its name.

    home: the HOME that all of them have. env: what the farm must be started with.
    """

    def __init__(self, folder: Path, repo: Path, names: list[str]):
        self.folder, self.home, self.names = folder, folder / "home", names
        (self.home / ".ssh").mkdir(parents=True)
        self.ssh = folder / "ssh"
        self.ssh.write_text(SSH.format(folder=shlex.quote(str(folder))))
        self.ssh.chmod(0o755)
        self.env = {"GIT_SSH_COMMAND": str(self.ssh), "FARM_HUB_ADDRESS": "hub"}
        for key in ("server", "person"):
            self.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        doors = [self.make_door(repo, name) for name in names]
        (folder / "authorized").write_text((folder / "person.pub").read_text() + "".join(doors))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.write_settings()
        self.process: subprocess.Popen[bytes] | None = None

    @staticmethod
    def run(*words: str) -> str:
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True).stdout

    def make_door(self, repo: Path, name: str) -> str:
        """The line of `authorized_keys` by which a box comes to the hub; its key lies where a spoke looks for it."""
        key = self.home / ".ssh" / f"farm-{name}"
        return self.run(sys.executable, str(ROOT / "farm.py"), "--repo", str(repo), "spoke-key", name, "-o", str(key))

    def write_settings(self) -> None:
        folder = self.folder
        kept = ("TEST_TOKEN", "GIT_CONFIG_GLOBAL", "GIT_CONFIG_NOSYSTEM", "TMUX_TMPDIR")
        given = {name: os.environ[name] for name in kept if name in os.environ}
        given |= {"HOME": str(self.home), "GIT_SSH_COMMAND": str(self.ssh)}
        server = {
            "Port": self.port, "ListenAddress": "127.0.0.1", "HostKey": folder / "server",
            "AuthorizedKeysFile": folder / "authorized", "PidFile": folder / "pid", "StrictModes": "no", "UsePAM": "no",
            "PasswordAuthentication": "no", "PermitRootLogin": "prohibit-password", "MaxStartups": 100,
            "SetEnv": " ".join(f"{name}={value}" for name, value in given.items()),
        }
        client = {
            "HostName": "127.0.0.1", "Port": self.port, "IdentitiesOnly": "yes", "UserKnownHostsFile": folder / "known",
            "StrictHostKeyChecking": "accept-new", "LogLevel": "ERROR",
        }
        (folder / "server.conf").write_text("".join(f"{key} {value}\n" for key, value in server.items()))
        everybody = "".join(f"{key} {value}\n" for key, value in client.items())
        (folder / "client").write_text(f"Host {' '.join(self.names)}\nIdentityFile {folder / 'person'}\nHost *\n{everybody}")

    def start(self) -> Boxes:
        """Raises TimeoutError when it does not listen within ten seconds."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)
        argv = [find_sshd() or "sshd", "-D", "-f", str(self.folder / "server.conf"), "-E", str(self.folder / "log")]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while socket.socket().connect_ex(("127.0.0.1", self.port)):
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "log").read_text())
            time.sleep(0.05)
        return self

    def unplug(self, name: str) -> None:
        """From now on nobody gets there."""
        (self.folder / f"off-{name}").touch()

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()
