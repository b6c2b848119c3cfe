"""The recipes of deploy/, run: each proxy with its deployed configuration, on a free port before a server."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import string
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

from tests.kit import DEADLINE_S, DEPLOY, LOCAL, certificate, free_port, listens, needs, start_process, wait_for

Change = tuple[str, str]  # (what stands in the recipe, what stands there in the test)


class Recipe(NamedTuple):
    """What a proxy is started with. In all texts $port, $folder and the like stand for those of a Proxy."""

    program: str
    name: str
    options: str
    here: Sequence[Change]  # what has to be another on this machine
    before: str = ""  # what stands around the recipe
    after: str = ""
    beside: str = ""  # a file of deploy/ that it needs, too
    scheme: str = "https"
    ends_by: signal.Signals = signal.SIGTERM


IS_ROOT = os.getuid() == 0
# What has to be another in all of them, where it is there.
EVERYWHERE = {
    "127.0.0.1:5000": "127.0.0.1:$upstream",
    "/etc/ssl/certs/events.example.org.pem": "$certificate",
    "/etc/ssl/private/events.example.org.key": "$key",
    "/etc/haproxy/events.example.org.pem": "$both",
    "/etc/lighttpd/events.example.org.pem": "$both",
    "/var/log/nginx": "$folder",
    "/var/log/lighttpd": "$folder",
    "/var/log/apache2": "$folder",
    "/var/www/ssepush": "$folder",
}
NGINX = """
daemon off; worker_processes 1; pid $folder/nginx.pid;
events { worker_connections 256; }
http {
client_body_temp_path $folder/body; proxy_temp_path $folder/proxy; fastcgi_temp_path $folder/fastcgi;
uwsgi_temp_path $folder/uwsgi; scgi_temp_path $folder/scgi;
"""
APACHE = """
ServerRoot $folder
PidFile $folder/pid
ErrorLog $folder/error.log
ServerName localhost
Listen 127.0.0.1:$port
StartServers 1
ServerLimit 1
ThreadsPerChild 100
MaxRequestWorkers 100
"""  # one process, which all streams share
MODULES = "mpm_event authz_core alias headers setenvif asis proxy proxy_http ssl http2 socache_shmcb deflate filter"
LOADED = [f"LoadModule {name}_module /usr/lib/apache2/modules/mod_{name}.so\n" for name in MODULES.split()]
CADDY = [
    ("\nevents.example.org {", "\nhttps://127.0.0.1:$port {\n\tbind 127.0.0.1\n\ttls $certificate $key"),
    ("\n{\n", "\n{\n\tadmin off\n\tauto_https off\n\tstorage file_system $folder/storage\n"),
]
LIGHTTPD = [
    ("=> 5000", "=> $upstream"),
    ("server.port = 443", 'server.port = $port\nserver.bind = "127.0.0.1"'),
    ("5001", "$other_port"),
]

RECIPES = {
    "nginx": Recipe(
        "nginx",
        "nginx.conf",
        "-p $folder -c $configuration -e $folder/main.log",
        [("listen 443", "listen 127.0.0.1:$port")],
        before="user root;" * IS_ROOT + NGINX,
        after="\n}\n",
    ),
    "haproxy": Recipe(
        "haproxy",
        "haproxy.cfg",
        "-db -f $configuration",
        [("maxconn 5000", "maxconn 500"), ("bind :443", "bind 127.0.0.1:$port")],
    ),
    "Caddy": Recipe(
        "caddy",
        "Caddyfile",
        "run --config $configuration --adapter caddyfile",
        CADDY,
        ends_by=signal.SIGKILL,  # it would wait for its streams
    ),
    "Varnish": Recipe(
        "varnishd",
        "varnish.vcl",
        "-F -a 127.0.0.1:$port -f $configuration -n $folder/varnish -s malloc,16m -p thread_pool_min=20",
        [('.port = "5000"', '.port = "$upstream"')],
        scheme="http",
    ),
    "lighttpd": Recipe("lighttpd", "lighttpd.conf", "-D -f $configuration", LIGHTTPD, beside="away.txt"),
    "Apache": Recipe(
        "apache2",
        "apache.conf",
        "-DFOREGROUND -f $configuration",
        [("<VirtualHost *:443>", "<VirtualHost 127.0.0.1:$port>")],
        before="User www-data\nGroup www-data\n" * IS_ROOT + "".join(LOADED) + APACHE,
        beside="away.asis",
    ),
}


class Proxy:
    """A proxy that runs its recipe, until the context is left."""

    def __init__(
        self, name: str, upstream: int, changes: Sequence[Change] = (), names: str = LOCAL, days: int = 90
    ) -> None:
        """changes: what a test has otherwise than the recipe, each of which must be in it. names, days: certified."""
        recipe = RECIPES[name]
        program = needs(recipe.program)
        # It is read also by who has given up being root, as pytest's own folders are not.
        folder = Path(tempfile.mkdtemp(prefix="proxy-"))
        folder.chmod(0o755)
        self.folder = folder
        self.recipe = recipe.name
        self.scheme = recipe.scheme
        self.upstream = upstream
        self.port = free_port()
        self.other_port = free_port()
        self.url = f"{self.scheme}://127.0.0.1:{self.port}"
        self.certificate, self.key = certificate(folder, names, days)
        self.both = folder / "both.pem"  # some want them in one file
        self.both.write_text(self.certificate.read_text() + self.key.read_text())
        self.configuration = folder / recipe.name
        text = (DEPLOY / recipe.name).read_text()
        for old, new in [*changes, *((old, self.filled(new)) for old, new in recipe.here)]:
            assert old in text, f"{recipe.name} has no {old!r}"
            text = text.replace(old, new)
        for old, new in EVERYWHERE.items():
            text = text.replace(old, self.filled(new))
        self.configuration.write_text(self.filled(recipe.before) + text + self.filled(recipe.after))
        if recipe.beside:
            shutil.copy(DEPLOY / recipe.beside, folder)
        self._ends_by = recipe.ends_by
        with (folder / "output.log").open("wb") as output:
            self._process = start_process(program, *self.filled(recipe.options).split(), stdout=output, stderr=output)

    def filled(self, text: str) -> str:
        return string.Template(text).substitute(vars(self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.send_signal(self._ends_by)
        self._process.wait(DEADLINE_S)
        shutil.rmtree(self.folder, ignore_errors=True)

    def is_up(self) -> bool:
        """Whether it takes connections."""
        assert self._process.poll() is None, self.logs()
        return listens(self.port)

    def logs(self) -> str:
        """All that it has logged."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def proxies_before(upstream: int, *names: str, changes: Sequence[Change] = ()) -> Iterator[dict[str, Proxy]]:
    """The named proxies, all if none is named, before a server; started side by side."""
    with contextlib.ExitStack() as stack:
        proxies = {name: stack.enter_context(Proxy(name, upstream, changes)) for name in names or RECIPES}
        for name, proxy in proxies.items():
            wait_for(proxy.is_up, f"{name} listens")
        yield proxies
