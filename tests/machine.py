"""A machine of a test's own whose first process is systemd, made of namespaces. Whatever it changes ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import DEADLINE_S, HERE, TEST_EXTRA, needs, redis_binary, start_process, wait_for

# In a control group of its own, which is all that systemd will see of them.
GROUP = """
set -e
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/$NAME
echo 0 >/sys/fs/cgroup/$NAME/cgroup.procs
exec unshare --cgroup --pid --fork --kill-child --mount --net --ipc --uts sh -c "$BOOT"
"""

# What the unit asks for is where it asks for it, as pip would have installed it; the targets need not do anything here.
# All else can be read only.
BOOT = r"""
set -e
umount /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t proc proc /proc
mount --bind /proc/sys /proc/sys
mount -o remount,bind,ro /proc/sys
mount --bind /dev/null /dev/console
mount -t tmpfs -o mode=755 opt /opt
mkdir -p /opt/ssepush/python /opt/ssepush/libraries /opt/ssepush/bin
cp $HERE/ssepush.py $HERE/index.html /opt/ssepush
mount --bind $BASE /opt/ssepush/python
mount --bind $LIBRARIES /opt/ssepush/libraries
cat >/opt/ssepush/bin/ssepush <<END
#!/bin/sh
export PYTHONPATH=/opt/ssepush/libraries LD_LIBRARY_PATH=/opt/ssepush/python/lib
exec /opt/ssepush/python/$PYTHON /opt/ssepush/ssepush.py "\$@"
END
chmod 755 /opt/ssepush/bin/ssepush
cp $REDIS /opt/redis-server
mount -t tmpfs -o mode=755 run /run
mkdir /run/units
cp $HERE/deploy/ssepush@.service /run/units
for name in sysinit basic network-online multi-user shutdown; do
    printf '[Unit]\nDefaultDependencies=no\n' >/run/units/$name.target
done
printf '[Service]\nExecStart=/opt/redis-server --save "" --dir /tmp\n' >/run/units/redis-server.service
cp /etc/passwd /run/passwd
echo ssepush:x:$USER:$USER::/nonexistent:/usr/sbin/nologin >>/run/passwd
mount --bind /run/passwd /etc/passwd
mount -t tmpfs tmp /var/tmp
mount -t tmpfs tmp /tmp
mount -o remount,bind,ro /
cd /
exec env -i PATH=$PATH container=tests SYSTEMD_UNIT_PATH=/run/units \
    /lib/systemd/systemd --unit=multi-user.target --log-target=null
"""

CLEAN = """
mount -t cgroup2 cgroup2 /sys/fs/cgroup
cd /sys/fs/cgroup
[ ! -e $NAME ] || find $NAME -depth -type d -exec rmdir {} +
"""

USER = 64999
VARIABLES = {
    "NAME": f"ssepush-tests-{os.getpid()}",
    "BOOT": BOOT,
    "HERE": str(HERE),
    "BASE": sys.base_prefix,
    "PYTHON": str(Path(sys.executable).resolve().relative_to(Path(sys.base_prefix).resolve())),
    "LIBRARIES": sysconfig.get_path("purelib"),
    "USER": str(USER),
}


def unshare(script: str, **variables: str) -> list[str]:
    """A command that runs a script with mounts of its own."""
    values = [f"{name}={value}" for name, value in (VARIABLES | variables).items()]
    return [needs("unshare"), "--mount", "env", *values, "sh", "-c", script]


class Machine:
    """It has the unit as it is deployed, a user `ssepush`, the program in /opt/ssepush, and a Redis to start."""

    def __init__(self, outer: subprocess.Popen[bytes]) -> None:
        """outer: what has started its first process."""
        psutil = pytest.importorskip("psutil", reason=TEST_EXTRA)
        of_outer = psutil.Process(outer.pid).children
        self._first = wait_for(
            lambda: next((child.pid for child in of_outer() if child.name() == "systemd"), 0), "systemd is there"
        )
        up = ("systemctl", "is-active", "multi-user.target")
        wait_for(lambda: self.run(*up).returncode == 0, "systemd answers")

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


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Its first process goes with the one that started it, all others with that; then its control groups can go."""
    needs("systemctl")
    if os.getuid() != 0 or subprocess.run(unshare("exit 0")).returncode != 0:
        pytest.skip("needs root, to start a systemd of its own")
    outer = start_process(*unshare(GROUP, REDIS=redis_binary()))
    try:
        yield Machine(outer)
    finally:
        outer.kill()
        outer.wait(DEADLINE_S)
        clean = unshare(CLEAN)
        wait_for(lambda: subprocess.run(clean, capture_output=True).returncode == 0, "nothing runs any more")
