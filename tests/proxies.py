"""The recipes of deploy/, run: each proxy with its deployed configuration, on a free port before a server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import ssl
import string
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.kit import DEADLINE_S, DEPLOY, certificate, free_port, listens, needs, start_process, wait_for

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


class Proxy:
    """A proxy that runs its recipe; subclasses say what has to be another on this machine, and how it is started.

    In their texts $port, $upstream, $folder, $certificate, $key, $both and $configuration stand for those of a proxy.
    """

    program = ""
    recipe = ""
    scheme = "https"
    ends_by = signal.SIGTERM
    here: Sequence[Change] = ()
    before = after = ""  # what stands around the recipe
    beside = ""  # a file of deploy/ that it needs, too
    options = ""

    def __init__(
        self,
        folder: Path,
        upstream: int,
        changes: Sequence[Change] = (),
        names: str = "IP:127.0.0.1,DNS:localhost",
        days: int = 90,
    ) -> None:
        """changes: what a test has otherwise than the recipe, each of which must be in it. names, days: certified."""
        program = needs(self.program)
        self.folder = folder
        self.upstream = upstream
        self.port = free_port()
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.certificate, self.key = certificate(folder, names, days)
        self.both = folder / "both.pem"  # some want them in one file
        self.both.write_text(self.certificate.read_text() + self.key.read_text())
        self.configuration = folder / self.recipe
        self.other_port = free_port()
        text = (DEPLOY / self.recipe).read_text()
        for old, new in [*changes, *((old, self.filled(new)) for old, new in self.here)]:
            assert old in text, f"{self.recipe} has no {old!r}"
            text = text.replace(old, new)
        self.configuration.write_text(self.filled(self.before) + text + self.filled(self.after))
        if self.beside:
            shutil.copy(DEPLOY / self.beside, folder)
        self.output = folder / "output.log"
        with self.output.open("wb") as output:
            self.process = start_process(program, *self.filled(self.options).split(), stdout=output, stderr=output)

    def filled(self, text: str) -> str:
        return string.Template(text).substitute(vars(self))

    def wait(self) -> None:
        """Until it takes connections."""

        def ready() -> bool:
            assert self.process.poll() is None, self.logs()
            return listens(self.port)

        wait_for(ready, f"{self.recipe} listens")

    def logs(self) -> str:
        """All that it has logged."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*.log")))

    def trusting(self) -> ssl.SSLContext:
        """What takes its certificate."""
        return ssl.create_default_context(cafile=self.certificate)

    def end(self) -> None:
        self.process.send_signal(self.ends_by)
        self.process.wait(DEADLINE_S)


IS_ROOT = os.getuid() == 0
UPSTREAM = ("127.0.0.1:5000", "127.0.0.1:$upstream")
CERTIFICATE = ("/etc/ssl/certs/events.example.org.pem", "$certificate")
KEY = ("/etc/ssl/private/events.example.org.key", "$key")


class Nginx(Proxy):
    program = "nginx"
    recipe = "nginx.conf"
    here = (UPSTREAM, CERTIFICATE, KEY, ("listen 443", "listen 127.0.0.1:$port"), ("/var/log/nginx", "$folder"))
    before = "user root;\n" * IS_ROOT + "daemon off; worker_processes 1; pid $folder/nginx.pid;\n"
    before += "events { worker_connections 256; }\nhttp {\n"
    for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"):
        before += f"{name}_temp_path $folder/{name};\n"
    after = "\n}\n"
    options = "-p $folder -c $configuration -e $folder/main.log"


class Haproxy(Proxy):
    program = "haproxy"
    recipe = "haproxy.cfg"
    here = (
        UPSTREAM,
        ("maxconn 5000", "maxconn 500"),
        ("bind :443", "bind 127.0.0.1:$port"),
        ("/etc/haproxy/events.example.org.pem", "$both"),
    )
    options = "-db -f $configuration"


class Caddy(Proxy):
    program = "caddy"
    recipe = "Caddyfile"
    ends_by = signal.SIGKILL  # it would wait for its streams
    here = (
        UPSTREAM,
        ("\nevents.example.org {", "\nhttps://127.0.0.1:$port {\n\tbind 127.0.0.1\n\ttls $certificate $key"),
        ("\n{\n", "\n{\n\tadmin off\n\tauto_https off\n\tstorage file_system $folder/storage\n"),
    )
    options = "run --config $configuration --adapter caddyfile"


class Varnish(Proxy):
    program = "varnishd"
    recipe = "varnish.vcl"
    scheme = "http"
    here = (('.port = "5000"', '.port = "$upstream"'),)
    options = "-F -a 127.0.0.1:$port -f $configuration -n $folder/varnish -s malloc,16m"
    options += " -p thread_pools=1 -p thread_pool_min=20"


class Lighttpd(Proxy):
    program = "lighttpd"
    recipe = "lighttpd.conf"
    here = (
        ("=> 5000", "=> $upstream"),
        ("server.port = 443", 'server.port = $port\nserver.bind = "127.0.0.1"'),
        ("/etc/lighttpd/events.example.org.pem", "$both"),
        ("5001", "$other_port"),
        ("/var/www/ssepush", "$folder"),
        ("/var/log/lighttpd", "$folder"),
    )
    beside = "away.txt"
    options = "-D -f $configuration"


class Apache(Proxy):
    program = "apache2"
    recipe = "apache.conf"
    here = (
        UPSTREAM,
        CERTIFICATE,
        KEY,
        ("<VirtualHost *:443>", "<VirtualHost 127.0.0.1:$port>"),
        ("/var/log/apache2", "$folder"),
        ("/var/www/ssepush", "$folder"),
    )
    before = "User www-data\nGroup www-data\n" * IS_ROOT
    modules = "mpm_event authz_core alias headers setenvif asis proxy proxy_http ssl http2 socache_shmcb deflate filter"
    for name in modules.split():
        before += f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n"
    before += "ServerRoot $folder\nPidFile $folder/pid\nErrorLog $folder/error.log\n"
    # One process, which all streams share.
    before += "StartServers 1\nServerLimit 1\nThreadsPerChild 100\nMaxRequestWorkers 100\n"
    before += "ServerName localhost\nListen 127.0.0.1:$port\n"
    beside = "away.asis"
    options = "-DFOREGROUND -f $configuration"


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
