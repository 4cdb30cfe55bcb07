"""What is wrong with labelled records: counted, named by file and line, refused or left out."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from gptjax.sources import DataError

SHOWN = 3  # of the records with one kind of problem, how many a message names

Action = Literal["left out", "repaired", "kept", "cut"]


# Options that say where the parts of a record are, by the kind of task.
COLUMNS = {
    "classify": ("text-column", "second-column", "label-column", "label-columns"),
    "entities": ("text-column", "label-column"),
    "pairs": ("source-column", "target-column"),
    "dialogue": ("messages-column", "role-key", "content-key"),
    "choices": ("text-column", "choice-columns", "label-column"),
}


@dataclass
class Problems:
    """The problems of one split, as they are found.

        problems = Problems("error", "task.valid")
        examples = list(task.read(config.valid, problems))
        problems.refuse()

    Under the policy "error" every `bad` record is left out too, so that all of them are known when
    `refuse` raises.
    """

    policy: Literal["error", "skip", "repair"]
    split: str  # what a message calls it, such as task.valid
    kind: str | None = None  # of the task
    read: int = 0  # records that were read, good or bad
    counts: Counter = field(default_factory=Counter)  # by kind and action
    named: dict = field(default_factory=dict)  # the same keys: the first records, as "where: why"
    refused: int = 0  # records that the policy "error" does not take

    @property
    def repairs(self) -> bool:
        """Whether what can be repaired is."""
        return self.policy == "repair"

    def bad(self, kind: str, where: str, why: str) -> None:
        """A record that cannot be used."""
        self.refused += self.policy == "error"
        self.note(kind, where, why, "left out")

    def note(self, kind: str, where: str, why: str, action: Action) -> None:
        """A record whose problem needs no decision of the policy, and what becomes of it."""
        self.counts[kind, action] += 1
        named = self.named.setdefault((kind, action), [])
        if len(named) < SHOWN:
            named.append(f"{where}: {why}")

    def refuse(self) -> None:
        """Under the policy "error", refuse a split in which a record was bad.

        Raises:
          DataError: with the count of each kind, and the first records of it.
        """
        if self.refused:
            options = " ".join(f"--task.{one}" for one in COLUMNS.get(self.kind, ()))
            columns = f"name the columns, by {options}, or give their numbers if no line names them"
            columns = f"{columns}; " if options else ""
            raise DataError(
                f"{self.split}: {self.refused:,} of {self.read:,} records cannot be used\n"
                + "\n".join(self.lines())
                + "\n"
                + columns * (("no such column", "left out") in self.counts)
                + "mend them, or leave them out: --task.on-bad-example skip; repair mends some"
            )

    def lines(self) -> list[str]:
        """A line for each kind of problem, and one for each record that is named."""
        lines = []
        for (kind, action), count in sorted(self.counts.items()):
            named = self.named[kind, action]
            more = f"    and {count - len(named):,} more"
            lines += [f"  {kind}: {count:,} {action}", *(f"    {one}" for one in named)]
            lines += [more] if count > len(named) else []
        return lines
