"""What a run on a task came to: its figures, which labels it takes for which, and its errors."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.best import best_of
from gptjax.config import Config, TaskConfig
from gptjax.metrics import read_metrics
from gptjax.tasks.metrics import answer_scores

MOST_ERRORS = 25  # that are shown
MOST_LABELS = 30  # of a table of which is taken for which; of more, only the pairs are shown


class Outcome(NamedTuple):
    """By split, valid and test: what was said of it by the best step."""

    step: int | None  # the best
    figures: dict[str, dict[str, float]]
    said: dict[str, list[dict[str, Any]]]  # as lines of RUN/said/SPLIT.jsonl


def read_outcome(run_dir: Path, config: Config) -> Outcome | None:
    """What there is of a run; None if it is of no task, or has said nothing yet."""
    said = {
        # What else ends lines of text may be in a text.
        name: [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
        for name in ("valid", "test")
        if (path := run_dir / "said" / f"{name}.jsonl").is_file()
    }
    if config.task.kind is None or not said:
        return None
    return Outcome(*final_figures(run_dir, config), said)


def final_figures(run_dir: Path, config: Config) -> tuple[int | None, dict[str, dict[str, float]]]:
    """The best step of a run, of text the last that was evaluated; and by split its figures."""
    lines, figures = read_metrics(run_dir), {}
    evaluated = [line for line in lines if "eval/loss" in line]
    chosen = evaluated[-1] if evaluated else {}
    if config.task.kind and (best := best_of(lines, config).step) is not None:
        chosen = next(line for line in lines if line["step"] == best)
    last = lines[-1] if lines else {}
    # Texts are written once, at the end, for the best step.
    for name, prefix, line in (("valid", "eval/", last | chosen), ("test", "test/", last)):
        found = {key.removeprefix(prefix): x for key, x in line.items() if key.startswith(prefix)}
        figures |= {name: found} if found else {}
    return chosen.get("step"), figures


def over_seeds(run_dirs: Sequence[Path], config: Config) -> str:
    """The mean and the standard deviation of each figure over runs that differ in their seed."""
    each = [final_figures(run_dir, config)[1] for run_dir in run_dirs]
    lines = [f"{'figure':24} {'mean':>8} {'deviation':>9}   of {len(each)} seeds"]
    for split in each[0]:
        for name in each[0][split]:
            values = [one[split][name] for one in each if name in one.get(split, {})]
            mean = statistics.mean(values)
            deviation = statistics.stdev(values) if len(values) > 1 else 0.0
            lines.append(f"{split + ' ' + name:24} {mean:8.4f} {deviation:9.4f}")
    return "\n".join(lines)


def is_wrong(line: dict[str, Any], task: TaskConfig = TaskConfig()) -> bool:  # noqa: B008
    """Whether what was said of an example is not what is right; of a question, no exact match."""
    right, answer = line["right"], answered(line)
    if isinstance(answer, str) and "passage" not in line:
        return answer != right.strip()
    if "passage" in line:  # of several right answers one is enough, or none where there is none
        return answer_scores(right or [""], answer, task.answers)[0] < 1
    if "labels" in line:  # any number, in no order
        return {*answer} != {*right}
    return answer != right


def answered(line: dict[str, Any]) -> Any:
    """What was said of an example, in the form of its `right`."""
    if "text" in line:
        return line["text"]
    if "choice" in line:
        return line["choice"]
    if "label" in line:
        return [line["label"]]
    return line.get("labels", line.get("tags"))


def confusions(said: Sequence[dict[str, Any]]) -> Counter:
    """How often each label was called each one, where an example has one."""
    return Counter((line["right"][0], line["label"]) for line in said if "label" in line)


def tables(outcome: Outcome, task: TaskConfig) -> list[tuple[str, list[list[str]]]]:
    """Titles, and tables whose first row is their header."""
    labels = task.labels
    found = [("Figures", _figure_table(outcome))] if outcome.figures else []
    for name, said in outcome.said.items():
        counts = confusions(said)
        if counts and len(labels) <= MOST_LABELS:
            rows = [["right \\ said", *labels]]
            rows += [[one, *(f"{counts[one, other]:,}" for other in labels)] for one in labels]
            found.append((f"Which label is taken for which, task.{name}", rows))
        elif counts:
            pairs = [(pair, n) for pair, n in counts.most_common() if pair[0] != pair[1]]
            rows = [["right", "said", "times"]]
            rows += [[*pair, f"{n:,}"] for pair, n in pairs[:MOST_ERRORS]]
            found.append((f"Labels taken for others most often, task.{name}", rows))
        wrong = [line for line in said if is_wrong(line, task)]
        rows = [["where", "right", "said", "of"]]
        rows += [
            [line["where"], _short(line["right"]), _short(answered(line)), _short(line["shown"])]
            for line in wrong[:MOST_ERRORS]
        ]
        written = any("text" in line and "passage" not in line for line in wrong)
        what = "Texts that are not exactly the right ones" if written else "Errors"
        title = f"{what}, {len(wrong):,} of {len(said):,} of task.{name}, the first ones"
        found += [(title, rows)] if wrong else []
    return found


def _figure_table(outcome: Outcome) -> list[list[str]]:
    names = list(dict.fromkeys(name for one in outcome.figures.values() for name in one))
    rows = [["figure", *outcome.figures]]
    for name in names:
        values = [one.get(name) for one in outcome.figures.values()]
        rows.append([name, *("" if value is None else f"{value:.4f}" for value in values)])
    return rows


def _short(value: Any, most: int = 160) -> str:
    if isinstance(value, int):  # a choice
        value = str(value)
    text = value if isinstance(value, str) else ", ".join(map(str, value or ["none"]))
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def write_markdown(run_dir: Path, config: Config, outcome: Outcome) -> Path:
    """Write the same as `report.md`; where it is.

    Raises:
      OSError: if it cannot be written.
    """
    parts = [f"# {config.name}\n"]
    if outcome.step is not None:  # without a validation split the last step is what there is
        parts.append(f"\nThe best step is {outcome.step:,}.\n")
    for title, rows in tables(outcome, config.task):
        header, *rest = [[_cell(text) for text in row] for row in rows]
        lines = [header, ["---"] * len(header), *rest]
        parts.append(f"\n## {title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines))
    path = run_dir / "report.md"
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
