"""What bench.py measured, as a table with the bars to reach, as JSON and as an SVG chart.

`python bench/report.py results.json` prints the table again and draws the chart anew, without measuring.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path

from servers import DETAIL_STREAMS, PEERS

SMALL_BYTES = 64
BUSY = 0.9  # above this share of one core, the load generator may be what limits

LABELS = {peer.name: peer.label for peer in PEERS}
Key = tuple[str, int, int, int]  # case, streams, payload bytes, outstanding


@dataclass(frozen=True)
class Sample:
    """What one server did in one round of one case; `values` has units in its names."""

    round: int
    peer: str
    case: str  # "open", "deliver", "idle", "post" or "failed"
    streams: int
    outstanding: int = 0
    payload_bytes: int = 0
    values: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def key(self) -> Key:
        return self.case, self.streams, self.payload_bytes, self.outstanding


@dataclass
class Results:
    machine: dict[str, str | int]
    settings: dict[str, float]
    missing: dict[str, str]  # server: what is not installed
    samples: list[Sample]

    @property
    def rounds(self) -> int:
        return max((sample.round for sample in self.samples), default=0)

    def by_round(self, peer: str, key: Key, metric: str) -> dict[int, float]:
        return {
            sample.round: sample.values[metric]
            for sample in self.samples
            if sample.peer == peer and sample.key == key and metric in sample.values
        }

    def median(self, peer: str, key: Key, metric: str) -> float | None:
        values = self.by_round(peer, key, metric).values()
        return statistics.median(values) if values else None

    def keys(self, case: str) -> list[Key]:
        return sorted({sample.key for sample in self.samples if sample.case == case})

    def peers(self, key: Key) -> list[str]:
        present = {sample.peer for sample in self.samples if sample.key == key}
        return [name for name in LABELS if name in present]


# ---- The bars ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """A promise: the metric, as a ratio to another server's (or itself), keeps to a bound."""

    peer: str
    metric: str
    sign: str  # "<=" or ">="
    bound: float
    key: Key
    against: str = ""
    against_key: Key | None = None

    def measured(self, results: Results) -> list[float]:
        """One per round in which both were measured; in order of size."""
        own = results.by_round(self.peer, self.key, self.metric)
        if not self.against:
            return sorted(own.values())
        other = results.by_round(self.against, self.against_key or self.key, self.metric)
        return sorted(own[n] / other[n] for n in own.keys() & other.keys() if other[n])

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.sign == "<=" else value >= self.bound

    def __str__(self) -> str:
        what = f"{LABELS[self.peer]}, {case_text(self.key)}: {METRICS[self.metric]}"
        if not self.against:
            return what
        other = LABELS[self.against] if self.against != self.peer else "its own"
        if self.against_key:
            other += f" with {case_text(self.against_key)}"
        return f"{what}, against {other}"


METRICS = {
    "deliveries_per_s": "deliveries/s",
    "cpu_us": "CPU per delivery",
    "latency_p99_us": "p99",
    "rss_per_stream_bytes": "memory per stream, bytes",
    "opened_per_s": "opened/s",
    "not_opened": "streams not opened",
    "requests_per_s": "requests/s",
}


def delivered(outstanding: int, streams: int = DETAIL_STREAMS) -> Key:
    return "deliver", streams, SMALL_BYTES, outstanding


def case_text(key: Key) -> str:
    case, streams, payload_bytes, outstanding = key
    if case == "post":
        return f"POST /publish on {streams} connections"
    if case != "deliver":
        return f"{streams:,} streams"
    order = "one at a time" if outstanding == 1 else f"{outstanding} outstanding"
    return f"{streams:,} streams, {order}, {payload_bytes} B"


ONE, TEN, OPEN, POST = delivered(1), delivered(10), ("open", 5000, 0, 0), ("post", 16, 0, 0)
BARS = (
    Bar("ssepush-shared", "cpu_us", "<=", 0.8, ONE, "nchan"),
    Bar("ssepush-shared", "deliveries_per_s", ">=", 1.3, ONE, "nchan"),
    Bar("ssepush-shared", "latency_p99_us", "<=", 1.0, ONE, "nchan"),
    Bar("ssepush-shared", "deliveries_per_s", ">=", 3, TEN, "nchan"),
    Bar("ssepush-shared", "cpu_us", "<=", 1.6, ONE, "floor"),
    Bar("ssepush", "deliveries_per_s", ">=", 1.4, ONE, "webdis"),
    Bar("ssepush", "cpu_us", "<=", 0.7, ONE, "webdis"),
    Bar("ssepush", "deliveries_per_s", ">=", 3, TEN, "webdis"),
    Bar("ssepush", "deliveries_per_s", ">=", 1.5, TEN, "nchan"),
    Bar("ssepush-unix", "cpu_us", "<=", 1.6, ONE, "nchan"),
    Bar("ssepush", "deliveries_per_s", ">=", 12, ONE, "flask-sse-gthread"),
    Bar("ssepush", "deliveries_per_s", ">=", 4, ONE, "sse-starlette"),
    Bar("ssepush-shared", "rss_per_stream_bytes", "<=", 2048, OPEN),
    Bar("ssepush", "rss_per_stream_bytes", "<=", 8192, OPEN),
    Bar("ssepush-shared", "cpu_us", "<=", 1.5, delivered(1, 9000), "ssepush-shared", ONE),
    Bar("ssepush", "cpu_us", "<=", 1.5, delivered(1, 9000), "ssepush", ONE),
    Bar("ssepush", "opened_per_s", ">=", 2, OPEN, "sse-starlette"),
    Bar("ssepush-shared", "opened_per_s", ">=", 2, OPEN, "sse-starlette"),
    Bar("ssepush", "not_opened", "<=", 0, OPEN),
    Bar("ssepush-shared", "not_opened", "<=", 0, OPEN),
    Bar("ssepush", "requests_per_s", ">=", 2, POST, "flask-sse-gthread"),
)


def bar_rows(results: Results) -> list[list[str]]:
    rows = []
    for bar in BARS:
        measured = bar.measured(results)
        if measured:
            value = statistics.median(measured)
            spread = f"{measured[0]:.2f} to {measured[-1]:.2f}" if len(measured) > 1 else ""
            unit = "x" if bar.against else ""
            verdict = "met" if bar.is_met(value) else "NOT MET"
            bound = f"{bar.sign} {bar.bound:g}{unit}"
            rows.append([str(bar), bound, f"{value:.2f}{unit}", spread, verdict])
    return rows


# ---- The table --------------------------------------------------------------------------------


def text(results: Results) -> str:
    machine = results.machine
    parts = [
        f"\n{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}\n"
        f"{machine['redis']}\n"
        f"load average at the start {machine['load_average']}; medians of {results.rounds} round(s)"
    ]
    for key in results.keys("deliver"):
        parts.append(f"{case_text(key)}\n" + table(DELIVER_HEAD, deliver_rows(results, key)))
    for key in results.keys("open"):
        parts.append(f"opening {case_text(key)}\n" + table(OPEN_HEAD, open_rows(results, key)))
    for key in results.keys("idle"):
        parts.append(f"idle, {case_text(key)}\n" + table(IDLE_HEAD, idle_rows(results, key)))
    for key in results.keys("post"):
        parts.append(f"{case_text(key)}\n" + table(POST_HEAD, post_rows(results, key)))
    if rows := bar_rows(results):
        parts.append("bars\n" + table(["", "bar", "measured", "of rounds", ""], rows))
    parts += [f"{LABELS[peer]}: not installed ({why})" for peer, why in results.missing.items()]
    for peer in PEERS:
        capped = max((key[1] for key in results.keys("deliver")), default=0) > peer.max_streams
        if capped and any(sample.peer == peer.name for sample in results.samples):
            parts.append(f"{peer.label}: not run with more than {peer.max_streams:,} streams")
    parts += [f"FAILED: {sample.note}" for sample in results.samples if sample.case == "failed"]
    return "\n\n".join(parts)


def table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


DELIVER_HEAD = [
    "",
    "deliveries/s",
    "p50 ms",
    "p99 ms",
    "CPU µs",
    "server",
    "Redis",
    "load busy",
    "",
]


def deliver_rows(results: Results, key: Key) -> list[list[str]]:
    """The fastest first. CPU is per delivery; the load generator's share is of one core."""
    rows = []
    for peer in results.peers(key):
        get = {m: results.median(peer, key, m) or 0.0 for m in METRIC_NAMES}
        lost = sum(results.by_round(peer, key, "missing").values())
        lost += sum(results.by_round(peer, key, "publish_errors").values())
        notes = [f"{lost:,.0f} lost"] if lost else []
        notes += ["load-bound?"] if get["load_busy"] > BUSY else []
        measured = len(results.by_round(peer, key, "cpu_us"))
        notes += [f"{measured} round(s)"] if measured < results.rounds else []
        row = [LABELS[peer], f"{get['deliveries_per_s']:,.0f}"]
        row += [f"{get[m] / 1000:,.2f}" for m in ("latency_p50_us", "latency_p99_us")]
        row += [f"{get[m]:.2f}" for m in ("cpu_us", "server_cpu_us", "redis_cpu_us")]
        rows.append((get["deliveries_per_s"], [*row, f"{get['load_busy']:.0%}", ", ".join(notes)]))
    return [row for _, row in sorted(rows, reverse=True)]


METRIC_NAMES = (
    "deliveries_per_s",
    "latency_p50_us",
    "latency_p99_us",
    "cpu_us",
    "server_cpu_us",
    "redis_cpu_us",
    "load_busy",
)
OPEN_HEAD = ["", "opened/s", "not opened", "CPU µs each", "KB per stream", "Redis's KB"]


def open_rows(results: Results, key: Key) -> list[list[str]]:
    rows = []
    for peer in results.peers(key):
        names = ("opened_per_s", "not_opened", "open_cpu_us")
        row = [f"{results.median(peer, key, name) or 0:,.0f}" for name in names]
        for name in ("rss_per_stream_bytes", "redis_rss_per_stream_bytes"):
            row.append(f"{(results.median(peer, key, name) or 0) / 1024:,.1f}")
        rows.append([LABELS[peer], *row])
    return rows


IDLE_HEAD = ["", "seconds", "server's CPU s", "Redis's CPU s", "closed"]


def idle_rows(results: Results, key: Key) -> list[list[str]]:
    names = ("idle_s", "server_cpu_s", "redis_cpu_s", "closed")
    digits = (0, 2, 2, 0)
    return [
        [LABELS[peer]] + [f"{results.median(peer, key, n) or 0:.{d}f}" for n, d in zip(names, digits, strict=True)]
        for peer in results.peers(key)
    ]


POST_HEAD = ["", "requests/s", "p50 ms", "p99 ms", "CPU µs", "failed"]


def post_rows(results: Results, key: Key) -> list[list[str]]:
    rows = []
    for peer in results.peers(key):
        row = [LABELS[peer], f"{results.median(peer, key, 'requests_per_s') or 0:,.0f}"]
        for name in ("latency_p50_us", "latency_p99_us"):
            row.append(f"{(results.median(peer, key, name) or 0) / 1000:.2f}")
        row += [f"{results.median(peer, key, name) or 0:,.0f}" for name in ("cpu_us", "failed")]
        rows.append(row)
    return rows


# ---- JSON -------------------------------------------------------------------------------------


def as_json(results: Results) -> str:
    bars = [
        dict(zip(("what", "bar", "measured", "of_rounds", "verdict"), row, strict=True)) for row in bar_rows(results)
    ]
    return json.dumps({**asdict(results), "bars": bars}, indent=1) + "\n"


def from_json(source: str) -> Results:
    stored = json.loads(source)
    samples = [Sample(**sample) for sample in stored["samples"]]
    return Results(stored["machine"], stored["settings"], stored["missing"], samples)


# ---- The chart --------------------------------------------------------------------------------

STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; }
  .small { font-size: 12px; fill: #59636e; }
  .bar { fill: #8c959f; }
  .own { fill: #0969da; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .small { fill: #9198a1; }
    .bar { fill: #656c76; }
    .own { fill: #4493f8; }
  }
"""
ROW_HEIGHT, LABEL_WIDTH, PANEL_WIDTH, VALUE_WIDTH, TOP = 26, 250, 226, 74, 66


def chart(results: Results) -> str:
    """Three panels of horizontal bars, a row per server, as one SVG for light and dark pages."""
    counts = {key[1] for key in results.keys("deliver")}
    streams = DETAIL_STREAMS if DETAIL_STREAMS in counts else max(counts, default=0)
    one, ten = delivered(1, streams), delivered(10, streams)
    panels = (
        ("deliveries/s, one at a time", one, "deliveries_per_s", "{:,.0f}"),
        ("deliveries/s, 10 outstanding", ten, "deliveries_per_s", "{:,.0f}"),
        ("CPU µs per delivery (less is better)", one, "cpu_us", "{:.1f}"),
    )
    peers = [peer for peer in results.peers(one) if not peer.endswith("-2")]
    peers.sort(key=lambda peer: -(results.median(peer, one, "deliveries_per_s") or 0))
    width = LABEL_WIDTH + 3 * PANEL_WIDTH + 10
    height = TOP + ROW_HEIGHT * len(peers) + 12
    title = f"{streams} open streams, {SMALL_BYTES}-byte messages"
    machine = f"{results.machine['cpu']}, {results.machine['cores']} cores; medians"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title">',
        f'<title id="title">ssepush and its peers: {title}</title>',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="8" y="22">{title}</text>',
        f'<text class="small" x="{width - 8}" y="22" text-anchor="end">{escape(machine)}</text>',
    ]
    for row, peer in enumerate(peers):
        y = TOP + row * ROW_HEIGHT + 16
        label = escape(LABELS[peer])
        lines.append(f'<text x="{LABEL_WIDTH - 10}" y="{y}" text-anchor="end">{label}</text>')
    for column, (heading, key, metric, form) in enumerate(panels):
        x = LABEL_WIDTH + column * PANEL_WIDTH
        lines.append(f'<text class="small" x="{x}" y="{TOP - 8}">{heading}</text>')
        medians = [results.median(peer, key, metric) or 0.0 for peer in peers]
        scale = (PANEL_WIDTH - VALUE_WIDTH - 8) / max([*medians, 1e-9])
        for row, (peer, value) in enumerate(zip(peers, medians, strict=True)):
            y, length = TOP + row * ROW_HEIGHT, max(1.0, value * scale)
            kind = "bar own" if peer.startswith("ssepush") else "bar"
            lines.append(f'<rect class="{kind}" x="{x}" y="{y + 3}" width="{length:.1f}" height="18" rx="2"/>')
            lines.append(f'<text x="{x + length + 5:.1f}" y="{y + 16}">{form.format(value)}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    stored_path = Path(sys.argv[1])
    stored_results = from_json(stored_path.read_text())
    print(text(stored_results))
    stored_path.with_suffix(".svg").write_text(chart(stored_results))
