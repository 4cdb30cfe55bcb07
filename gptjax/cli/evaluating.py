"""The verbs of labelled tasks: `gptjax evaluate`, and `gptjax predict RUN FILE --out FILE`."""

import fcntl
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gptjax.config import (
    Config,
    ConfigError,
    Count,
    MeshConfig,
    NotNegative,
    TaskConfig,
    TuneConfig,
    Whole,
    check_task,
    from_json,
    to_json,
)

if TYPE_CHECKING:
    from gptjax.prompting import Asking
    from gptjax.tasks import Prediction, Problems, Task

CHUNK = 1024  # examples that predictions are made of at a time


@dataclass(frozen=True)
class Evaluate:
    """Print how well the run RUN does a task: by its head, or asked in words if that is lm."""

    split: Literal["valid", "test", "train"] = "valid"  # whose files are read
    shots: Whole = 0  # of a task asked in words: examples of task.train that come before
    seed: Whole = 0  # of their draw, and of the tokens' with a temperature
    limit: Count | None = None  # read so many examples, the first; None: all
    batch_size: Count = 16  # rows, or texts, at a time
    # of a text that is written; None: half as many again as the longest right text has
    max_tokens: Count | None = None
    beams: Count = 1  # above 1: the likeliest text that is found is written
    temperature: NotNegative = 0.0  # of a text that is written; 0: always the likeliest token
    step: Whole | None = None  # of the checkpoint; None: the best of a task's run, or the newest
    out: str | None = None  # file of what was said of each example, as lines of JSON
    task: TaskConfig = field(default_factory=TaskConfig)
    debug: bool = False  # show the traceback of an error


def evaluate(run_dir: str, given: Evaluate) -> None:
    """Print the task's figures, and the interval of the one that it is measured by."""
    from gptjax.tasks import Problems
    from gptjax.tasks.metrics import bootstrap, figure_of, need_packages

    config = task_config(run_dir, given.task)
    paths = getattr(config.task, given.split)
    if not paths:
        raise ConfigError(f"task.{given.split} is empty: give --task.{given.split} FILE")
    problems = Problems(config.task.on_bad_example, f"task.{given.split}", config.task.kind)
    task, training = _task_of(config, given.shots)
    need_packages(task.name)
    if given.out:
        Path(given.out).open("a").close()  # fails now, if it is going to
    examples = list(itertools.islice(task.read(paths, problems), given.limit))
    problems.refuse()
    if not task.labels:
        task = task.fitted(examples)
    said = _Speaker(run_dir, config, task, given.step, _asking(given), training)
    predictions = said.of(examples, problems)
    pairs = [pair for pair in zip(examples, predictions, strict=True) if pair[1] is not None]
    for line in problems.lines():
        print(line)
    if not pairs:
        raise ConfigError(f"task.{given.split}: no example is left that a row holds")
    examples, predictions = map(list, zip(*pairs, strict=True))
    print(f"{len(examples):,} examples of task.{given.split}, at step {said.step:,}{said.about}")
    name, parts = task.measure(examples, predictions)
    for figure, value in task.metrics(examples, predictions).items():
        interval = ""
        if figure == name and parts is not None:
            low, high = bootstrap(parts, figure_of(name))
            interval = f"  (95 % of resamples: {low:.4f} to {high:.4f})"
        print(f"{figure:16} {value:.4f}{interval}")
    if given.out:
        Path(given.out).write_text(
            "".join(_line(*pair) for pair in zip(examples, predictions, strict=True)), "utf-8"
        )


def predict_file(
    run_dir: str,
    path: str,
    out: str,
    task_given: TaskConfig,
    *,
    step: int | None,
    batch_size: int,
    max_tokens: int | None,
    beams: int,
    temperature: float,
    seed: int,
) -> None:
    """Write what the run says of each example of a file, a chunk at a time; what is written already
    is not said again.
    """
    from gptjax.prompting import Asking, most_tokens
    from gptjax.tasks import Problems

    config = task_config(run_dir, task_given)
    problems = Problems(config.task.on_bad_example, path, config.task.kind)
    task, _ = _task_of(config, 0)
    if task.name in ("classify", "entities") and not task.labels:
        raise ConfigError("the labels are not known: give --task.labels, or --task.train FILE")
    examples = iter(task.read((path,), problems, labelled=False))
    if max_tokens is None:  # of a chunk the longest right text would be another
        max_tokens = most_tokens(config.model.context_size)
    how = Asking(0, seed, batch_size, max_tokens, beams, temperature)
    with _alone(Path(out)):
        said = _Speaker(run_dir, config, task, step, how, ())
        before, examples = _pass_over(examples, Path(out), path, said.settings)
        done = before
        while chunk := list(itertools.islice(examples, CHUNK)):
            predictions = said.of(chunk, problems, done)
            problems.refuse()
            with Path(out).open("a", encoding="utf-8") as file:
                for example, one in zip(chunk, predictions, strict=True):
                    one = {"too_long": True} if one is None else one
                    file.write(_line(example, {"key": _key(example, said.settings)} | one))
            done += len(chunk)
    problems.refuse()
    for line in problems.lines():
        print(line)
    resumed = f", {before:,} of them before" if before else ""
    print(f"{done:,} examples of {path}{resumed}: {out}")


def read_task(run_dir: str) -> TaskConfig:
    """The task of a run, from its config alone."""
    path = Path(run_dir, "config.json")
    return from_json(path.read_text()).task if path.is_file() else TaskConfig()


def task_config(run_dir: str, task: TaskConfig | None = None) -> Config:
    """The config of a run, with another task if one is given.

    Raises:
      ConfigError: if there is no task.
    """
    from gptjax.rundir import read_run

    config = read_run(Path(run_dir))[0]
    own = config.task
    config = replace(config, task=task or own)
    if config.task.kind is None:
        raise ConfigError(
            f"{run_dir} is of no task: give --task.kind, such as --task.kind classify, and files"
        )
    check_task(config.task, own)
    return config


class _Speaker:
    """What a run says of examples, by its head or in words."""

    def __init__(
        self,
        run_dir: str,
        config: Config,
        task: "Task",
        step: int | None,
        how: "Asking",
        training: Sequence[Any],
    ):
        """Read the parameters; of a step, or of the best that there is."""
        import jax

        from gptjax.best import best_step
        from gptjax.checkpoint import Checkpoints
        from gptjax.labelled import jit_label_step, with_head_of
        from gptjax.loading import load_params
        from gptjax.model import resolve
        from gptjax.prompting import Model
        from gptjax.rundir import read_run
        from gptjax.sharding import make_mesh

        own, tokenizer = read_run(Path(run_dir))
        checkpoints, devices = Checkpoints(Path(run_dir)), jax.devices()[:1]
        best = best_step(Path(run_dir), own)
        if step is None and best in checkpoints.steps():
            step = best
        self.step = checkpoints.stored(step).step
        self.by_head = config.model.head != "lm"
        if self.by_head:
            config = with_head_of(config, task)
        config = replace(config, batch_size=how.batch_size)
        config = replace(config, model=resolve(config.model, devices[0].platform)[0])
        self.mesh = make_mesh(MeshConfig(), devices)
        params = load_params(Path(run_dir), config.model, self.mesh, self.step)
        config = replace(config, tune=TuneConfig())  # what it trained is merged
        self.config, self.task, self.how, self.training = config, task, how, training
        # All that what is said depends on, but for the example and the size of a batch.
        settings = to_json(own), self.step, task, how._replace(batch_size=0, first=0)
        self.settings = hashlib.sha256(repr(settings).encode("utf-8", "replace")).digest()
        self.model = Model(params, config.model, tokenizer)
        self.label_step = jit_label_step(config, self.mesh) if self.by_head else None
        self.about = ""

    def of(
        self, examples: list[Any], problems: "Problems", first: int = 0
    ) -> "list[Prediction | None]":
        """What is said of each; None of one that is too long. `first` is the first one's number."""
        from gptjax.labelled import make_split, predict
        from gptjax.prompting import ask, refuse_idle

        if not self.by_head:
            how = self.how._replace(first=first)
            answers = ask(self.model, self.task, examples, self.training, how, problems)
            self.about = f", after {answers.shots:.4g} examples" if self.how.shots else ""
            return answers.predictions
        refuse_idle(self.task, examples, self.how, by_head=True)
        split = make_split(
            self.config,
            self.task,
            examples,
            self.model.tokenizer,
            problems,
            to_learn=False,
            labelled=False,
        )
        params = self.model.params
        return predict(params, self.task, split, self.label_step, self.mesh).predictions


def _asking(given: Evaluate) -> "Asking":
    from gptjax.prompting import Asking

    return Asking(
        given.shots,
        given.seed,
        given.batch_size,
        given.max_tokens,
        given.beams,
        given.temperature,
    )


def _task_of(config: Config, shots: int) -> "tuple[Task, list[Any]]":
    """The task with its labels, and the training examples, if they are needed."""
    from gptjax.tasks import Problems, make_task

    task, examples = make_task(config.task), []
    learns = task.name in ("classify", "entities") and not task.labels
    if config.task.train and (shots or learns):
        problems = Problems(config.task.on_bad_example, "task.train", config.task.kind)
        examples = list(task.read(config.task.train, problems))
        problems.refuse()
        task = task.fitted(examples)
    return task, examples


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Be the only process that writes a file, as far as the system can tell."""
    from gptjax.rundir import BusyError

    with out.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BusyError(
                f"--out {out} is being written by another process: wait for it, or give another"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield


def _pass_over(
    examples: "Iterator[Any]", out: Path, path: str, settings: bytes
) -> "tuple[int, Iterator[Any]]":
    """How many examples a file has whole lines of, and those that follow; a line that was being
    written when a process was killed goes.

    Raises:
      ConfigError: if the lines are of other examples, or were made in another way; nothing is
        changed.
    """
    done = size = 0
    with out.open("rb+") as file:
        for line in file:
            example = next(examples, None)
            begins = example and _line(example, {"key": _key(example, settings)})[:-2].encode()
            whole = line.endswith(b"\n")
            if begins is None or not line.startswith(begins if whole else begins[: len(line)]):
                raise ConfigError(
                    f"--out {out}: its line {done + 1:,} does not say of {path} what comes there, "
                    "or was made by another run, step or option: give another --out, or delete it"
                )
            if not whole:
                examples = itertools.chain([example], examples)
                break
            done, size = done + 1, size + len(line)
        file.truncate(size)
    return done, examples


def _line(example: Any, said: "Prediction") -> str:
    """A line of JSON: where an example was read, and what was said of it."""
    return json.dumps({"where": example.where} | said, ensure_ascii=False) + "\n"


def _key(example: Any, settings: bytes) -> str:
    """What a line is known by: it is another for another example, run, step or option."""
    return hashlib.sha256(settings + repr(example).encode("utf-8", "replace")).hexdigest()[:12]
