"""The verb of a run's history: `gptjax report`."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Report:
    """Print what the time of the run RUN went to, and write RUN/report.html with its curves; of a
    task also RUN/report.md with its figures and errors.
    """

    page: bool = True  # write the page
    debug: bool = False  # show the traceback of an error


def report(run_dir: str, given: Report) -> None:
    """Print the table and write the page; no device is touched."""
    from gptjax.outcome import read_outcome, write_markdown
    from gptjax.page import write_page
    from gptjax.report import read, summary

    run = read(Path(run_dir))
    print(summary(run))
    if given.page:
        print(f"\npage       {write_page(run)}")
    if given.page and (outcome := read_outcome(run.run_dir, run.config)):
        print(f"task       {write_markdown(run.run_dir, run.config, outcome)}")
