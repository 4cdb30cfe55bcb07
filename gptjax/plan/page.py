"""A plan as a page, in one file that needs nothing else."""

import html
import math
import time
from collections.abc import Sequence
from pathlib import Path

from gptjax.config import to_json
from gptjax.page import STYLE
from gptjax.plan import Plan
from gptjax.plan.explain import explain
from gptjax.plan.memory import KINDS
from gptjax.plan.report import bounds, exchange_rows, head, memory_rows, time_rows, verdict
from gptjax.plan.roofline import ASSUMPTIONS

COLOURS = ("--one", "--two", "--line", "--soft", "--three", "--four", "--soft", "--two", "--mark")


def write_page(found: Plan, path: Path) -> None:
    """Write the plan as HTML: no script, and nothing is loaded from anywhere."""
    title, *about = head(found)
    body = [
        f"<h1>{_text(title)}</h1><p class=sub>{'<br>'.join(map(_text, about))}"
        f"<br>as of {time.strftime('%Y-%m-%d %H:%M:%S')}</p>",
        _tiles(found),
        f"<h2>Memory of a device, {_text(found.memory.moment)}</h2>",
        f"<div class=card>{_bar(found)}{_table(memory_rows(found), 2)}</div>",
        f"<h2>Time of a step</h2><div class=card>{_table(time_rows(found), 1)}</div>",
        f"<h2>Bounds</h2><div class=card>{_table(bounds(found), 2)}</div>",
    ]
    if rows := exchange_rows(found):
        body.append(f"<h2>Collectives of a step</h2><div class=card>{_table(rows, 0)}</div>")
    assumed = "".join(f"<li>{_text(one)}" for one in ASSUMPTIONS)
    body += [
        f"<h2>Where every tensor lies</h2><div class=card>{_table([*explain(found)], 0)}</div>",
        f"<h2>Assumed</h2><ul>{assumed}</ul>",
        "<h2>Config</h2><details class=card><summary>config.json</summary>"
        f"<pre>{_text(to_json(found.config))}</pre></details>",
    ]
    path.write_text(
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n",
        encoding="utf-8",
    )


def _text(value: object) -> str:
    return html.escape(str(value))


def _tiles(found: Plan) -> str:
    least, most = found.time.least, found.time.most
    tiles = [
        (verdict(found), "memory of a device"),
        (f"{found.mfu(most):.0%} to {found.mfu(least):.0%}", "MFU at most, all keys counted"),
        (f"{least:,.3g} to {most:,.3g} s", "a step at least"),
        (f"{found.days(least):,.3g} to {found.days(most):,.3g}", "days at least"),
    ]
    if found.price:
        low, high = found.money(least), found.money(most)
        tiles.append((f"{low:,.0f} to {high:,.0f}", "money at least"))
    each = "".join(
        f"<div class='card tile'><b>{_text(value)}</b><span>{_text(what)}</span></div>"
        for value, what in tiles
    )
    return f"<div class=tiles>{each}</div>"


def _bar(found: Plan) -> str:
    """The kinds of memory beside each other, and what is left of the device's."""
    kinds = found.memory.kinds()
    colours = dict(zip(KINDS, COLOURS, strict=True))
    limit = found.topology.chip.memory
    parts = [(kind, num_bytes, f"var({colours[kind]})") for kind, num_bytes in kinds.items()]
    if not math.isinf(limit) and limit > found.memory.total:
        parts.append(("free", limit - found.memory.total, "transparent"))
    return (
        "<div class=bar>"
        + "".join(
            f"<div style='flex:{num_bytes:.0f} 0 0;background:{colour}' "
            f"title='{kind}: {num_bytes / 2**30:,.2f} GiB'></div>"
            for kind, num_bytes, colour in parts
        )
        + "</div>"
    )


def _table(rows: Sequence[tuple[str, ...]], numbers: int) -> str:
    """Cells, of which so many at the right are of numbers; the first row is the header."""
    lines = []
    for place, row in enumerate(rows):
        tag, words = "td" if place else "th", len(row) - numbers
        lines.append(
            "<tr>"
            + "".join(
                f"<{tag}{' class=n' if at >= words else ''}>{_text(cell)}</{tag}>"
                for at, cell in enumerate(row)
            )
        )
    return f"<div class=wide><table>{''.join(lines)}</table></div>"
