"""The verb of a dialogue: `gptjax chat`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptjax.cli.runs import load_model, unwritten
from gptjax.config import ConfigError, Count, NotNegative, Probability, Whole, refuse


@dataclass(frozen=True)
class Chat:
    """Talk to the run RUN, which has learnt dialogue; a line is a message, Ctrl-D ends it."""

    system: str = ""  # message that sets the scene; empty: none
    max_tokens: Count = 200  # of a reply
    temperature: NotNegative = 0.8  # 0: always the likeliest token
    top_k: Count | None = None  # choose among the k likeliest
    top_p: Probability | None = None  # among the likeliest that have this probability together
    seed: Whole = 0  # of the draws
    step: Whole | None = None  # of the checkpoint; None: the best of a task, or the newest
    debug: bool = False  # show the traceback of an error


def chat(run_dir: str, given: Chat) -> None:
    """Print a reply to each line of standard input, as it comes; on standard error, what of the
    dialogue the model does not see.
    """
    import jax

    from gptjax.decoding import stream_text
    from gptjax.prefill import prepare
    from gptjax.prompting import most_shown
    from gptjax.rundir import read_run
    from gptjax.sampling import Sampling
    from gptjax.tasks import make_task
    from gptjax.tasks.dialogue import Message

    config = read_run(Path(run_dir))[0]
    if config.task.kind != "dialogue":
        raise ConfigError(
            f"{run_dir} has not learnt dialogue, its task.kind is {config.task.kind!r}: give a run "
            "of experiments/finetune.py:chat, or use gptjax generate"
        )
    refuse([*unwritten("--system", given.system)])
    params, model, tokenizer = load_model(run_dir, given.step)
    task, params = make_task(config.task), prepare(params, model)
    sampling = Sampling(
        max_tokens=given.max_tokens,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        stop=task.stops,
    )
    messages = [Message("system", given.system)] if given.system else []
    size, before = model.context_size, 0
    for number, line in enumerate(_lines()):
        messages.append(Message("user", line))
        most = most_shown(size, given.max_tokens)
        ids, dropped = task.fitting_ids(messages, tokenizer, most)
        if dropped > before:
            _note(f"{dropped:,} messages are no longer seen: the context is {size:,} tokens")
        if len(ids) > size:
            _note(f"the beginning is not seen: {len(ids):,} tokens, but the context is {size:,}")
        before = dropped
        key, reply = jax.random.fold_in(jax.random.key(given.seed), number), ""
        for text in stream_text(
            params, ids.tolist(), model, sampling, key, end=tokenizer.end, tokenizer=tokenizer
        ):
            print(text, end="", flush=True)
            reply += text
        print(flush=True)
        messages.append(Message("assistant", task.reply(reply)))


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that say something; on a terminal after a sign that one is
    awaited.
    """
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True)
        try:
            line = sys.stdin.readline()
        except UnicodeDecodeError as error:
            raise ConfigError(f"standard input: not UTF-8, {error}; give text") from error
        if not line:
            return
        if line.strip():
            yield line.strip()
