"""What the time of a run went to, and a page of its curves."""

import html
import json
import math
import time
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import Config, to_json
from gptjax.events import AT_MOST_SECONDS, read_events
from gptjax.resume import Origin, read_fork
from gptjax.rundir import CheckpointError, read_run

# What the main thread did, as `events.jsonl` has it, and the parts of a report.
PART_OF = {
    "train": "productive",
    "data_wait": "data wait",
    "checkpoint": "checkpoint",
    "evaluation": "evaluation",
    "compile": "compile",
    "start_up": "start-up",
    "initialise": "start-up",
    "data_preparation": "data preparation",
    "restore": "restore",
    "sample": "sample",
}
# In the order of a report: what each part is, and its colour on the page.
PARTS = {
    "productive": ("steps that count", "#2e9e6b"),
    "done again": ("steps that were lost when a run ended without saving them", "#c8453d"),
    "data wait": ("the devices had nothing to do, for no batch was there", "#e0a63a"),
    "checkpoint": ("the steps stood still for a save", "#7a68d6"),
    "evaluation": ("", "#3a86d9"),
    "compile": ("that nothing else was done meanwhile", "#d96fa8"),
    "start-up": ("from the start of the process on, with its first state", "#8494a5"),
    "data preparation": ("text to token stores, and opening these", "#b08657"),
    "restore": ("of a checkpoint", "#49b3b8"),
    "sample": ("at the end", "#9aad3f"),
    "restart": ("from the last sign of an attempt to the process of the next", "#59636f"),
    "other": ("no clock says what", "#bdbdb7"),
}


class Attempt(NamedTuple):
    """One process's part of a run, or that of several that ran together."""

    began: float  # seconds since 1970
    ended: float  # its last sign
    first_step: int  # that it went on from
    last_step: int  # that it began
    outcome: str
    about: dict[str, Any]  # its `start` event


class Goodput(NamedTuple):
    """What the time of a run went to."""

    wall: float  # seconds from the first sign to the last
    parts: dict[str, float]  # seconds by the names of PARTS; they add up to `wall`
    attempts: list[Attempt]
    steps: int  # that count, of this run directory
    lost_steps: int
    counts: Counter[str]  # of events, by their names


class _Ledger:
    """Steps and the productive seconds that they took; those that a run goes back from are lost."""

    def __init__(self):
        self._stretches: list[tuple[int, int, float]] = []  # after which step, up to which
        self.lost_steps, self.lost_seconds = 0, 0.0

    def add(self, after: int, up_to: int, seconds: float) -> None:
        if up_to > after or seconds > 0:
            self._stretches.append((after, up_to, seconds))

    def go_back(self, step: int) -> None:
        """What follows a step is done again."""
        kept = []
        for after, up_to, seconds in self._stretches:
            share = 1.0 if after >= step else (up_to - step) / (up_to - after)
            if up_to <= step:
                kept.append((after, up_to, seconds))
                continue
            self.lost_steps += up_to - max(after, step)
            self.lost_seconds += seconds * share
            if after < step:
                kept.append((after, step, seconds * (1 - share)))
        self._stretches = kept


def goodput(events: Iterable[dict[str, Any]], now: float | None = None) -> Goodput | None:
    """What the time of a run went to, by its events alone; None if it tells of no attempt.

    Args:
      events: as `read_events` has them; those of process 0 count.
      now: seconds since 1970, to tell a run that goes on from one that ended without a word.
    """
    attempts: list[Attempt] = []
    spent: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    ledger, so_far, restart = _Ledger(), {}, 0.0
    for event in events:
        if event["process"] != 0:
            continue
        kind = event["event"]
        counts[kind] += 1
        if kind == "start":
            spent.update(so_far)
            if attempts:
                restart += max(event["began"] - attempts[-1].ended, 0.0)
            step = event["step"]
            ledger.go_back(step)
            attempts.append(Attempt(event["began"], event["time"], step, step, "", event))
            so_far = event["spent"]
        elif not attempts:
            continue
        elif kind in ("progress", "end"):
            last, seconds = attempts[-1], event["spent"].get("train", 0.0)
            ledger.add(last.last_step, event["step"], seconds - so_far.get("train", 0.0))
            so_far = event["spent"]
            attempts[-1] = last._replace(ended=event["time"], last_step=event["step"])
            if kind == "end":
                attempts[-1] = attempts[-1]._replace(outcome=_outcome(event))
        elif kind == "rollback":
            ledger.go_back(event["to_step"])
            attempts[-1] = attempts[-1]._replace(last_step=event["to_step"])
        elif kind in ("error", "stop"):
            attempts[-1] = attempts[-1]._replace(outcome=f"{kind}: {event.get('message', '')}")
    if not attempts:
        return None
    spent.update(so_far)
    attempts = _with_outcomes(attempts, time.time() if now is None else now)
    wall = attempts[-1].ended - attempts[0].began
    steps = attempts[-1].last_step - attempts[0].first_step
    return Goodput(
        wall, _parts(spent, ledger, restart, wall), attempts, steps, ledger.lost_steps, counts
    )


def _outcome(event: dict[str, Any]) -> str:
    if event["outcome"] == "done":
        return "done"
    stopped = event["outcome"] in ("Interrupted", "KeyboardInterrupt")
    return f"{'stop' if stopped else 'error'}: {event.get('message') or event['outcome']}"


def _with_outcomes(attempts: list[Attempt], now: float) -> list[Attempt]:
    """Those that said nothing at their end: killed, or still there."""
    silent = [one if one.outcome else one._replace(outcome="killed") for one in attempts]
    if not attempts[-1].outcome and now - attempts[-1].ended < 2 * AT_MOST_SECONDS:
        silent[-1] = silent[-1]._replace(outcome="running")
    return silent


def _parts(spent: Counter[str], ledger: _Ledger, restart: float, wall: float) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    for kind, seconds in spent.items():
        if kind in PART_OF:
            parts[PART_OF[kind]] += seconds
    parts["productive"] -= ledger.lost_seconds
    parts["done again"] = ledger.lost_seconds
    parts["restart"] = restart
    parts["other"] = wall - sum(parts.values())
    return parts


# --- a run ---------------------------------------------------------------------------------------


class Run(NamedTuple):
    """All that a report tells."""

    run_dir: Path
    config: Config
    goodput: Goodput | None
    ancestry: tuple[Origin, ...]
    notes: list[dict[str, Any]]  # events of changes, errors and the like
    curves: dict[str, tuple[array, array]]  # steps and values, by the name of the metric


NOTED = (
    "config",
    "data",
    "fork",
    "error",
    "stop",
    "rollback",
    "save_failed",
    "refused",
    "abandoned",
)
MOST_NOTES = 200
CURVES = ("train/learning_rate", "train/grad_norm", "perf/tokens_per_second", "perf/mfu")


def read(run_dir: Path) -> Run:
    """A run as it is now, also while it goes on.

    Raises:
      CheckpointError: if it is no run directory.
    """
    config, _ = read_run(run_dir)
    try:
        ancestry = read_fork(run_dir)
    except CheckpointError:  # there is more to tell
        ancestry = ()
    notes: list[dict[str, Any]] = []

    def noting() -> Iterator[dict[str, Any]]:
        for event in read_events(run_dir):
            if event["event"] in NOTED:
                notes.append(event)
            yield event

    found = goodput(noting())
    return Run(run_dir, config, found, ancestry, notes[-MOST_NOTES:], _curves(run_dir))


def _curves(run_dir: Path) -> dict[str, tuple[array, array]]:
    """The metrics that are drawn, read line by line: memory holds two numbers for each."""
    curves: dict[str, tuple[array, array]] = {}
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return curves
    with path.open("rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                step = int(line["step"])
            except (ValueError, TypeError, KeyError):  # the last one, which is being written
                continue
            for name, value in line.items():
                if name in CURVES or name.endswith("/loss"):
                    steps, values = curves.setdefault(name, (array("d"), array("d")))
                    steps.append(step)
                    values.append(math.nan if value is None else value)
    return curves


def summary(run: Run) -> str:
    """What the time went to, as text."""
    figures = "\n".join(f"{name:11}{value}" for name, value in facts(run))
    if not run.goodput:
        return figures
    rows = [
        f"{name:20}{seconds:12,.1f} s {share:8.2%}   {PARTS[name][0]}".rstrip()
        for name, seconds, share in shares(run.goodput)
    ]
    total = f"{'total':20}{run.goodput.wall:12,.1f} s {1:8.2%}"
    return "\n".join([figures, "", *rows, total])


def shares(found: Goodput) -> list[tuple[str, float, float]]:
    """Each part that took time: its name, seconds, and share of all."""
    wall = max(found.wall, 1e-9)
    return [
        (name, seconds, seconds / wall)
        for name, seconds in found.parts.items()
        if abs(seconds) >= 0.0005 or name in ("productive", "other")
    ]


def facts(run: Run) -> list[tuple[str, str]]:
    """Name and text of each figure of a run."""
    found = run.goodput
    lines = [("run", str(run.run_dir))]
    lines += [("fork of", f"{one.run} at step {one.step:,}") for one in run.ancestry]
    if not found:
        return [*lines, ("events", "none that tell of an attempt: its time is not known")]
    last, counts = found.attempts[-1], found.counts
    about = last.about
    tokens = found.steps * about.get("step_tokens", 0)
    speed = tokens / max(found.wall, 1e-9)
    skipped = counts["skipped_update"] + counts["spike"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in about.get("mesh", {}).items())
    return [
        *lines,
        ("state", f"{last.outcome}, at step {last.last_step:,} of {about.get('steps', 0):,}"),
        (
            "on",
            f"{about.get('devices', 1)} x {about.get('device', '?')}"
            + (f" ({mesh})" if mesh else "")
            + f", processes: {about.get('processes', 1)}, gptjax {about.get('gptjax', '?')}, "
            f"jax {about.get('jax', '?')}",
        ),
        ("steps", f"{found.steps:,}, {found.lost_steps:,} more were lost and done again"),
        ("tokens", f"{tokens:,}, {speed:,.0f} a second of all time"),
        ("attempts", f"{len(found.attempts):,}"),
        ("saves", f"{counts['save']:,}, {counts['save_failed']:,} failed"),
        (
            "trouble",
            f"{skipped:,} updates skipped, {counts['rollback']:,} rollbacks, "
            f"{counts['error']:,} errors",
        ),
    ]


# --- the page ------------------------------------------------------------------------------------


def write_page(run: Run) -> Path:
    """Write the report as one file that needs nothing else, `report.html`; where it is.

    Raises:
      OSError: if it cannot be written.
    """
    path = run.run_dir / "report.html"
    new = path.with_name("report.html.new")
    new.write_text(page(run), encoding="utf-8")
    new.rename(path)
    return path


STYLE = """
:root { --page:#f5f5f2; --card:#fff; --ink:#1d1d1b; --soft:#6a6a64; --line:#e3e3de;
  --one:#2a6fdb; --two:#d07a1f; --three:#2e9e6b; --four:#9a58c9; --mark:#c8453d }
@media (prefers-color-scheme: dark) { :root { --page:#151514; --card:#1f1f1d; --ink:#ecece8;
  --soft:#9d9d96; --line:#35352f; --one:#6ea3f5; --two:#eba152; --three:#5cc596; --four:#c08fe6;
  --mark:#ef7068 } }
* { box-sizing:border-box }
body { margin:0 auto; padding:2rem 1.2rem 4rem; max-width:76rem; background:var(--page);
  color:var(--ink); font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif }
h1 { font-size:1.5rem; margin:0 } h2 { font-size:1rem; margin:2rem 0 .7rem }
p.sub { color:var(--soft); margin:.2rem 0 1.4rem }
.tiles, .charts { display:grid; gap:.8rem; grid-template-columns:repeat(auto-fit,minmax(10rem,1fr)) }
.charts { grid-template-columns:repeat(auto-fit,minmax(min(27rem,100%),1fr)) }
.card { background:var(--card); border:1px solid var(--line); border-radius:.6rem; padding:.8rem 1rem }
.tile b { display:block; font-size:1.35rem; font-weight:600; font-variant-numeric:tabular-nums }
.tile span, .note, figcaption span { color:var(--soft); font-size:.85rem }
figure { margin:0 } figcaption { font-weight:600; margin-bottom:.3rem }
figcaption i { display:inline-block; width:.8em; height:.2em; margin:0 .35em .25em .8em }
svg { display:block; width:100%; height:auto; overflow:visible }
svg text { fill:var(--soft); font-size:11px; font-variant-numeric:tabular-nums }
.bar { display:flex; height:1.5rem; border-radius:.35rem; overflow:hidden; gap:2px }
table { border-collapse:collapse; width:100%; font-size:.9rem } .wide { overflow-x:auto }
th { text-align:left; font-weight:600; color:var(--soft) }
th, td { padding:.25rem .9rem .25rem 0; border-bottom:1px solid var(--line); vertical-align:top }
td.n, th.n { text-align:right; font-variant-numeric:tabular-nums; white-space:nowrap }
td i { display:inline-block; width:.75em; height:.75em; border-radius:.2em; margin-right:.5em }
pre { overflow:auto; font-size:.8rem; margin:.6rem 0 0 } summary { cursor:pointer; font-weight:600 }
"""


def page(run: Run) -> str:
    """The report as HTML: no script, and nothing is loaded from anywhere."""
    said = dict(facts(run))
    body = [
        f"<h1>{_text(run.config.name)}</h1>",
        f"<p class=sub>{_text(run.run_dir)}"
        + "".join(f"<br>fork of {_text(one.run)} at step {one.step:,}" for one in run.ancestry)
        + f"<br>{_text(said.get('on', ''))}<br>as of {_when(time.time())}</p>",
        _tiles(run, said),
    ]
    if run.goodput:
        body += ["<h2>What the time went to</h2>", _time_table(run.goodput)]
    body += ["<h2>Curves</h2>", _charts(run)]
    if run.goodput:
        body += ["<h2>Attempts</h2>", _attempt_table(run.goodput)]
    if run.notes:
        body += ["<h2>What happened</h2>", _note_table(run.notes)]
    body.append(
        f"<h2>Config</h2><details class=card><summary>config.json</summary>"
        f"<pre>{_text(to_json(run.config))}</pre></details>"
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{_text(run.config.name)}</title><style>{STYLE}</style>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _when(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _length(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    if not hours and not minutes:
        return f"{rest:.1f} s"
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min {rest:02.0f} s"


def _tiles(run: Run, said: dict[str, str]) -> str:
    tiles = []
    for name in ("train/loss", "eval/loss"):
        if name in run.curves:
            steps, values = run.curves[name]
            tiles.append((f"{values[-1]:.4f}", f"{name}, step {int(steps[-1]):,}"))
    if found := run.goodput:
        last = found.attempts[-1]
        share = found.parts["productive"] / max(found.wall, 1e-9)
        tokens, speed = said["tokens"].split(", ", 1)
        tiles += [
            (f"{last.last_step:,}", f"of {last.about.get('steps', 0):,} steps: {last.outcome}"),
            (f"{share:.1%}", f"of {_length(found.wall)} productive"),
            (tokens, f"tokens, {speed}"),
            (f"{len(found.attempts):,}", f"attempts, {found.lost_steps:,} steps done again"),
            (f"{found.counts['save']:,}", f"saves, {found.counts['save_failed']:,} failed"),
            (f"{found.counts['error']:,}", f"errors; {said['trouble'].rsplit(', ', 1)[0]}"),
        ]
    each = "".join(
        f"<div class='card tile'><b>{_text(value)}</b><span>{_text(what)}</span></div>"
        for value, what in tiles
    )
    return f"<div class=tiles>{each}</div>"


def _time_table(found: Goodput) -> str:
    rows, bar = [], []
    for name, seconds, share in shares(found):
        what, colour = PARTS[name]
        rows.append(
            f"<tr><td><i style='background:{colour}'></i>{name}</td><td class=n>{seconds:,.1f} s"
            f"</td><td class=n>{share:.2%}</td><td class=note>{_text(what)}</td></tr>"
        )
        if share > 0:
            bar.append(
                f"<div style='flex:{share:.6f} 0 0;background:{colour}' "
                f"title='{name}: {seconds:,.1f} s, {share:.1%}'></div>"
            )
    return (
        f"<div class=card><div class=bar>{''.join(bar)}</div><div class=wide><table>"
        f"{''.join(rows)}</table></div></div>"
    )


def _attempt_table(found: Goodput) -> str:
    rows = [
        f"<tr><td class=n>{number:,}</td><td>{_when(one.began)}</td>"
        f"<td class=n>{_length(one.ended - one.began)}</td><td class=n>{one.first_step:,}</td>"
        f"<td class=n>{one.last_step:,}</td><td>{_text(one.about.get('devices', 1))} x "
        f"{_text(one.about.get('device', '?'))}</td><td>{_text(one.about.get('host', ''))}</td>"
        f"<td>{_text(one.outcome)}</td></tr>"
        for number, one in enumerate(found.attempts, 1)
    ]
    skipped = max(len(rows) - MOST_NOTES, 0)
    more = f"<p class=note>{skipped:,} earlier ones are not shown</p>" if skipped else ""
    return (
        "<div class='card wide'><table><tr><th class=n>no.<th>began<th class=n>length"
        "<th class=n>from step<th class=n>to step<th>on<th>host<th>ended</tr>"
        f"{''.join(rows[-MOST_NOTES:])}</table>{more}</div>"
    )


def _note_table(notes: Sequence[dict[str, Any]]) -> str:
    rows = []
    for event in notes:
        rest = {name: value for name, value in event.items() if name not in ("time", "event")}
        if event["event"] == "config":
            words = "; ".join(
                f"{one['name']} {one['before']} -> {one['now']}" for one in event["changes"]
            )
        else:
            words = ", ".join(
                f"{name} {value}" for name, value in rest.items() if name != "process"
            )
        rows.append(
            f"<tr><td>{_when(event['time'])}</td><td>{_text(event['event'])}</td>"
            f"<td>{_text(words)}</td></tr>"
        )
    return f"<div class='card wide'><table>{''.join(rows)}</table></div>"


# --- curves --------------------------------------------------------------------------------------

WIDTH, HEIGHT = 560, 240  # of a chart, and of the space for the names of its axes
LEFT, RIGHT, TOP, BOTTOM = 56, 10, 10, 34
BUCKETS = 400  # a curve has at most four points in each
DOTS = 40  # of a curve that tell their value
COLOURS = ("--one", "--two", "--three", "--four")


def _charts(run: Run) -> str:
    losses = [name for name in run.curves if name.endswith("/loss")]
    losses.sort(key=lambda name: (name != "train/loss", name != "eval/loss", name))
    charts = [
        ("loss, nats per token", losses, False),
        ("learning rate", ["train/learning_rate"], False),
        ("norm of the gradient", ["train/grad_norm"], True),
        ("tokens per second", ["perf/tokens_per_second"], False),
        ("model FLOPs utilization", ["perf/mfu"], False),
    ]
    marks = [one.first_step for one in run.goodput.attempts[1:]] if run.goodput else []
    drawn = []
    for title, names, logarithmic in charts:
        series = [
            (name, *map(np.asarray, run.curves[name])) for name in names if name in run.curves
        ]
        series = [one for one in series if np.isfinite(one[2]).any()]
        if series:
            drawn.append(_chart(title, series[: len(COLOURS)], marks, logarithmic))
    if not drawn:
        return "<p class=note>No metrics yet.</p>"
    note = "<p class=note>Dashed lines: the run was started again.</p>" if marks else ""
    return f"<div class=charts>{''.join(drawn)}</div>{note}"


def _chart(
    title: str,
    series: Sequence[tuple[str, np.ndarray, np.ndarray]],
    marks: Sequence[int],
    logarithmic: bool,
) -> str:
    """A figure of curves over the steps.

    Args:
      series: name, steps and values of each.
      marks: steps at which the run was started again.
    """
    values = np.concatenate([one[2] for one in series])
    values = values[np.isfinite(values)]
    logarithmic = logarithmic and (values > 0).all()
    scale = np.log10 if logarithmic else np.asarray
    low, high, peak = _limits(scale(values))
    first, last = min(one[1][0] for one in series), max(one[1][-1] for one in series)
    last = last if last > first else first + 1

    def x_of(steps: Any) -> Any:
        return LEFT + (steps - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y_of(values: Any) -> Any:
        place = (high - scale(values)) / (high - low)
        return TOP + np.clip(place, -0.02, 1.02) * (HEIGHT - TOP - BOTTOM)

    parts = list(_grid(x_of, y_of, (first, last), (low, high), logarithmic))
    for step in sorted(set(marks))[:MOST_NOTES]:
        if first <= step <= last:
            parts.append(
                f"<path d='M{x_of(step):.1f} {TOP}V{HEIGHT - BOTTOM}' stroke='var(--mark)' "
                f"stroke-dasharray='3 3'><title>started again after step {step:,}</title></path>"
            )
    names = ""
    for (name, steps, curve), colour in zip(series, COLOURS, strict=False):
        parts += _line(x_of, y_of, name, *downsample(steps, curve), f"var({colour})")
        if len(series) > 1:
            names += f"<i style='background:var({colour})'></i><span>{_text(name)}</span>"
    beyond = f" <span>(peak {peak:.4g} is cut off)</span>" if peak is not None else ""
    return (
        f"<figure class=card><figcaption>{_text(title)}{names}{beyond}</figcaption>"
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{_text(title)}'>"
        f"{''.join(parts)}</svg></figure>"
    )


def _limits(values: np.ndarray) -> tuple[float, float, float | None]:
    """The lowest and highest value shown; and the highest there is, if it is far above all others
    and so is not shown.
    """
    low, high, peak = values.min(), values.max(), None
    usual = np.quantile(values, 0.99)
    if high - low > 4 * (usual - low) > 0:
        high, peak = usual + 0.3 * (usual - low), high
    if high - low < 1e-9 * max(abs(high), abs(low), 1e-300):
        low, high = low - (abs(low) * 0.1 or 1), high + (abs(high) * 0.1 or 1)
    margin = 0.04 * (high - low)
    return float(low - margin), float(high + margin), None if peak is None else float(peak)


def _grid(
    x_of: Any,
    y_of: Any,
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    logarithmic: bool,
) -> Iterator[str]:
    """Lines and numbers of both axes."""
    for value in ticks(*y_ends):
        shown = 10**value if logarithmic else value
        y = float(y_of(shown))
        yield f"<path d='M{LEFT} {y:.1f}H{WIDTH - RIGHT}' stroke='var(--line)'/>"
        yield f"<text x='{LEFT - 6}' y='{y + 4:.1f}' text-anchor='end'>{_number(shown)}</text>"
    for value in ticks(*x_ends):
        x, base = float(x_of(value)), HEIGHT - BOTTOM
        yield f"<path d='M{x:.1f} {base}v4' stroke='var(--soft)'/>"
        yield f"<text x='{x:.1f}' y='{base + 16}' text-anchor='middle'>{_number(value)}</text>"
    yield f"<path d='M{LEFT} {HEIGHT - BOTTOM}H{WIDTH - RIGHT}' stroke='var(--soft)'/>"
    yield f"<text x='{WIDTH - RIGHT}' y='{HEIGHT - 2}' text-anchor='end'>step</text>"


def _number(value: float) -> str:
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.3g}"
    return f"{value:,.4f}".rstrip("0").rstrip(".") if abs(value) < 100 else f"{value:,.0f}"


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most so many."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * unit for unit in (1, 2, 5, 10, 20) if power * unit >= rough)
    first, last = math.ceil(low / size), math.floor(high / size)
    return [number * size for number in range(first, last + 1)]


def _line(
    x_of: Any, y_of: Any, name: str, steps: np.ndarray, values: np.ndarray, colour: str
) -> Iterator[str]:
    """A curve, broken where a value is not finite, and points that tell theirs."""
    finite = np.isfinite(values)
    x, y = x_of(steps), y_of(np.where(finite, values, values[finite][0]))
    path, pen = [], "M"
    for place, there in enumerate(finite):
        if there:
            path.append(f"{pen}{x[place]:.1f} {y[place]:.1f}")
        pen = "L" if there else "M"
    yield (
        f"<path d='{''.join(path)}' fill='none' stroke='{colour}' stroke-width='1.6' "
        "stroke-linejoin='round' stroke-linecap='round'/>"
    )
    shown = np.flatnonzero(finite)
    for place in shown[np.linspace(0, len(shown) - 1, min(DOTS, len(shown))).astype(int)]:
        radius = 2.2 if len(shown) <= DOTS else 1.1
        yield (
            f"<circle cx='{x[place]:.1f}' cy='{y[place]:.1f}' r='{radius}' fill='{colour}'>"
            f"<title>{_text(name)} {values[place]:.6g} at step {int(steps[place]):,}</title></circle>"
        )


def downsample(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Few enough points to draw: of each stretch the first, the least, the greatest, the last, and
    one that is not finite, if there is one.
    """
    if len(steps) <= 4 * BUCKETS:
        return steps, values
    kept = set()
    for stretch in np.array_split(np.arange(len(steps)), BUCKETS):
        part = values[stretch]
        finite = np.isfinite(part)
        kept |= {stretch[0], stretch[-1]}
        if finite.any():
            kept |= {
                stretch[np.where(finite, part, np.inf).argmin()],
                stretch[np.where(finite, part, -np.inf).argmax()],
            }
        if not finite.all():
            kept.add(stretch[finite.argmin()])
    places = np.array(sorted(kept))
    return steps[places], values[places]
