"""A run, from its first step to its last."""

import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gptjax.best import NO_BEST, Best, best_by, best_of
from gptjax.checkpoint import Checkpoints
from gptjax.clock import Clock, DeviceWatch
from gptjax.compiled import compile_step, kept_in, seal, take_executable
from gptjax.config import Config
from gptjax.data import Batch, Rows, prefetch
from gptjax.decoding import generate
from gptjax.errors import EXIT_CODES, NO_ERRORS, explain
from gptjax.evaluate import evaluate, jit_eval_step
from gptjax.events import Events
from gptjax.exclusions import (
    Rollback,
    pass_over,
    read_rollbacks,
    write_exclusions,
    write_rollbacks,
)
from gptjax.faults import at
from gptjax.integrity import NotFiniteError
from gptjax.labelled import (
    figures_of,
    jit_label_step,
    predict,
    write_said,
)
from gptjax.loading import about_origin, begin_with
from gptjax.metrics import Log, read_metrics
from gptjax.model import Params
from gptjax.prompting import say_at_end
from gptjax.ready import Ready, make_ready
from gptjax.replicas import Comparer, Comparison, differences, make_comparer
from gptjax.resume import (
    NOTHING_ALLOWED,
    Allowed,
    Origin,
    begin_fork,
    keep_past,
    write_changes,
)
from gptjax.rows import take_up
from gptjax.rundir import BusyError, RunLock, save_run
from gptjax.sampling import Sampling
from gptjax.sharding import local_rows, to_devices
from gptjax.step import TrainState, abstract_state, jit_init_state, with_params
from gptjax.stop import Interrupted, Leaving, Stop
from gptjax.summary import summary, versions
from gptjax.tasks import ExampleRows, Problems
from gptjax.tuning import abstract_all, merged
from gptjax.watchdog import Watchdog


class DivergenceError(RuntimeError):
    """Updates were skipped too many times in a row, for losses or gradients that are not finite or
    far too high.
    """


class ReplicaError(DivergenceError):
    """Copies of the state on different devices are not the same."""


class _GoBackError(Exception):
    """Updates were skipped too many times in a row, and the run may go back."""

    def __init__(self, step: int, skipped: int):
        """So many up to this step."""
        self.step, self.skipped = step, skipped


def fit(
    config: Config,
    run_dir: Path,
    *,
    allowed: Allowed = NOTHING_ALLOWED,
    fork_from: Origin | None = None,
    executable: Path | None = None,
    began: float | None = None,
) -> TrainState:
    """Train, from the newest checkpoint in the run directory if there is one, and leave everything
    there.

    Args:
      config: the run. `model.vocab_size` None is taken from the tokenizer.
      run_dir: config.json, metrics.jsonl, tokenizer/, checkpoints/, compiled/ and tensorboard/ are
        written below it.
      allowed: changes that a run that goes on may have, though they change its numbers.
      fork_from: the run and step whose state a new run begins with.
      executable: a file of `save_executable`, of which the step is taken if it is that of this run.
      began: when the process began, in seconds since 1970; None: now.
    Returns:
      the state after the last step.
    Raises:
      ConfigError, DataError: before anything is compiled or written.
      BusyError: if another run is in the run directory; nothing is changed there.
      CheckpointError: if the run directory is of another tokenizer, model, data or seed, or of
        another config or stores that are not allowed; or all its checkpoints are damaged.
      DivergenceError: after `config.guard.max_nonfinite` updates in a row that are not finite, or
        one rollback more than `config.guard.max_rollbacks`.
      ReplicaError: if copies of the state on different devices are no longer the same.
      NotFiniteError: if a state to be saved is not finite.
      OSError: if a save failed as often as `config.guard.save_retries` allows, and once more.
      Interrupted: after SIGTERM or SIGINT, once the step is saved. Before the first step, and
        while the final sample is made, a signal ends the process at once, with code 75. Signals are
        heard if this is the main thread.
    """
    events = Events(run_dir, jax.process_index(), began)
    alone = jax.process_count() == 1
    with (
        events,
        Leaving(events) as leave,
        Stop(leave, alone=alone) as stop,
        Watchdog(config.guard, stop, leave) as watchdog,
        _alone_in(run_dir, leave),
        _told(events),
        watchdog.telling(),
    ):
        return _fit(config, run_dir, allowed, fork_from, executable, events, stop, watchdog)


@contextmanager
def _alone_in(run_dir: Path, leave: Leaving) -> Iterator[None]:
    """The run directory is this run's alone, or else every process of the run refuses it."""
    count, refusal = jax.process_count(), None
    lock = RunLock(
        run_dir,
        num_processes=count,
        say=lambda text: print(text, file=sys.stderr),
        lost=functools.partial(leave, EXIT_CODES["BusyError"]),
    )
    with ExitStack() as opened:
        if jax.process_index() == 0:
            try:
                opened.enter_context(lock)
                leave.after(lock.release)
            except BusyError as error:
                refusal = error
        if count > 1:
            text = str(refusal or "").encode()[:1024].ljust(1024)
            told = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
            if words := bytes(told).decode(errors="replace").strip():
                refusal = BusyError(words)
        if refusal:
            raise refusal
        yield


@contextmanager
def _told(events: Events) -> Iterator[None]:
    """What ends the run stands among the events too."""
    try:
        yield
    except BaseException as error:
        code, message = explain(error)
        events.write("stop" if code in NO_ERRORS else "error", code=code, message=message)
        raise


def _fit(
    config: Config,
    run_dir: Path,
    allowed: Allowed,
    fork_from: Origin | None,
    executable: Path | None,
    events: Events,
    stop: Stop,
    watchdog: Watchdog,
) -> TrainState:
    """As `fit`, in a run directory that is this run's alone."""
    ready = make_ready(config, run_dir, allowed, fork_from, events)
    config, past, first = ready.config, ready.past, jax.process_index() == 0
    if first and past and past.forks:
        begin_fork(run_dir, past)
    with Checkpoints(
        run_dir,
        keep_last=config.keep_last,
        keep_every=config.keep_every,
        retries=config.guard.save_retries,
        backoff=config.guard.save_backoff,
        events=events,
    ) as checkpoints:
        start = checkpoints.latest_valid()
        if start is None:
            start = past.step if past else 0
        exclusions = take_up(run_dir, start)
        ready = ready.passing_over(exclusions, run_dir)
        events.start(start, **versions(config, ready.mesh))
        if first:
            write_changes(events, start, ready.changes, ready.data_changes, past)
            keep_past(run_dir, config, start, ready.contents)
            save_run(run_dir, config, ready.tokenizer)
            if exclusions:
                write_exclusions(run_dir, exclusions)
        with (
            kept_in(run_dir / "compiled", always=executable is not None),
            Log(
                run_dir,
                first_step=start + 1,
                last_step=config.steps,
                tensorboard=config.tensorboard,
                enabled=first,
            ) as log,
        ):
            for line in ready.first_lines(exclusions, run_dir):
                log.say(line)
            run = _Run(ready, run_dir, executable, checkpoints, log, events, stop, watchdog)
            with watchdog.telling():
                return run.go(start)


class _Run:
    """What the phases of a run share."""

    def __init__(
        self,
        ready: Ready,
        run_dir: Path,
        executable: Path | None,
        checkpoints: Checkpoints,
        log: Log,
        events: Events,
        stop: Stop,
        watchdog: Watchdog,
    ) -> None:
        self.config, self.mesh, self.tokenizer = ready.config, ready.mesh, ready.tokenizer
        self.rows, self.valid_splits = ready.rows, ready.valid_splits
        self.labelled, self.origin = ready.labelled, ready.origin
        self.run_dir, self.executable = run_dir, executable
        self.checkpoints, self.log = checkpoints, log
        self.events, self.stop, self.watchdog = events, stop, watchdog
        self.rollbacks = read_rollbacks(run_dir)
        self.best = self.find_best()  # step of a task
        self.comparer: Comparer | None = None  # of the state's copies; None: there are none

    def go(self, start: int) -> TrainState:
        """From a step to the end."""
        if start >= self.config.steps or self.is_over:
            with self.watchdog.phase("start"):
                state = self.start(start)
            self.evaluate_late(state.params, start)
        else:
            with self.watchdog.phase("start"), ThreadPoolExecutor(1, "compile") as thread:
                compiling = thread.submit(self.compile)
                state = self.start(start)  # meanwhile
                with self.events.spent.of("compile"):
                    step_fn, said = compiling.result()
                if said:
                    self.log.say(said)
            self.evaluate_late(state.params, start)
            if not self.is_over:
                state = self.train_back_and_forth(state, start, step_fn)
        self.stop.all_is_saved()
        self.finish(state)
        return state

    def compile(self) -> tuple[Callable, str]:
        """The step, compiled, and what is to be said of its executable file; and what saving and
        the comparison of copies need.
        """
        at("compile")
        with self.events.phase("compile"):
            state = abstract_state(self.config, self.mesh)
            self.checkpoints.prepare(state)
            if self.config.guard.cross_check_every:
                self.comparer = make_comparer(state, self.mesh)
            why_not = ""
            if self.executable:
                why_not = take_executable(self.executable, self.config, self.mesh)
            step, found = compile_step(self.config, self.mesh)
            seal(self.run_dir / "compiled")  # now, for the run may be killed
        if not self.executable:
            return step, ""
        if not (found or why_not):
            why_not = "the program is another: that of other code, or under other flags of XLA"
        what = f"is not taken, and the step compiled: {why_not}" if why_not else "is taken"
        return step, f"executable {self.executable} {what}"

    def start(self, step: int) -> TrainState:
        """The state of the checkpoint of a step, that which a fork begins with, or a fresh one."""
        if step in self.checkpoints.steps():
            at("restore")
            with self.events.phase("restore"):
                state = self.checkpoints.restore(abstract_state(self.config, self.mesh), step)
            self.log.say(f"resumed    from step {step:,}")
            return state
        if self.origin:
            self.log.say(f"fork       of {self.origin.run} at step {self.origin.step:,}")
            with self.events.phase("restore"):
                like = abstract_state(self.config, self.mesh)
                state = Checkpoints(self.origin.run).restore(like, self.origin.step)
            with self.events.spent.of("checkpoint"):  # from now on the origin may go
                self.checkpoints.save(self.origin.step, state, wait=True)
            return state
        with self.events.phase("initialise"):
            state = jit_init_state(self.config, self.mesh)(jax.random.key(self.config.seed))
            if self.config.init_from is None:
                return state
            origin = Path(self.config.init_from)
            about = about_origin(origin, self.config)
            self.log.say(f"begun      with the parameters of {origin}{about}")
            return with_params(state, begin_with(origin, self.config, self.mesh, state.params))

    def train_back_and_forth(self, state: TrainState, start: int, step_fn: Callable) -> TrainState:
        """All steps from `start` on, and those after each rollback."""
        while True:
            try:
                return self.train(state, start, step_fn)
            except _GoBackError as error:
                step, skipped = error.step, error.skipped
            del state  # the memory of the next one
            start = self.roll_back(step, skipped)
            state = self.start(start)

    def roll_back(self, step: int, skipped: int) -> int:
        """Record that the batches of the skipped updates up to a step are passed over, and forget
        what follows the newest checkpoint; its step. All processes do the same.

        Raises:
          DivergenceError: if the run has gone back as often as it may.
        """
        found, safe = self.find_safe()
        start = found or 0
        if len(self.rollbacks) >= self.config.guard.max_rollbacks:
            raise DivergenceError(
                f"the updates of {skipped} steps in a row were skipped, up to step {step:,}, and "
                f"the run has gone back {len(self.rollbacks)} times; {safe}: lower "
                "optimizer.learning_rate, look at the data with `gptjax data`, or give a larger "
                "guard.max_rollbacks"
            )
        first = max(step - skipped, start)  # counted from 0; what is saved has passed them already
        batches = [self.rows.batch_number(one) + 1 for one in (first, step - 1)]
        rollback = Rollback(first=batches[0], last=batches[1], step=step, to_step=start)
        self.rollbacks += (rollback,)
        self.rows = pass_over(self.rows, [rollback])
        self.events.progress()
        if jax.process_index() == 0:
            write_rollbacks(self.run_dir, self.rollbacks)
            self.events.write("rollback", **dataclasses.asdict(rollback))
        self.events.step = start
        self.log.rewind(start + 1)
        self.log.say(
            f"rollback   from step {step:,} to step {start:,}, past batches {batches[0]:,} to "
            f"{batches[1]:,}, as {self.run_dir / 'rollbacks.json'} lists"
        )
        self.best = self.find_best()
        return start

    def train(self, state: TrainState, start: int, step_fn: Callable) -> TrainState:
        """All steps from `start` on. Metrics of a step are fetched once the next is dispatched, so
        no device waits.
        """
        config, log, rows = self.config, self.log, self.rows
        which = local_rows(self.mesh, config.batch_size)

        def make(step: int) -> Batch:
            batch = rows.batch_at(step, which=which)
            if at("batch_read"):
                batch = batch._replace(weights_BT=np.full_like(batch.weights_BT, np.nan))
            return to_devices(self.mesh, batch, config.batch_size)

        clock = Clock(config, self.mesh)
        ahead, request = config.data.prefetch, self.stop.request
        step, waiting, owed, began = start, None, False, time.perf_counter()
        with (
            self.events.spent.of("train"),
            self.watchdog.phase("step"),
            DeviceWatch() as watch,
            closing(prefetch(make, start, config.steps, ahead, request)) as batches,
        ):
            for batch in self.awaited(batches, watch):
                if not self.stop.begin():
                    break
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                step += 1
                self.events.step = step
                watch.given(metrics)
                at("step_end")
                if waiting:
                    self.record(*waiting, clock)
                    if step == start + 2:
                        self.events.write("first_step", seconds=time.perf_counter() - began)
                log.advance(step)
                last = step == config.steps
                evaluates = self.valid_splits and (last or _due(step, config.eval_every))
                owed |= self.checkpoints.due_again(step) or _due(step, config.save_every)
                saves = owed or last
                compares = self.comparer and _due(step, config.guard.cross_check_every)
                waiting = (step, metrics, self.comparer.compare(state) if compares else None)
                if evaluates or saves:  # before the next step takes the state's memory
                    taken = self.record(*waiting, clock, state.params if evaluates else None)
                    waiting = None
                    owed |= self.best.step == step
                    self.events.progress()  # so that is known what steps up to here took
                    # While updates are skipped the newest checkpoint stays one from before.
                    if owed and taken and not last:  # the last one is waited for, below
                        self.save(step, state, after_all=self.best.step == step)
                        owed = False
                    clock.restart(step)
                    if self.is_over:
                        break
            if waiting:
                self.record(*waiting, clock)
            if step > start:
                self.save(step, state, wait=True)
        if step < config.steps and not self.is_over:
            raise Interrupted(
                f"by {self.stop.asked} after step {step:,}, which is saved: "
                "the same command goes on"
            )
        return state

    def save(
        self, step: int, state: TrainState, *, wait: bool = False, after_all: bool = False
    ) -> None:
        """Begin to save a state whose copies are the same, or wait until it is done."""
        if self.comparer:
            self.refuse_differences(step, self.comparer.compare(state))
        with self.watchdog.phase("save"), self.events.spent.of("checkpoint"):
            self.checkpoints.save(step, state, wait=wait, after_all=after_all)

    def awaited(self, batches: Iterator[Batch], watch: DeviceWatch) -> Iterator[Batch]:
        """The batches. The time in which the devices have no step to compute, because none is
        there, is data wait; while they compute it is not.
        """
        spent = self.events.spent
        while True:
            with spent.of("data_wait"):
                before = time.perf_counter()
                batch = next(batches, None)
                busy = watch.done_at(time.perf_counter()) - before
            spent.move(max(busy, 0.0), "data_wait", "train")
            if batch is None:
                return
            yield batch

    def record(
        self,
        step: int,
        metrics: dict,
        comparison: Comparison | None,
        clock: Clock,
        evaluated: Params | None = None,
    ) -> bool:
        """Log a step if it is due, with the loss on the validation split if given parameters.

        Returns:
          whether its update was taken.
        Raises:
          DivergenceError: if too many updates were skipped in a row.
          ReplicaError: if the copies of the state differ.
        """
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if comparison:
            self.refuse_differences(step, comparison)
        taken = not metrics["train/skipped"]
        if not taken:
            self.tell_skipped(step, metrics)
        ends = step in (1, self.config.steps)
        if evaluated is not None or ends or _due(step, self.config.log_every):
            metrics |= clock.read(step)
            if evaluated is not None:
                figures = self.evaluate(evaluated) or {}
                metrics |= figures
                self.compare(step, figures)
            self.log.write(step, metrics)
        return taken

    def refuse_differences(self, step: int, comparison: Comparison) -> None:
        """Stop the run if the copies of its state differ, before any of them is saved."""
        found = differences(comparison, self.comparer)
        if found:
            more = f", and {len(found) - 3} more" if len(found) > 3 else ""
            raise ReplicaError(
                f"the copies of the state on different devices differ after step {step:,}: "
                f"{'; '.join(found[:3])}{more}. A device has computed or kept something wrong. "
                f"Nothing of it is saved, and {self.find_safe()[1]}: the same command goes on, "
                "better without that device; --guard.cross-check-every None compares no more"
            )

    def find_safe(self) -> tuple[int | None, str]:
        """The newest checkpoint from before what went wrong, once what is being saved is saved, and
        words for it. That a save has failed must not hide what went wrong.
        """
        failed = ""
        try:
            self.checkpoints.wait()
        except (OSError, NotFiniteError) as error:
            failed = f", and the save that was under way failed: {error}"
        step = self.checkpoints.latest_valid()
        if step is None:
            return None, f"there is no checkpoint yet{failed}"
        return step, f"the newest checkpoint, of step {step:,}, is from before{failed}"

    def tell_skipped(self, step: int, metrics: dict[str, float]) -> None:
        """Tell that an update was skipped, and of which batch; go back, or stop, if it is one too
        many.
        """
        guard, skipped = self.config.guard, metrics["train/skipped"]
        loss, grad_norm = metrics["train/loss"], metrics["train/grad_norm"]
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        batch = self.rows.batch_number(step - 1) + 1
        if jax.process_index() == 0:
            self.events.write(
                "spike" if finite else "skipped_update",
                step=step,
                batch=batch,
                batch_hash=metrics["data/batch_hash"],
                loss=loss if math.isfinite(loss) else None,
                grad_norm=grad_norm if math.isfinite(grad_norm) else None,
                in_a_row=skipped,
            )
        what = "far above the last ones" if finite else "not finite"
        self.log.say(
            f"skipped    the update of step {step:,}, batch {batch:,}: loss {loss:.4g}, norm of "
            f"the gradient {grad_norm:.4g}, {what}"
        )
        if guard.rollback_after and skipped >= guard.rollback_after:
            raise _GoBackError(step, skipped)
        if skipped - metrics["train/spikes"] >= guard.max_nonfinite:
            raise DivergenceError(
                f"the loss or its gradient was not finite for {skipped} steps "
                f"in a row, up to step {step:,}: lower optimizer.learning_rate, lengthen the "
                f"warm-up, or go on from an earlier checkpoint; {self.find_safe()[1]}"
            )

    def evaluate_late(self, params: Params, step: int) -> None:
        """Evaluate the step that the run begins with, if it was stopped while it did that."""
        if not self.valid_splits or not (
            step == self.config.steps or _due(step, self.config.eval_every)
        ):
            return
        lines = read_metrics(self.run_dir) if jax.process_index() == 0 else []
        owed = any(line["step"] == step and "eval/loss" not in line for line in lines)
        if jax.process_count() > 1:
            owed = bool(multihost_utils.broadcast_one_to_all(np.array(owed)))
        if owed and (figures := self.evaluate(params)):
            self.log.amend(step, figures)
            self.compare(step, figures)

    # --- the best step of a task ---

    def find_best(self) -> Best:
        """The best of the steps that were done."""
        if self.labelled is None:
            return NO_BEST
        best = NO_BEST
        if jax.process_index() == 0:
            best = best_of(read_metrics(self.run_dir), self.config)
        if jax.process_count() > 1:
            step, figure, since = multihost_utils.broadcast_one_to_all(
                np.array([best.step or 0, best.figure, best.since])
            ).tolist()
            best = Best(int(step) or None, figure, int(since))
        self.checkpoints.keep(best.step)
        return best

    def compare(self, step: int, figures: dict[str, float]) -> None:
        """Remember a step that is better than all before, whose checkpoint is to stay."""
        name, sign = best_by(self.config)
        if self.labelled and name in figures:
            self.best = self.best.then(step, figures[name], sign)
            self.checkpoints.keep(self.best.step)

    @property
    def is_over(self) -> bool:
        """Whether so many evaluations were no better that the run ends before its last step."""
        patience = self.config.task.patience
        return self.labelled is not None and patience is not None and self.best.since >= patience

    @functools.cached_property
    def eval_step(self) -> Callable:
        return jit_eval_step(self.config, self.mesh, self.tokenizer.bytes_per_token)

    @functools.cached_property
    def label_step(self) -> Callable:
        return jit_label_step(self.config, self.mesh)

    def evaluate(self, params: Params) -> dict[str, float] | None:
        """The loss on the validation split, or on as much of it as the config says, and a task's
        figures; None if the run is to stop.
        """
        at("evaluate")
        with (
            self.watchdog.phase("evaluate"),
            self.events.phase("evaluation", step=self.events.step),
        ):
            if self.config.model.head != "lm":
                return self.figures(params, "valid", "eval")
            return self.losses(params, self.valid_splits)

    def losses(
        self, params: Params, splits: dict[str, Rows | ExampleRows]
    ) -> dict[str, float] | None:
        """The losses on some splits; None if the run is to stop."""
        return evaluate(
            params,
            splits,
            self.eval_step,
            self.mesh,
            max_batches=self.config.eval_batches,
            begin=self.stop.begin,
            request=self.stop.request,
        )

    def figures(
        self, params: Params, name: str, prefix: str, folder: Path | None = None
    ) -> dict[str, float] | None:
        """The figures of a task on one of its splits; None if the run is to stop. What was said is
        written to a folder, if one is given.
        """
        task, split = self.labelled.task, self.labelled.splits[name]
        begin, request = self.stop.begin, self.stop.request
        said = predict(
            params, task, split, self.label_step, self.mesh, begin=begin, request=request
        )
        if said is None:
            return None
        if folder and jax.process_index() == 0:
            write_said(folder, name, task, split.examples, said.predictions)
        figures = figures_of(task, split.examples, said)
        return {f"{prefix}/{name}": value for name, value in figures.items()}

    def texts(self, params: Params, name: str, prefix: str, folder: Path) -> dict[str, float]:
        """The figures of what a model writes for the first examples of a split; what it is, is
        written to a folder.
        """
        task = self.labelled.task
        examples = self.labelled.splits[name].examples[: self.config.task.written]
        if not examples:
            return {}
        params = merged(params, self.config)
        self.log.say(f"writing    what it says of {len(examples):,} examples of task.{name}")
        problems, begin = Problems("skip", f"task.{name}"), self.stop.begin
        said = say_at_end(params, self.config, task, examples, self.tokenizer, problems, begin)
        for line in problems.lines():
            self.log.say(f"           task.{name}: {line.strip()}")
        pairs = [pair for pair in zip(examples, said, strict=True) if pair[1] is not None]
        if not pairs:
            return {}
        if jax.process_index() == 0:
            write_said(folder, name, task, examples, said)
        figures = task.metrics(*map(list, zip(*pairs, strict=True)))
        return {f"{prefix}/{name}": value for name, value in figures.items()}

    def finish(self, state: TrainState) -> None:
        """Say what came of it: a sample, or the figures of a test split; the last figures, and
        where everything lies.
        """
        config, sample = self.config, self.config.sample
        at("sample")
        if self.labelled:
            self.conclude(state)
        if sample.max_tokens and not self.labelled:
            prompt = [self.tokenizer.begin, *self.tokenizer.encode(sample.prompt).tolist()]
            sampling = Sampling(
                max_tokens=sample.max_tokens,
                temperature=sample.temperature,
                top_k=sample.top_k,
                top_p=sample.top_p,
            )
            key = jax.random.key(config.seed)
            end = self.tokenizer.end
            with self.events.phase("sample"):
                params = merged(state.params, config)
                (tokens,) = generate(params, [prompt], config.model, sampling, key, end=end)
            text = sample.prompt + self.tokenizer.decode(tokens)
            self.log.say(f"sample     at temperature {sample.temperature:g}:\n\n{text}\n")
        if jax.process_index() == 0:
            lines = read_metrics(self.run_dir)
            task, best = config.task.kind, self.best.step
            self.log.say(summary(lines, self.run_dir, task=task, best=best))

    def conclude(self, state: TrainState) -> None:
        """Keep what the best step says of the validation and the test split, and log the figures of
        the latter.
        """
        params, last, best = state.params, int(state.step), self.best.step
        if best in self.checkpoints.steps():
            if best != last:
                like = abstract_all(self.config, self.mesh)
                params = self.checkpoints.restore_params(like, best)
        elif best is not None:
            self.log.say(
                f"best       step {best:,} could not be saved: step {last:,} is used instead"
            )
        with self.watchdog.phase("evaluate"), self.events.phase("evaluation", step=last):
            figures, folder = {}, self.run_dir / "said"
            labels, splits = self.config.model.head != "lm", self.labelled.splits
            if labels and "valid" in splits:
                self.figures(params, "valid", "eval", folder)
            elif "valid" in splits:
                figures |= self.texts(params, "valid", "eval", folder)
            if labels and "test" in splits:
                figures |= self.figures(params, "test", "test", folder) or {}
            elif "test" in splits:
                losses = self.losses(params, {"": splits["test"].rows}) or {}
                figures |= {f"test/{name[5:]}": value for name, value in losses.items()}
                figures |= self.texts(params, "test", "test", folder)
        if figures:
            self.log.amend(last, figures)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
