"""The verbs that write text: `gptjax generate | predict`."""

import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from gptjax.cli.evaluating import predict_file, read_task
from gptjax.cli.runs import load_model, token_text, unwritten
from gptjax.config import (
    ConfigError,
    Count,
    Finite,
    NotNegative,
    Positive,
    Probability,
    TaskConfig,
    Whole,
    refuse,
)

if TYPE_CHECKING:
    from gptjax.decoding import Completion
    from gptjax.sampling import Sampling
    from gptjax.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generate:
    """Continue a prompt with the model of the run directory RUN, and print the text as it comes."""

    prompt: str = ""  # empty: the model begins a document
    # a file whose lines are the prompts, or - for standard input; each text comes when it is whole
    prompt_file: str | None = None
    batch_size: Count = 8  # texts of a prompt file that are continued together
    max_tokens: Whole | None = None  # of each sample; None: as max_length says, or 200
    max_length: Whole | None = None  # tokens of prompt and sample together; max_tokens goes before
    min_tokens: Whole = 0  # of each sample, before which none ends by itself
    min_length: Whole = 0  # tokens of prompt and sample together, before which none ends by itself
    # 0: always the likeliest token; None: 0.8, with beams 0
    temperature: NotNegative | None = None
    top_k: Count | None = None  # choose among the k likeliest
    top_p: Probability | None = None  # among the likeliest that have this probability together
    min_p: Probability | None = None  # among those at least this share as likely as the likeliest
    # logits of tokens that were there are divided by it, negative ones multiplied; 1: not at all
    repetition_penalty: Positive = 1.0
    presence_penalty: Finite = 0.0  # taken from the logits of tokens that the sample has
    frequency_penalty: Finite = 0.0  # and this for each time that it has them
    no_repeat_ngram: Count | None = None  # no sequence of this many tokens comes twice
    stop: tuple[str, ...] = ()  # strings that end a sample, which is cut before them
    stop_ids: tuple[Whole, ...] = ()  # ids that end a sample, besides the tokenizer's end of text
    beams: Count = 1  # above 1: beam search for the likeliest text
    length_penalty: Finite = 1.0  # of beams: a text's score is divided by its length to this power
    # of beams, when a search ends: true, with as many texts as beams; false, when none of the
    # length it has would be better; never, of any length
    early_stopping: Literal["true", "false", "never"] = "false"
    # print the log-probability of each token, and so many of the likeliest in its place
    logprobs: Whole | None = None
    # tokens that are given up when a text has filled the context; None: half of it
    stride: Count | None = None
    seed: Whole = 0  # of the draws
    num_samples: Count = 1  # of each prompt; with beams, the best ones
    step: Whole | None = None  # of the checkpoint; None: the best of a task, or the newest
    debug: bool = False  # show the traceback of an error


@dataclass(frozen=True)
class Predict:
    """Print the likeliest tokens after a text, by the model of the run directory RUN; or with --out
    write what a run on a task says of each example of a file.
    """

    text: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TEXT")] = ""
    top: Count = 10  # tokens that are printed
    # TEXT is a file of the kind that the run learnt from, labels or not; here come its predictions,
    # a line of JSON for each example. The same command goes on with a file that is not whole
    out: str | None = None
    batch_size: Count = 16  # with --out: rows, or texts, at a time
    # with --out: of a text that is written; None: 256, or half of the context if that is less
    max_tokens: Count | None = None
    beams: Count = 1  # with --out, above 1: the likeliest text that is found is written
    temperature: NotNegative = 0.0  # with --out: of such a text; 0: always the likeliest token
    seed: Whole = 0  # with --out: of the draws of a temperature
    step: Whole | None = None  # of the checkpoint; None: the best of a task, or the newest
    task: TaskConfig = field(default_factory=TaskConfig)  # with --out: how the file is read
    debug: bool = False  # show the traceback of an error


def generate(run_dir: str, given: Generate) -> None:
    """Print samples: of one prompt token after token, of several a batch at a time."""
    from gptjax.prefill import prepare
    from gptjax.rundir import read_run
    from gptjax.sampling import violations

    sampling, model = _sampling(given), read_run(Path(run_dir))[0].model
    problems = list(violations(sampling, model.vocab_size, model.context_size))
    if given.prompt and given.prompt_file:
        problems.append("--prompt and --prompt-file: give one of them")
    problems += unwritten("--prompt", given.prompt)
    refuse(problems)
    prompts = [given.prompt] if given.prompt_file is None else list(_lines(given.prompt_file))
    params, model, tokenizer = load_model(run_dir, given.step)
    of_model = (prepare(params, model), model, tokenizer)
    del params  # a second copy
    try:
        if len(prompts) > 1 or sampling.beams > 1 or sampling.logprobs is not None:
            _in_batches(prompts, given, sampling, *of_model)
        elif prompts:
            _as_it_comes(prompts[0], given, sampling, *of_model)
    except KeyboardInterrupt:
        print(flush=True)  # what was printed stays, on a line that is whole
        raise


def _sampling(given: Generate) -> "Sampling":
    from gptjax.sampling import Sampling

    temperature = given.temperature
    if temperature is None:
        temperature = 0.8 if given.beams == 1 else 0.0
    names = {field.name for field in dataclasses.fields(Sampling)}
    same = {name: value for name, value in vars(given).items() if name in names}
    early = {"true": True, "false": False, "never": "never"}[given.early_stopping]
    return Sampling(**same | {"temperature": temperature, "early_stopping": early})


def _lines(path: str) -> Iterator[str]:
    """The lines of a file, or of standard input; empty ones are none."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
        found = [line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")]
        text.encode()
    except UnicodeError as error:
        raise ConfigError(f"--prompt-file {path}: not UTF-8, {error}; give text") from error
    if not any(found):
        raise ConfigError(f"--prompt-file {path}: holds no prompt; give one in each line")
    return filter(None, found)


def _as_it_comes(prompt: str, given: Generate, sampling: "Sampling", params, model, tokenizer):
    """Print the samples of a prompt one after the other, token after token."""
    import jax

    from gptjax.decoding import stream_text

    ids, one = _ids(prompt, tokenizer), dataclasses.replace(sampling, num_samples=1)
    key, end = jax.random.key(given.seed), tokenizer.end
    for sample in range(given.num_samples):
        if given.num_samples > 1:
            print(f"--- sample {sample + 1} of {given.num_samples} ---")
        print(prompt, end="", flush=True)
        for text in stream_text(
            params, ids, model, one, key, end=end, tokenizer=tokenizer, sample=sample
        ):
            print(text, end="", flush=True)
        print()


def _in_batches(
    prompts: list[str], given: Generate, sampling: "Sampling", params, model, tokenizer
):
    """Print the samples of all prompts, those of a batch when the batch is done."""
    import jax

    from gptjax.decoding import complete

    for start in range(0, len(prompts), given.batch_size):
        batch = prompts[start : start + given.batch_size]
        completions = complete(
            params,
            [_ids(prompt, tokenizer) for prompt in batch],
            model,
            sampling,
            jax.random.key(given.seed),
            end=tokenizer.end,
            tokenizer=tokenizer,
            numbers=range(start, start + len(batch)),
        )
        for i, completion in enumerate(completions):
            place = start + completion.prompt
            names = [
                (place, len(prompts), "prompt"),
                (i % given.num_samples, given.num_samples, "sample"),
            ]
            title = ", ".join(f"{name} {i + 1} of {n}" for i, n, name in names if n > 1)
            if title:
                print(f"--- {title} ---")
            print(prompts[place] + completion.text)
            _print_logprobs(completion, tokenizer)
        sys.stdout.flush()


def _print_logprobs(completion: "Completion", tokenizer: "Tokenizer") -> None:
    """A line for each token: its log-probability, and the likeliest tokens in its place."""
    if completion.score is not None:
        print(f"score {completion.score:.4f}")
    if completion.logprobs is None:
        return
    tops = completion.top or [[]] * len(completion.tokens)
    for token, logprob, top in zip(completion.tokens, completion.logprobs, tops, strict=True):
        others = "  ".join(f"{token_text(tokenizer, other)} {value:.4f}" for other, value in top)
        print(f"{logprob:9.4f}  {token_text(tokenizer, token):16}  {others}".rstrip())


def _ids(prompt: str, tokenizer: "Tokenizer") -> list[int]:
    """The ids of a document that begins with a prompt."""
    return [tokenizer.begin, *tokenizer.encode(prompt).tolist()]


def predict(run_dir: str, given: Predict) -> None:
    """Print the likeliest next tokens, with their probabilities as bars; or see `predict_file`."""
    if given.out is not None:
        predict_file(
            run_dir,
            given.text,
            given.out,
            given.task,
            step=given.step,
            batch_size=given.batch_size,
            max_tokens=given.max_tokens,
            beams=given.beams,
            temperature=given.temperature,
            seed=given.seed,
        )
        return
    refuse([*unwritten("TEXT", given.text)])
    if given.task != read_task(run_dir):
        raise ConfigError("--task.*: it says how a file is read: give --out FILE for what is said")
    import numpy as np

    from gptjax.decoding import next_token_logits

    params, model, tokenizer = load_model(run_dir, given.step)
    logits = next_token_logits(params, _ids(given.text, tokenizer), model).astype(np.float64)
    probabilities = np.exp(logits - logits.max())
    probabilities /= probabilities.sum()
    likeliest = np.argsort(-probabilities)[: given.top]
    for token in likeliest:
        share = probabilities[token]
        bar = "█" * round(40 * share / probabilities[likeliest[0]])
        print(f"{share:8.4f}  {bar:40}  {token_text(tokenizer, int(token))}")
    print(f"{1 - probabilities[likeliest].sum():8.4f}  for all other tokens")
