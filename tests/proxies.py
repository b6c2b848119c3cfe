"""The recipes of deploy/, run: each proxy with its deployed configuration, on a free port before a server."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import ssl
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.kit import DEADLINE_S, DEPLOY, free_port, listens, needs, start_process, wait_for

Change = tuple[str, str]  # (what stands in the recipe, what stands there in the test)


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that a proxy can read also after it has given up being root, as pytest's own folders are not."""
    folder = Path(tempfile.mkdtemp(prefix="proxy-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@functools.cache
def certificate(names: str, days: int) -> tuple[str, str]:
    """A self-signed certificate, and its key: `certificate("DNS:localhost", 90)`."""
    kind = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=tests"
    details = ["-days", str(days), "-addext", f"subjectAltName={names}"]
    with open_folder() as folder:
        pem, key = folder / "certificate.pem", folder / "key.pem"
        files = ["-out", str(pem), "-keyout", str(key)]
        subprocess.run([needs("openssl"), *kind.split(), *details, *files], check=True, capture_output=True)
        return pem.read_text(), key.read_text()


class Proxy:
    """A proxy that runs its recipe; subclasses know how it is started, and what differs on this machine."""

    program = ""
    recipe = ""
    scheme = "https"
    ends_by = signal.SIGTERM

    def __init__(
        self,
        folder: Path,
        upstream: int,
        changes: Sequence[Change] = (),
        names: str = "IP:127.0.0.1,DNS:localhost",
        days: int = 90,
    ) -> None:
        """changes: what a test has otherwise than the recipe, each of which must be in it. names, days: certified."""
        needs(self.program)
        self.folder = folder
        self.upstream = upstream
        self.port = free_port()
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.certificate = folder / "certificate.pem"
        self.key = folder / "key.pem"
        self.both = folder / "both.pem"  # some want them in one file
        pem, key = certificate(names, days)
        self.certificate.write_text(pem)
        self.key.write_text(key)
        self.both.write_text(pem + key)
        text = (DEPLOY / self.recipe).read_text()
        for old, new in [*changes, *self.here()]:
            assert old in text, f"{self.recipe} has no {old!r}"
            text = text.replace(old, new)
        self.configuration = folder / self.recipe
        self.configuration.write_text(self.whole(text))
        self.output = folder / "output.log"
        with self.output.open("wb") as output:
            self.process = start_process(*self.command(), stdout=output, stderr=output)

    def here(self) -> list[Change]:
        """What has to be another on this machine: ports, files, names."""
        raise NotImplementedError

    def whole(self, text: str) -> str:
        """The recipe with what stands around it."""
        return text

    def command(self) -> list[str]:
        raise NotImplementedError

    def wait(self) -> None:
        """Until it takes connections."""

        def ready() -> bool:
            assert self.process.poll() is None, self.logs()
            return listens(self.port)

        wait_for(ready, f"{self.recipe} listens")

    def logs(self) -> str:
        """All that it has logged."""
        files = sorted(self.folder.glob("*.log"))
        return "".join(file.read_text(errors="replace") for file in files)

    def trusting(self) -> ssl.SSLContext:
        """What takes its certificate."""
        return ssl.create_default_context(cafile=self.certificate)

    def end(self) -> None:
        self.process.send_signal(self.ends_by)
        self.process.wait(DEADLINE_S)


class Nginx(Proxy):
    program = "nginx"
    recipe = "nginx.conf"

    def here(self) -> list[Change]:
        return [
            ("127.0.0.1:5000", f"127.0.0.1:{self.upstream}"),
            ("listen 443", f"listen 127.0.0.1:{self.port}"),
            ("/etc/ssl/certs/events.example.org.pem", str(self.certificate)),
            ("/etc/ssl/private/events.example.org.key", str(self.key)),
            ("/var/log/nginx", str(self.folder)),
        ]

    def whole(self, text: str) -> str:
        user = "user root;" if os.getuid() == 0 else ""
        buffers = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        paths = "\n".join(f"{name}_temp_path {self.folder}/{name};" for name in buffers)
        main = f"{user} daemon off; worker_processes 1; pid {self.folder}/nginx.pid;"
        return f"{main}\nevents {{ worker_connections 256; }}\nhttp {{\n{paths}\n{text}\n}}\n"

    def command(self) -> list[str]:
        log = f"{self.folder}/main.log"
        return [needs(self.program), "-p", str(self.folder), "-c", str(self.configuration), "-e", log]


class Haproxy(Proxy):
    program = "haproxy"
    recipe = "haproxy.cfg"

    def here(self) -> list[Change]:
        return [
            ("maxconn 5000", "maxconn 500"),
            ("127.0.0.1:5000", f"127.0.0.1:{self.upstream}"),
            ("bind :443", f"bind 127.0.0.1:{self.port}"),
            ("/etc/haproxy/events.example.org.pem", str(self.both)),
        ]

    def command(self) -> list[str]:
        return [needs(self.program), "-db", "-f", str(self.configuration)]


class Caddy(Proxy):
    program = "caddy"
    recipe = "Caddyfile"
    ends_by = signal.SIGKILL  # it would wait for its streams

    def here(self) -> list[Change]:
        site = f"https://127.0.0.1:{self.port} {{\n\tbind 127.0.0.1\n\ttls {self.certificate} {self.key}"
        return [
            ("127.0.0.1:5000", f"127.0.0.1:{self.upstream}"),
            ("\nevents.example.org {", f"\n{site}"),
            ("\n{\n", "\n{\n\tadmin off\n\tauto_https off\n\tstorage file_system " + f"{self.folder}/storage\n"),
        ]

    def command(self) -> list[str]:
        return [needs(self.program), "run", "--config", str(self.configuration), "--adapter", "caddyfile"]


class Varnish(Proxy):
    program = "varnishd"
    recipe = "varnish.vcl"
    scheme = "http"

    def here(self) -> list[Change]:
        return [('.port = "5000"', f'.port = "{self.upstream}"')]

    def command(self) -> list[str]:
        work = self.folder / "varnish"
        listen = f"127.0.0.1:{self.port}"
        small = ("-s", "malloc,16m", "-p", "thread_pools=1", "-p", "thread_pool_min=20")
        return [needs(self.program), "-F", "-a", listen, "-f", str(self.configuration), "-n", str(work), *small]


class Lighttpd(Proxy):
    program = "lighttpd"
    recipe = "lighttpd.conf"

    def here(self) -> list[Change]:
        self.itself = free_port()
        return [
            ("=> 5000", f"=> {self.upstream}"),
            ("server.port = 443", f'server.port = {self.port}\nserver.bind = "127.0.0.1"'),
            ("/etc/lighttpd/events.example.org.pem", str(self.both)),
            ("5001", str(self.itself)),
            ("/var/www/ssepush", str(self.folder)),
            ("/var/log/lighttpd", str(self.folder)),
        ]

    def whole(self, text: str) -> str:
        shutil.copy(DEPLOY / "away.txt", self.folder)
        return text

    def command(self) -> list[str]:
        return [needs(self.program), "-D", "-f", str(self.configuration)]


class Apache(Proxy):
    program = "apache2"
    recipe = "apache.conf"
    modules = "mpm_event authz_core alias headers setenvif asis proxy proxy_http ssl http2 socache_shmcb deflate filter"

    def here(self) -> list[Change]:
        return [
            ("127.0.0.1:5000", f"127.0.0.1:{self.upstream}"),
            ("<VirtualHost *:443>", f"<VirtualHost 127.0.0.1:{self.port}>"),
            ("/etc/ssl/certs/events.example.org.pem", str(self.certificate)),
            ("/etc/ssl/private/events.example.org.key", str(self.key)),
            ("/var/log/apache2", str(self.folder)),
            ("/var/www/ssepush", str(self.folder)),
        ]

    def whole(self, text: str) -> str:
        shutil.copy(DEPLOY / "away.asis", self.folder)
        modules = "/usr/lib/apache2/modules"
        load = "\n".join(f"LoadModule {name}_module {modules}/mod_{name}.so" for name in self.modules.split())
        files = f"ServerRoot {self.folder}\nPidFile {self.folder}/pid\nErrorLog {self.folder}/error.log"
        user = "User www-data\nGroup www-data" if os.getuid() == 0 else ""
        # One process, which all streams share.
        size = "StartServers 1\nServerLimit 1\nThreadsPerChild 100\nMaxRequestWorkers 100"
        return f"{load}\n{files}\n{user}\n{size}\nServerName localhost\nListen 127.0.0.1:{self.port}\n{text}"

    def command(self) -> list[str]:
        return [needs(self.program), "-DFOREGROUND", "-f", str(self.configuration)]


PROXIES: dict[str, type[Proxy]] = {
    "nginx": Nginx,
    "haproxy": Haproxy,
    "Caddy": Caddy,
    "Varnish": Varnish,
    "lighttpd": Lighttpd,
    "Apache": Apache,
}


@contextlib.contextmanager
def proxies_before(upstream: int, *names: str, changes: Sequence[Change] = ()) -> Iterator[dict[str, Proxy]]:
    """The named proxies, all if none is named, before a server; started side by side."""
    wanted = {name: PROXIES[name] for name in names or PROXIES}
    for proxy_type in wanted.values():
        needs(proxy_type.program)
    with contextlib.ExitStack() as stack:
        started: dict[str, Proxy] = {}
        for name, proxy_type in wanted.items():
            proxy = proxy_type(stack.enter_context(open_folder()), upstream, changes)
            stack.callback(proxy.end)
            started[name] = proxy
        for proxy in started.values():
            proxy.wait()
        yield started
