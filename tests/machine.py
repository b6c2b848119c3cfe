"""A machine of a test's own whose first process is systemd, made of namespaces. Whatever it changes ends with it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.kit import DEADLINE_S, DEPLOY, HERE, TEST_EXTRA, needs, redis_binary, start_process, wait_for

SYSTEMD = "/lib/systemd/systemd"

# In a control group of its own, which is all that systemd will see of them.
GROUP = """
set -e
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/$NAME
echo 0 >/sys/fs/cgroup/$NAME/cgroup.procs
exec unshare --cgroup --pid --fork --kill-child --mount --net --ipc --uts sh $FOLDER/boot
"""

# What the unit asks for is where it asks for it. All else can be read only.
BOOT = """
set -e
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /dev/null /dev/console
mount --bind $FOLDER/passwd /etc/passwd
mount -t tmpfs -o mode=755 opt /opt
mkdir -p /opt/ssepush/python /opt/ssepush/libraries
cp -R $FOLDER/ssepush /opt
mount --bind $PYTHON /opt/ssepush/python
mount --bind $LIBRARIES /opt/ssepush/libraries
cp $REDIS /opt/redis-server
mount -t tmpfs -o mode=755 run /run
cp -R $FOLDER/units /run/units
mount -t tmpfs tmp /var/tmp
mount -t tmpfs tmp /tmp
mount -o remount,bind,ro /
cd /
exec env -i PATH=$PATH container=tests SYSTEMD_UNIT_PATH=/run/units $SYSTEMD --unit=multi-user.target --log-target=null
"""

CLEAN = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cd /sys/fs/cgroup
[ ! -e $NAME ] || find $NAME -depth -type d -exec rmdir {} +
"""

REDIS_UNIT = """
[Service]
ExecStart=/opt/redis-server --save "" --dir /tmp
"""

# As pip would have installed it, for a user who may not look into the folders of the tests.
INSTALLED = """#!/bin/sh
export PYTHONPATH=/opt/ssepush/libraries LD_LIBRARY_PATH=/opt/ssepush/python/lib
exec /opt/ssepush/python/{python} /opt/ssepush/ssepush.py "$@"
"""

# Units that others want, but that need not do anything here.
STUBS = ("sysinit", "basic", "network-online", "multi-user", "shutdown")


def unshare(script: str, variables: dict[str, str]) -> list[str]:
    """A command that runs a script with mounts of its own."""
    values = [f"{name}={value}" for name, value in variables.items()]
    return [needs("unshare"), "--mount", "env", *values, "sh", "-c", script]


class Machine:
    """It has the unit as it is deployed, a user `ssepush`, the program in /opt/ssepush, and a Redis to start."""

    user = 64999

    def __init__(self, folder: Path) -> None:
        self._kernel = pytest.importorskip("psutil", reason=TEST_EXTRA)
        needs("systemctl")
        is_allowed = os.getuid() == 0 and subprocess.run(unshare("exit 0", {})).returncode == 0
        if not is_allowed:
            pytest.skip("needs root, to start a systemd of its own")
        base = Path(sys.base_prefix)
        python = Path(sys.executable).resolve().relative_to(base.resolve())
        self._write(folder, INSTALLED.format(python=python))
        self._variables = {
            "NAME": f"ssepush-tests-{os.getpid()}",
            "FOLDER": str(folder),
            "PYTHON": str(base),
            "LIBRARIES": sysconfig.get_path("purelib"),
            "REDIS": redis_binary(),
            "SYSTEMD": SYSTEMD,
        }
        self._outer = start_process(*unshare(GROUP, self._variables))
        try:
            self._first = wait_for(self._find_first, "the first process is there")
            wait_for(self._is_up, "systemd answers")
        except BaseException:
            self.end()
            raise

    def _write(self, folder: Path, installed: str) -> None:
        units = folder / "units"
        units.mkdir()
        for name in STUBS:
            (units / f"{name}.target").write_text("[Unit]\nDefaultDependencies=no\n")
        (units / "redis-server.service").write_text(REDIS_UNIT)
        shutil.copy(DEPLOY / "ssepush@.service", units)
        bin = folder / "ssepush" / "bin"
        bin.mkdir(parents=True)
        (bin / "ssepush").write_text(installed)
        (bin / "ssepush").chmod(0o755)
        for name in ("ssepush.py", "index.html"):
            shutil.copy(HERE / name, folder / "ssepush")
        users = Path("/etc/passwd").read_text()
        (folder / "passwd").write_text(f"{users}ssepush:x:{self.user}:{self.user}::/nonexistent:/usr/sbin/nologin\n")
        (folder / "boot").write_text(BOOT)

    def _find_first(self) -> int:
        """The number that systemd has outside, 0 while it is not there yet."""
        assert self._outer.poll() is None, "the machine did not start"
        children = self._kernel.Process(self._outer.pid).children()
        return next((child.pid for child in children if child.name() == "systemd"), 0)

    def _is_up(self) -> bool:
        assert self._outer.poll() is None, "the machine did not start"
        return self.run("systemctl", "is-active", "multi-user.target").returncode == 0

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A command inside, to its end."""
        inside = [needs("nsenter"), "--target", str(self._first), "--all", *command]
        return subprocess.run(inside, capture_output=True, text=True, timeout=DEADLINE_S, check=False)

    def said_by(self, *command: str) -> str:
        """What a command that ends well prints."""
        done = self.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def shown(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.said_by("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def end(self) -> None:
        """Its first process goes with the one that started it, and all others with that."""
        self._outer.kill()
        self._outer.wait(DEADLINE_S)
        wait_for(self._is_cleaned, "nothing runs any more")

    def _is_cleaned(self) -> bool:
        """Whether its control groups are empty, and so could be removed."""
        done = subprocess.run(unshare(CLEAN, self._variables), capture_output=True)
        return done.returncode == 0
