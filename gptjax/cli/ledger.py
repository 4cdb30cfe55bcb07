"""The verb of what a step saw: `gptjax data`."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.cli.runs import load_model
from gptjax.config import Config, Count, Whole, refuse

if TYPE_CHECKING:
    from gptjax.data import Passage, Rows
    from gptjax.exclusions import Exclusion
    from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Data:
    """Tell which documents a step of the run directory RUN saw, blame them, leave them out."""

    step: Count | None = None  # whose batch is shown, counted from 1 as in metrics.jsonl
    rows: tuple[Whole, Whole] | None = None  # FIRST LAST of the batch, counted from 0; None: all
    blame: bool = False  # rank the documents by their mean loss under a checkpoint
    checkpoint: Whole | None = None  # step of that checkpoint; None: the newest
    top: Count | None = None  # so many of the worst documents; None: all
    skip: tuple[Count, ...] = ()  # steps whose documents the rest of the run leaves out
    verify: bool = False  # read all stores of the run, and compare them with their checksums
    debug: bool = False  # show the traceback of an error


def data(run_dir: str, given: Data) -> None:
    """Print the documents behind a step, recomputed from the config and the stores; leave them out
    of the rest of the run if that is asked for.
    """
    refuse([*_data_problems(given)])
    import jax

    if not given.blame:
        jax.config.update("jax_platforms", "cpu")
    from gptjax.checkpoint import Checkpoints
    from gptjax.data import Batch, batch_at, passages_at
    from gptjax.evaluate import document_losses
    from gptjax.exclusions import (
        exclude,
        pass_over,
        read_exclusions,
        read_rollbacks,
        write_exclusions,
    )
    from gptjax.metrics import read_metrics
    from gptjax.rows import load_rows
    from gptjax.rundir import read_run
    from gptjax.step import batch_hash

    run = Path(run_dir)
    config, tokenizer = read_run(run)
    refuse([*_outside_problems(given, config)])
    rows, held_out = load_rows(config, tokenizer)
    rows = pass_over(rows, read_rollbacks(run))
    if given.verify:
        for member in [*rows.members, *(split.members[0] for split in held_out.values())]:
            member.store.verify()
            print(f"verified {member.store.folder}: {member.store.num_tokens:,} tokens as built")
    if given.blame:
        params, model, _ = load_model(run_dir, given.checkpoint)
    logged = {line["step"]: line.get("data/batch_hash") for line in read_metrics(run)}
    recorded = read_exclusions(run)
    # What the run has not taken up yet changed no step that it has done.
    newest = Checkpoints(run).latest() or 0
    done = max([newest, *logged])
    rows = exclude(
        rows,
        [one if one.taken_up else dataclasses.replace(one, from_step=done) for one in recorded],
    )
    which = slice(given.rows[0], given.rows[1] + 1) if given.rows else slice(0, rows.batch_size)
    passages, losses = [], []
    for step in given.skip or filter(None, [given.step]):
        batch = batch_at(step - 1, rows, which=slice(0, rows.batch_size))
        _compare_hash(step, int(batch_hash(batch)), logged.get(step))
        seen = passages_at(step - 1, rows, which=which)
        passages += seen
        if given.blame:
            part = Batch(*(x[which] for x in batch))
            losses += document_losses(params, part, seen, model)
    if given.step and not given.blame:
        print(_passage_table(passages, tokenizer))
    elif passages:
        documents = _by_document(passages, losses)[: given.top]
        print(_document_table(documents, tokenizer))
        if given.skip:
            new = _exclusions(documents, newest, recorded, tokenizer)
            exclude(rows, [*recorded, *new])  # refuses what would leave nothing
            write_exclusions(run, [*recorded, *new])
            print(_left_out(new, rows, run, newest))


def _data_problems(given: Data) -> Iterator[str]:
    """The violations of the rules between the options of `data`."""
    if given.step is None and not given.skip and not given.verify:
        yield "nothing is asked for: give --step STEP, --skip STEP ... or --verify"
    if given.step is not None and given.skip:
        yield "--step shows a step and --skip leaves out steps: give one of them"
    if given.step is None and not given.skip and (given.rows or given.blame):
        yield "--rows and --blame are of a step: give --step STEP or --skip STEP ..."
    if not given.blame and (given.checkpoint is not None or given.top is not None):
        yield "--checkpoint and --top say how to blame: give --blame with them"
    if given.rows and given.rows[0] > given.rows[1]:
        first, last = given.rows
        yield f"rows = {first} {last}: the first comes after the last: give {last} {first}"


def _outside_problems(given: Data, config: Config) -> Iterator[str]:
    """Steps and rows that the run does not have."""
    for step in given.skip or filter(None, [given.step]):
        if step > config.steps:
            yield f"step {step:,}: the run has {config.steps:,} steps: give one from 1 to that"
    if given.rows and given.rows[1] >= config.batch_size:
        yield f"rows: {given.rows[1]} is given: a batch has rows 0 to {config.batch_size - 1}"


def _compare_hash(step: int, found: int, logged: float | None) -> None:
    """Print the hash of a batch, and refuse one that is not what the run saw."""
    from gptjax.sources import DataError

    if logged is not None and found != logged:
        raise DataError(
            f"step {step:,}: its batch has the hash {found}, but metrics.jsonl says {logged}: the "
            "stores or skipped.json are not what they were; --verify reads the stores again"
        )
    said = "metrics.jsonl does not list this step" if logged is None else "as in metrics.jsonl"
    print(f"step {step:,}: batch hash {found} ({said})")


def _by_document(
    passages: list["Passage"], losses: list[tuple[float, int]]
) -> list[tuple["Passage", float, int]]:
    """Each document's first passage, sum of losses and number of tokens that count; with losses,
    the worst mean first.
    """
    documents = {}
    for passage, (nats, count) in zip(passages, losses or [(0.0, 0)] * len(passages), strict=True):
        if passage.excluded:
            continue
        key = (passage.member.name, passage.document.number)
        first, total, number = documents.get(key, (passage, 0.0, 0))
        documents[key] = (first, total + nats, number + count)
    found = list(documents.values())
    return sorted(found, key=lambda one: -one[1] / max(one[2], 1)) if losses else found


def _exclusions(
    documents: list[tuple["Passage", float, int]],
    newest: int,
    recorded: tuple["Exclusion", ...],
    tokenizer: "Tokenizer",
) -> list["Exclusion"]:
    """The record of documents that are to be left out, without those that are recorded already."""
    from gptjax.exclusions import Exclusion

    known = {(one.store, one.document) for one in recorded}
    return [
        Exclusion(
            from_step=newest,
            taken_up=False,
            store=passage.member.name,
            document=passage.document.number,
            start=passage.document.start,
            stop=passage.document.stop,
            source=passage.document.source,
            position=passage.document.position,
            text=_preview(passage, passage.document.start, tokenizer),
        )
        for passage, _, _ in documents
        if (passage.member.name, passage.document.number) not in known
    ]


def _left_out(new: list["Exclusion"], rows: "Rows", run: Path, newest: int) -> str:
    """How much is left out, and from when on."""
    lines = []
    for member in rows.members:
        sizes = [one.stop - one.start for one in new if one.store == member.name]
        share = sum(sizes) / member.store.num_tokens
        if sizes:
            lines.append(
                f"left out of {member.name}: {len(sizes):,} documents, {sum(sizes):,} tokens, "
                f"{share:.2%} of it"
            )
    when = f"in effect once the run is started again, which goes on after step {newest:,}"
    return "\n".join([*(lines or ["nothing new is left out"]), f"{run / 'skipped.json'}: {when}"])


def _passage_table(passages: list["Passage"], tokenizer: "Tokenizer") -> str:
    lines = [("row", "store", "document", "source", "position", "tokens", "text")]
    for one in passages:
        text = "(left out)" if one.excluded else _preview(one, one.start, tokenizer)
        tokens = f"{one.start:,} to {one.stop:,}"
        lines.append((str(one.row), *_place(one), tokens, text))
    return _aligned(lines)


def _document_table(documents: list[tuple["Passage", float, int]], tokenizer: "Tokenizer") -> str:
    lines = [("loss", "tokens", "store", "document", "source", "position", "text")]
    for one, nats, count in documents:
        loss = f"{nats / count:.4f}" if count else ""
        tokens = f"{count or one.document.stop - one.document.start:,}"
        lines.append((loss, tokens, *_place(one), _preview(one, one.start, tokenizer)))
    return _aligned(lines)


def _place(passage: "Passage") -> tuple[str, str, str, str]:
    document = passage.document
    return passage.member.name, str(document.number), document.source, f"{document.position:,}"


def _preview(passage: "Passage", start: int, tokenizer: "Tokenizer") -> str:
    """The text of a document from a token on, in one line of at most 60 characters."""
    import numpy as np

    most = 4 * 60  # no character has more tokens than it has bytes
    length = min(passage.document.stop - start, most)
    (tokens,) = passage.member.store.read(np.array([start]), length, tokenizer.pad)
    text = repr(tokenizer.decode(tokens[tokens != tokenizer.end]))[1:-1]
    return text if len(text) <= 60 else f"{text[:57]}..."


def _aligned(lines: list[tuple[str, ...]]) -> str:
    """Lines of cells under each other."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )
