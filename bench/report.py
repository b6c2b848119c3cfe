"""What bench.py measured, in short: results.json, tables for the terminal and for Markdown, and an SVG chart.

    python bench/report.py                 the tables and bars that results.json holds; draws results.svg anew
    python bench/report.py --markdown      the tables of the documentation

results.json is made to be read and compared: one line per case, with a list of figures for each server, in the order
of the line's columns; and one line per bar. A figure is the median over rounds.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from servers import DETAIL_STREAMS, HERE, PEERS, POST_CONNECTIONS

RESULTS = HERE / "results.json"
CHART = HERE / "results.svg"
BUSY = 0.9  # above this share of one core, the load generator may be what limits

LABELS = {peer.name: peer.label for peer in PEERS}


@dataclass(frozen=True)
class Metric:
    heading: str
    digits: int


METRICS = {
    "deliveries_per_s": Metric("deliveries/s", 0),
    "p50_ms": Metric("p50 ms", 2),
    "p99_ms": Metric("p99 ms", 2),
    "p999_ms": Metric("p99.9 ms", 2),
    "max_ms": Metric("longest ms", 1),
    "cpu_us": Metric("CPU µs", 2),
    "server_cpu_us": Metric("server", 2),
    "redis_cpu_us": Metric("Redis", 2),
    "load_busy": Metric("load busy", 2),
    "lost": Metric("lost", 0),
    "kb_per_stream": Metric("KB per stream", 1),
    "redis_kb_per_stream": Metric("Redis's KB", 1),
    "opened_per_s": Metric("opened/s", 0),
    "not_opened": Metric("not opened", 0),
    "open_cpu_us": Metric("CPU µs each", 0),
    "idle_s": Metric("seconds", 0),
    "server_cpu_s": Metric("server's CPU s", 2),
    "redis_cpu_s": Metric("Redis's CPU s", 2),
    "closed": Metric("closed", 0),
    "back_s": Metric("all back, s", 2),
    "half_back_s": Metric("half, s", 2),
    "again": Metric("came again", 0),
    "wrong_replays": Metric("wrong replays", 0),
    "quiet_p50_ms": Metric("quiet: p50 ms", 2),
    "quiet_p99_ms": Metric("p99 ms", 2),
    "quiet_p999_ms": Metric("p99.9 ms", 2),
    "elsewhere_p50_ms": Metric("elsewhere: p50 ms", 2),
    "elsewhere_p99_ms": Metric("p99 ms", 2),
    "elsewhere_p999_ms": Metric("p99.9 ms", 2),
    "busy_p50_ms": Metric("busy: p50 ms", 2),
    "busy_p99_ms": Metric("p99 ms", 2),
    "busy_p999_ms": Metric("p99.9 ms", 2),
    "open_p99_ms": Metric("to open: p99 ms", 2),
    "posts_per_s": Metric("posts/s", 0),
    "few_cpu_us": Metric("CPU µs with 500", 2),
    "requests_per_s": Metric("requests/s", 0),
    "failed": Metric("failed", 0),
}
LATENCY = ("p50_ms", "p99_ms", "p999_ms")
COLUMNS = {
    "deliver": (
        "deliveries_per_s",
        *LATENCY,
        "cpu_us",
        "server_cpu_us",
        "redis_cpu_us",
        "kb_per_stream",
        "load_busy",
        "lost",
    ),
    "open": (
        "opened_per_s",
        "not_opened",
        "open_cpu_us",
        "kb_per_stream",
        "redis_kb_per_stream",
    ),
    "idle": ("idle_s", "server_cpu_s", "redis_cpu_s", "closed"),
    "return": (
        "back_s",
        "half_back_s",
        *LATENCY,
        "max_ms",
        "open_cpu_us",
        "again",
        "wrong_replays",
        "lost",
    ),
    "busy": (
        "quiet_p50_ms",
        "quiet_p99_ms",
        "quiet_p999_ms",
        "elsewhere_p50_ms",
        "elsewhere_p99_ms",
        "elsewhere_p999_ms",
        "busy_p50_ms",
        "busy_p99_ms",
        "busy_p999_ms",
        "open_p99_ms",
        "not_opened",
        "posts_per_s",
        "lost",
    ),
    "large": (
        "kb_per_stream",
        *LATENCY,
        "max_ms",
        "cpu_us",
        "few_cpu_us",
        "opened_per_s",
        "not_opened",
        "lost",
    ),
    "post": ("requests_per_s", *LATENCY, "cpu_us", "failed"),
}


# ---- Samples and their summary ----------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What one server did in one round of one case; `values` has units in its names."""

    round: int
    peer: str
    case: str  # "open 5000", "deliver 500 10x64" (streams, messages outstanding, their bytes)
    values: dict[str, float] = field(default_factory=dict)


Figures = dict[str, list[float | None]]


@dataclass
class CaseLine:
    """A case: the medians of each server, in the order of the columns."""

    case: str
    rounds: int
    date: str
    columns: tuple[str, ...]
    figures: Figures

    def figure(self, peer: str, metric: str) -> float | None:
        if peer not in self.figures or metric not in self.columns:
            return None
        place = self.columns.index(metric)
        return self.figures[peer][place]


@dataclass
class BarLine:
    """A bar to reach, and what was measured: the median over rounds, and the lowest and highest."""

    bar: str
    bound: str
    measured: float
    lowest: float
    highest: float
    is_met: bool


@dataclass
class Summary:
    machine: dict[str, str | int]
    cases: list[CaseLine] = field(default_factory=list)
    bars: list[BarLine] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # server: why

    def case(self, name: str) -> CaseLine | None:
        for line in self.cases:
            if line.case == name:
                return line
        return None

    def figure(self, peer: str, case: str, metric: str) -> float | None:
        line = self.case(case)
        return line.figure(peer, metric) if line else None


def kind_of(case: str) -> str:
    return case.partition(" ")[0]


def case_line(case: str, samples: Sequence[Sample], date: str) -> CaseLine:
    columns = COLUMNS[kind_of(case)]
    figures: Figures = {}
    for peer in LABELS:
        of_peer = [sample.values for sample in samples if sample.peer == peer]
        if of_peer:
            figures[peer] = [median_of(column, of_peer) for column in columns]
    rounds = max(sample.round for sample in samples)
    return CaseLine(case, rounds, date, columns, figures)


def median_of(metric: str, measured: Sequence[dict[str, float]]) -> float | None:
    """Four digits of it: more would be noise. None: this server is not measured so."""
    values = [values[metric] for values in measured if metric in values]
    if not values:
        return None
    return float(f"{statistics.median(values):.4g}")


def summary_of(samples: Sequence[Sample], machine: dict[str, str | int]) -> Summary:
    by_case: dict[str, list[Sample]] = {}
    for sample in samples:
        by_case.setdefault(sample.case, []).append(sample)
    summary = Summary(machine)
    for case, of_case in by_case.items():
        summary.cases.append(case_line(case, of_case, str(machine["date"])))
    for bar in BARS:
        line = bar.line(samples)
        if line:
            summary.bars.append(line)
    return summary


def merged(old: Summary, new: Summary) -> Summary:
    """The new lines in the place of the old ones; cases that were not measured again stay."""
    both = Summary(new.machine, not_run=new.not_run)
    cases = {line.case: line for line in (*old.cases, *new.cases)}
    for name in sorted(cases, key=order_of):
        both.cases.append(cases[name])
    bars = {line.bar: line for line in (*old.bars, *new.bars)}
    for bar in BARS:
        if bar.text in bars:
            both.bars.append(bars[bar.text])
    return both


def order_of(case: str) -> tuple[int, list[int]]:
    """Cases in the order of COLUMNS, and each kind's by its numbers."""
    kind, *words = case.replace("x", " ").split()
    numbers = [int(word) for word in words]
    return list(COLUMNS).index(kind), numbers


# ---- The bars ---------------------------------------------------------------------------------

ByRound = dict[int, float]


@dataclass(frozen=True)
class Bar:
    """A promise: the metric, as a ratio to another server's (or to another of its own), keeps to a bound."""

    peer: str
    case: str
    metric: str
    sign: str  # "<=" or ">="
    bound: float
    against: str = ""  # a peer; "": the bound is no ratio
    against_case: str = ""
    against_metric: str = ""

    @property
    def text(self) -> str:
        said = f"{LABELS[self.peer]}: {METRICS[self.metric].heading}, {self.case}"
        if not self.against:
            return said
        other = LABELS[self.against] if self.against != self.peer else "its own"
        if self.against_metric:
            other += f" {self.against_metric}"
        if self.against_case:
            other += f" of {self.against_case}"
        return f"{said}, against {other}"

    def line(self, samples: Iterable[Sample]) -> BarLine | None:
        """Ratios are taken within a round, where both were measured. None: they were not."""
        samples = list(samples)
        measured = values_by_round(samples, self.peer, self.case, self.metric)
        if self.against:
            other = values_by_round(
                samples,
                self.against,
                self.against_case or self.case,
                self.against_metric or self.metric,
            )
            measured = ratios(measured, other)
        if not measured:
            return None
        median = statistics.median(measured.values())
        is_met = median <= self.bound if self.sign == "<=" else median >= self.bound
        unit = "x" if self.against else ""
        return BarLine(
            self.text,
            f"{self.sign} {self.bound:g}{unit}",
            round(median, 3),
            round(min(measured.values()), 3),
            round(max(measured.values()), 3),
            is_met,
        )


def values_by_round(samples: Iterable[Sample], peer: str, case: str, metric: str) -> ByRound:
    found = {}
    for sample in samples:
        is_meant = sample.peer == peer and sample.case == case
        if is_meant and metric in sample.values:
            found[sample.round] = sample.values[metric]
    return found


def ratios(of: ByRound, to: ByRound) -> ByRound:
    both = [number for number in of if to.get(number)]
    return {number: of[number] / to[number] for number in both}


ONE = f"deliver {DETAIL_STREAMS} 1x64"
TEN = f"deliver {DETAIL_STREAMS} 10x64"
ONE_OF_MANY = "deliver 9000 1x64"
OPEN, RETURN, IN_USE, LARGE = "open 5000", "return 9000", "busy 1000", "large 18000"
POST = f"post {POST_CONNECTIONS}"
DELIVER_STREAMS = (100, 500, 2000, 9000)
DELIVER_CASES = [f"deliver {streams} {n}x64" for streams in DELIVER_STREAMS for n in (1, 10)]
DELIVER_CASES += [f"deliver {DETAIL_STREAMS} {n}x4096" for n in (1, 10)]
NO_WORSE = [
    Bar(peer, case, "deliveries_per_s", ">=", 0.95, release)
    for peer, release in (("ssepush", "1.1"), ("ssepush-shared", "1.1-shared"))
    for case in DELIVER_CASES
]
BARS = (
    Bar("ssepush", OPEN, "opened_per_s", ">=", 1, "1.1"),
    Bar("ssepush-shared", OPEN, "opened_per_s", ">=", 0.9, "1.1-shared"),
    Bar("ssepush-shared", OPEN, "opened_per_s", ">=", 0.55, "webdis"),
    Bar("ssepush-shared", OPEN, "opened_per_s", ">=", 8, "sse-starlette"),
    Bar("ssepush", OPEN, "not_opened", "<=", 0),
    Bar("ssepush-shared", OPEN, "not_opened", "<=", 0),
    Bar("ssepush", OPEN, "kb_per_stream", "<=", 1, "1.1"),
    Bar("ssepush-shared", OPEN, "kb_per_stream", "<=", 1, "1.1-shared"),
    Bar("ssepush", RETURN, "back_s", "<=", 1, "1.1"),
    Bar("ssepush-shared", RETURN, "back_s", "<=", 1, "1.1-shared"),
    Bar("ssepush", RETURN, "p99_ms", "<=", 1, "1.1"),
    Bar("ssepush-shared", RETURN, "p99_ms", "<=", 1, "1.1-shared"),
    Bar("ssepush", IN_USE, "busy_p99_ms", "<=", 1.5, "ssepush", against_metric="quiet_p99_ms"),
    Bar("ssepush-shared", IN_USE, "busy_p99_ms", "<=", 1.5, "ssepush-shared", against_metric="quiet_p99_ms"),
    Bar("ssepush", IN_USE, "quiet_p99_ms", "<=", 1, "nchan"),
    Bar("ssepush-shared", IN_USE, "quiet_p99_ms", "<=", 0.5, "nchan"),
    Bar("ssepush-shared", LARGE, "max_ms", "<=", 25),
    Bar("ssepush-shared", LARGE, "kb_per_stream", "<=", 2.2),
    Bar("ssepush-shared", LARGE, "cpu_us", "<=", 2, "ssepush-shared", against_metric="few_cpu_us"),
    Bar("ssepush", POST, "requests_per_s", ">=", 1, "1.1"),
    Bar("ssepush-shared", POST, "requests_per_s", ">=", 1, "1.1-shared"),
    Bar("ssepush", POST, "requests_per_s", ">=", 2, "flask-sse-gthread"),
    *NO_WORSE,
    Bar("ssepush-shared", ONE, "cpu_us", "<=", 1.25, "floor"),
    Bar("ssepush-shared", ONE, "cpu_us", "<=", 0.8, "nchan"),
    Bar("ssepush-shared", ONE, "deliveries_per_s", ">=", 1.3, "nchan"),
    Bar("ssepush-shared", ONE, "p99_ms", "<=", 1, "nchan"),
    Bar("ssepush-shared", TEN, "deliveries_per_s", ">=", 3, "nchan"),
    Bar("ssepush", ONE, "deliveries_per_s", ">=", 1.4, "webdis"),
    Bar("ssepush", ONE, "cpu_us", "<=", 0.7, "webdis"),
    Bar("ssepush", TEN, "deliveries_per_s", ">=", 3, "webdis"),
    Bar("ssepush", TEN, "deliveries_per_s", ">=", 1.5, "nchan"),
    Bar("ssepush-unix", ONE, "cpu_us", "<=", 1.6, "nchan"),
    Bar("ssepush", ONE, "deliveries_per_s", ">=", 12, "flask-sse-gthread"),
    Bar("ssepush", ONE, "deliveries_per_s", ">=", 4, "sse-starlette"),
    Bar("ssepush", ONE_OF_MANY, "cpu_us", "<=", 1.5, "ssepush", against_case=ONE),
    Bar("ssepush-shared", ONE_OF_MANY, "cpu_us", "<=", 1.5, "ssepush-shared", against_case=ONE),
)


# ---- Tables -----------------------------------------------------------------------------------

Rows = list[list[str]]


def text(summary: Summary) -> str:
    machine = summary.machine
    parts = [
        f"{machine['cpu']}, {machine['cores']} cores, Linux {machine['kernel']}, Python {machine['python']}\n"
        f"{machine['redis']}\n"
        f"load average at the start {machine['load_average']}; medians over rounds"
    ]
    for line in summary.cases:
        headings = [METRICS[column].heading for column in line.columns]
        heading = f"{case_text(line.case)} ({line.rounds} round{'s' if line.rounds > 1 else ''})"
        parts.append(f"{heading}\n{table(['', *headings, ''], case_rows(line))}")
    if summary.bars:
        headings = ["", "bar", "measured", "lowest", "highest", ""]
        parts.append(f"bars\n{table(headings, bar_rows(summary))}")
    for peer, why in summary.not_run.items():
        parts.append(f"{LABELS[peer]}: not run ({why})")
    return "\n\n".join(parts)


def case_text(case: str) -> str:
    kind, streams, *messages = case.split()
    many = f"{int(streams):,} streams"
    if kind == "deliver":
        outstanding, _, payload_bytes = messages[0].partition("x")
        order = "one at a time" if outstanding == "1" else f"{outstanding} outstanding"
        return f"{many}, {order}, {payload_bytes} B"
    texts = {
        "open": f"opening {many}",
        "idle": f"idle, {many}",
        "return": f"{many} return at once after a restart; latency of 100 others, at 50 events/s",
        "busy": f"latency of {many} at 100 events/s, quiet, and beside 100 opened/s and 500 posts/s, or elsewhere",
        "large": f"{many}: latency of 100 others while all get heartbeats, then CPU per delivery",
        "post": f"POST /publish on {streams} connections",
    }
    return texts[kind]


def shown(value: float | None, metric: str) -> str:
    return "" if value is None else f"{value:,.{METRICS[metric].digits}f}"


def case_rows(line: CaseLine) -> Rows:
    """A row per server; of deliveries, the fastest first."""
    peers = list(line.figures)
    if line.columns[0] == "deliveries_per_s":
        peers.sort(key=lambda peer: -(line.figures[peer][0] or 0))
    rows = []
    for peer in peers:
        row = [LABELS[peer]]
        for column, value in zip(line.columns, line.figures[peer], strict=True):
            row.append(shown(value, column))
        is_bound_by_load = (line.figure(peer, "load_busy") or 0) > BUSY
        row.append("load-bound?" if is_bound_by_load else "")
        rows.append(row)
    return rows


def bar_rows(summary: Summary) -> Rows:
    rows = []
    for line in summary.bars:
        measured = [line.measured, line.lowest, line.highest]
        verdict = "met" if line.is_met else "NOT MET"
        row = [line.bar, line.bound]
        row += [f"{value:.2f}" for value in measured]
        rows.append([*row, verdict])
    return rows


def table(head: list[str], rows: Rows) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        cells = [row[0].ljust(widths[0])]
        for cell, width in zip(row[1:], widths[1:], strict=True):
            cells.append(cell.rjust(width))
        line = "  ".join(cells)
        lines.append(f"  {line}".rstrip())
    return "\n".join(lines)


# ---- Markdown ---------------------------------------------------------------------------------

DELIVERY_COLUMNS = (
    ("one at a time: deliveries/s", ONE, "deliveries_per_s"),
    ("p99 ms", ONE, "p99_ms"),
    ("CPU µs", ONE, "cpu_us"),
    ("10 outstanding: deliveries/s", TEN, "deliveries_per_s"),
    ("CPU µs", TEN, "cpu_us"),
    ("KB per stream", ONE, "kb_per_stream"),
)
OTHER_ROWS = (
    ("opening 5,000 streams: opened/s", OPEN, "opened_per_s"),
    ("9,000 pages back after a restart: s", RETURN, "back_s"),
    ("others' p99 meanwhile: ms", RETURN, "p99_ms"),
    ("1,000 streams, 100 events/s: p99 ms", IN_USE, "quiet_p99_ms"),
    ("beside 100 opened/s and 500 posts/s: p99 ms", IN_USE, "busy_p99_ms"),
    ("those at another process: p99 ms", IN_USE, "elsewhere_p99_ms"),
    ("18,000 streams: KB each", LARGE, "kb_per_stream"),
    ("heartbeats to 18,000: the longest that an event waits, ms", LARGE, "max_ms"),
    ("5,000 open streams: KB each", OPEN, "kb_per_stream"),
    ("5,000 idle streams: watched for s", "idle 5000", "idle_s"),
    ("meanwhile: the server's CPU s", "idle 5000", "server_cpu_s"),
    ("9,000 streams, one at a time: deliveries/s", ONE_OF_MANY, "deliveries_per_s"),
    ("the same: CPU µs per delivery", ONE_OF_MANY, "cpu_us"),
    ("POST /publish: requests/s", POST, "requests_per_s"),
)
OTHER_PEERS = (
    "ssepush",
    "ssepush-shared",
    "1.1",
    "1.1-shared",
    "webdis",
    "nchan",
    "sse-starlette",
    "flask-sse-gthread",
)


def bold_label(peer: str) -> str:
    label = LABELS[peer]
    return f"**{label}**" if peer.startswith("ssepush") else label


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown(summary: Summary) -> str:
    """Deliveries, a row per server; and the other cases, a column per server."""
    head = ["", *(heading for heading, _, _ in DELIVERY_COLUMNS)]
    rows = []
    for peer in by_deliveries(summary):
        row = [bold_label(peer)]
        for _, case, metric in DELIVERY_COLUMNS:
            row.append(shown(summary.figure(peer, case, metric), metric))
        rows.append(row)
    deliveries = markdown_table(head, rows)
    head = ["", *map(bold_label, OTHER_PEERS)]
    rows = []
    for heading, case, metric in OTHER_ROWS:
        row = [heading]
        for peer in OTHER_PEERS:
            row.append(shown(summary.figure(peer, case, metric), metric))
        if any(row[1:]):
            rows.append(row)
    return f"{deliveries}\n{markdown_table(head, rows)}"


def by_deliveries(summary: Summary) -> list[str]:
    line = summary.case(ONE)
    if line is None:
        return []
    figures = line.figures
    return sorted(figures, key=lambda peer: -(figures[peer][0] or 0))


# ---- JSON -------------------------------------------------------------------------------------


def as_json(summary: Summary) -> str:
    """One line per case and bar, so that a diff shows what changed."""
    cases = []
    for case in summary.cases:
        head = {"case": case.case, "rounds": case.rounds, "date": case.date}
        cases.append({**head, "columns": case.columns, **case.figures})
    bars = [vars(bar) for bar in summary.bars]
    return (
        f'{{"machine": {as_line(summary.machine)},\n'
        f'"not_run": {as_line(summary.not_run)},\n'
        f'"cases": [\n{as_lines(cases)}\n],\n'
        f'"bars": [\n{as_lines(bars)}\n]}}\n'
    )


def as_line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_lines(values: Iterable[object]) -> str:
    return ",\n".join(map(as_line, values))


def from_json(source: str) -> Summary:
    stored = json.loads(source)
    summary = Summary(stored["machine"], not_run=stored["not_run"])
    for line in stored["cases"]:
        case = CaseLine(
            line["case"],
            line["rounds"],
            line["date"],
            columns=tuple(line["columns"]),
            figures={peer: line[peer] for peer in LABELS if peer in line},
        )
        summary.cases.append(case)
    for line in stored["bars"]:
        summary.bars.append(BarLine(**line))
    return summary


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
PANELS: tuple[tuple[str, str, str, Callable[[float], str]], ...] = (
    ("deliveries/s, one at a time", ONE, "deliveries_per_s", "{:,.0f}".format),
    ("deliveries/s, 10 outstanding", TEN, "deliveries_per_s", "{:,.0f}".format),
    ("CPU µs per delivery (less is better)", ONE, "cpu_us", "{:.1f}".format),
)


def chart(summary: Summary) -> str:
    """Three panels of horizontal bars, a row per server, as one SVG for light and dark pages."""
    peers = [peer for peer in by_deliveries(summary) if not peer.endswith("-2")]
    width = LABEL_WIDTH + len(PANELS) * PANEL_WIDTH + 10
    height = TOP + ROW_HEIGHT * len(peers) + 12
    title = f"{DETAIL_STREAMS} open streams, 64-byte messages"
    machine = escape(f"{summary.machine['cpu']}, {summary.machine['cores']} cores; medians")
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title">',
        f'<title id="title">ssepush and its peers: {title}</title>',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="8" y="22">{title}</text>',
        f'<text class="small" x="{width - 8}" y="22" text-anchor="end">{machine}</text>',
    ]
    for row, peer in enumerate(peers):
        y = TOP + row * ROW_HEIGHT + 16
        label = escape(LABELS[peer])
        lines.append(f'<text x="{LABEL_WIDTH - 10}" y="{y}" text-anchor="end">{label}</text>')
    for number in range(len(PANELS)):
        lines += panel(summary, number, peers)
    return "\n".join([*lines, "</svg>"]) + "\n"


def panel(summary: Summary, number: int, peers: Sequence[str]) -> list[str]:
    heading, case, metric, form = PANELS[number]
    x = LABEL_WIDTH + number * PANEL_WIDTH
    lines = [f'<text class="small" x="{x}" y="{TOP - 8}">{heading}</text>']
    values = [summary.figure(peer, case, metric) or 0.0 for peer in peers]
    scale = (PANEL_WIDTH - VALUE_WIDTH - 8) / max([*values, 1e-9])
    for row, (peer, value) in enumerate(zip(peers, values, strict=True)):
        y = TOP + row * ROW_HEIGHT
        length = max(1.0, value * scale)
        kind = "bar own" if peer.startswith("ssepush") else "bar"
        lines.append(f'<rect class="{kind}" x="{x}" y="{y + 3}" width="{length:.1f}" height="18" rx="2"/>')
        lines.append(f'<text x="{x + length + 5:.1f}" y="{y + 16}">{form(value)}</text>')
    return lines


def main(arguments: Sequence[str]) -> int:
    if arguments not in ([], ["--markdown"]):
        print("usage: report.py [--markdown]", file=sys.stderr)
        return 2
    stored = from_json(RESULTS.read_text())
    print(markdown(stored) if arguments else text(stored))
    CHART.write_text(chart(stored))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
