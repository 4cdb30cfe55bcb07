"""The page of a run's report: its curves and tables, in one file that needs nothing else."""

import html
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import to_json
from gptjax.outcome import read_outcome, tables
from gptjax.report import FIGURES, MOST_LISTED, PARTS, Goodput, Run, facts, shares


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
.tiles, .charts { display:grid; gap:.8rem }
.tiles { grid-template-columns:repeat(auto-fit,minmax(10rem,1fr)) }
.charts { grid-template-columns:repeat(auto-fit,minmax(min(27rem,100%),1fr)) }
.card { background:var(--card); border:1px solid var(--line); border-radius:.6rem;
  padding:.8rem 1rem }
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
    if outcome := read_outcome(run.run_dir, run.config):
        for title, rows in tables(outcome, run.config.task):
            body += [f"<h2>{_text(title)}</h2>", _table(rows)]
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


def _table(rows: list[list[str]]) -> str:
    """A table whose first row is its header."""
    header, *rest = rows
    head = "".join(f"<th>{_text(text)}" for text in header)
    body = "".join(f"<tr>{''.join(f'<td>{_text(text)}</td>' for text in row)}</tr>" for row in rest)
    return f"<div class='card wide'><table><tr>{head}</tr>{body}</table></div>"


def _attempt_table(found: Goodput) -> str:
    rows = [
        f"<tr><td class=n>{number:,}</td><td>{_when(one.began)}</td>"
        f"<td class=n>{_length(one.ended - one.began)}</td><td class=n>{one.first_step:,}</td>"
        f"<td class=n>{one.last_step:,}</td><td>{_text(one.about.get('devices', 1))} x "
        f"{_text(one.about.get('device', '?'))}</td><td>{_text(one.about.get('host', ''))}</td>"
        f"<td>{_text(one.outcome)}</td></tr>"
        for number, one in enumerate(found.attempts, 1)
    ]
    skipped = max(len(rows) - MOST_LISTED, 0)
    more = f"<p class=note>{skipped:,} earlier ones are not shown</p>" if skipped else ""
    return (
        "<div class='card wide'><table><tr><th class=n>no.<th>began<th class=n>length"
        "<th class=n>from step<th class=n>to step<th>on<th>host<th>ended</tr>"
        f"{''.join(rows[-MOST_LISTED:])}</table>{more}</div>"
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
        ("figures of the task", list(FIGURES), False),
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
    for step in sorted(set(marks))[:MOST_LISTED]:
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
    for shown in log_ticks(*y_ends) if logarithmic else ticks(*y_ends):
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


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers from 10**low to 10**high: 1, 2 and 5 of each decade, or of many only 1."""
    decades = range(math.floor(low), math.ceil(high) + 1)
    units = (1, 2, 5) if len(decades) <= 4 else (1,)
    found = [unit * 10.0**decade for decade in decades for unit in units]
    found = [value for value in found if low <= math.log10(value) <= high]
    if len(found) < 2:
        return [value for value in ticks(10**low, 10**high) if value > 0]
    return found[:: math.ceil(len(found) / 9)]


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
            f"<title>{_text(name)} {values[place]:.6g} at step {int(steps[place]):,}</title>"
            "</circle>"
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
