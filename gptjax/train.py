"""A run, from its first step to its last."""

import dataclasses
import functools
import re
import signal
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ConfigError, GPTConfig, check
from gptjax.corpus import load_corpus
from gptjax.data import (
    Batch,
    Exclusion,
    Member,
    Rows,
    batch_at,
    check_epochs,
    check_rows,
    exclude,
    prefetch,
    read_exclusions,
    write_exclusions,
)
from gptjax.decoding import generate
from gptjax.evaluate import evaluate, jit_eval_step
from gptjax.events import Events
from gptjax.faults import at
from gptjax.loading import check_origin, load_params
from gptjax.metrics import Log, flops_per_token, peak_flops, read_metrics
from gptjax.model import Params, abstract_params, resolve
from gptjax.resume import begun, refuse_another_run
from gptjax.rundir import save_run
from gptjax.sampling import Sampling
from gptjax.sharding import local_rows, make_mesh, to_devices
from gptjax.sources import DataError
from gptjax.step import TrainState, abstract_state, compile_train_step, jit_init_state, with_params
from gptjax.store import Store
from gptjax.tokenizer import Tokenizer, make_tokenizer


class DivergenceError(RuntimeError):
    """Updates were skipped too many times in a row, for losses or gradients that are not finite."""


class Interrupted(RuntimeError):
    """The run was asked to stop, and its last step is saved: the same command goes on from
    there.
    """


def fit(config: Config, run_dir: Path) -> TrainState:
    """Train, from the newest checkpoint in the run directory if there is one, and leave everything
    there.

    Args:
      config: the run. `model.vocab_size` None is taken from the tokenizer.
      run_dir: config.json, metrics.jsonl, tokenizer/, checkpoints/ and tensorboard/ are written
        below it.
    Returns:
      the state after the last step.
    Raises:
      ConfigError, DataError: before anything is compiled or written.
      CheckpointError: if the run directory is of another tokenizer, model, data or seed.
      DivergenceError: after `config.guard.max_nonfinite` skipped updates in a row.
      Interrupted: after SIGTERM or SIGINT, once the step is saved.
    """
    tokenizer = make_tokenizer(config.data)
    before = begun(run_dir, tokenizer)
    model = config.model
    if before and model.vocab_size is None:
        model = replace(model, vocab_size=before.model.vocab_size)
    elif config.init_from and not before:
        model = check_origin(Path(config.init_from), model, tokenizer)
    config = replace(config, model=_with_vocabulary(model, tokenizer))
    mesh = make_mesh(config.mesh)
    check(config, mesh.size)
    if before:
        refuse_another_run(before, config, run_dir)
    _, reason = resolve(config.model, mesh.devices.flat[0].platform)
    train_rows, valid_splits = load_rows(config, tokenizer)
    check_epochs(train_rows, config.steps)
    first = jax.process_index() == 0
    events = Events(run_dir, jax.process_index())
    with Checkpoints(
        run_dir, keep_last=config.keep_last, keep_every=config.keep_every
    ) as checkpoints:
        start = checkpoints.latest() or 0
        exclusions = _take_up(run_dir, start)
        train_rows = exclude(train_rows, exclusions)
        if first:
            save_run(run_dir, config, tokenizer)
            if exclusions:
                write_exclusions(run_dir, exclusions)
        with Log(
            run_dir,
            first_step=start + 1,
            last_step=config.steps,
            tensorboard=config.tensorboard,
            enabled=first,
        ) as log:
            log.say(_describe(config, mesh, reason, train_rows, valid_splits))
            if exclusions:
                log.say(f"left out   {_left_out(exclusions)}, as {run_dir / 'skipped.json'} lists")
            run = _Run(config, mesh, tokenizer, valid_splits, checkpoints, log, events)
            if start < config.steps:
                with ThreadPoolExecutor(1, "compile") as thread:
                    compiling = thread.submit(run.compile)
                    state = run.start()  # meanwhile
                    step_fn = compiling.result()
                state = run.train(state, start, train_rows, step_fn)
            else:
                state = run.start()
            run.finish(state, run_dir)
    return state


def _with_vocabulary(model: GPTConfig, tokenizer: Tokenizer) -> GPTConfig:
    """The model with a vocabulary that holds the tokenizer's."""
    size = model.vocab_size or tokenizer.vocab_size
    # Padding is never predicted: models of others often have no id for it.
    least = tokenizer.vocab_size - (tokenizer.pad == tokenizer.vocab_size - 1)
    if size < least:
        raise ConfigError(
            f"model.vocab_size = {size:,}, but the tokenizer has {tokenizer.vocab_size:,} ids: "
            "give as many or more, or None to take the tokenizer's"
        )
    return replace(model, vocab_size=size)


def load_rows(config: Config, tokenizer: Tokenizer) -> tuple[Rows, dict[str, Rows]]:
    """The rows for training, and for validation those of each store that holds some out, by its
    name in a mixture or by "".

    Process 0 builds the stores that are not there yet; the others wait.

    Raises:
      DataError: for text or stores that cannot be used.
    """
    if jax.process_index() == 0:
        stores = _load_stores(config, tokenizer, progress=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("stores are built")
    if jax.process_index() > 0:
        stores = _load_stores(config, tokenizer, progress=False)

    order = {
        "context_size": config.model.context_size,
        "batch_size": config.batch_size,
        "seed": config.seed,
        # Nothing sees padding: where the model has no id for it, another serves.
        "pad": tokenizer.pad if tokenizer.pad < config.model.vocab_size else tokenizer.end,
        "end": tokenizer.end,
    }
    data = config.data
    if data.mixture:
        members = [
            Member(
                store=stores[one.name][0],
                name=one.name,
                weight=one.weight,
                weights=one.weights,
                max_epochs=min(filter(None, (one.max_epochs, data.max_epochs)), default=None),
            )
            for one in data.mixture
        ]
    else:
        ((train, _),) = stores.values()
        members = [Member(store=train, max_epochs=data.max_epochs)]
    valid = {
        name: Rows(members=(Member(store=held_out, name=name),), shuffle=False, once=True, **order)
        for name, (_, held_out) in stores.items()
        if held_out
    }
    return Rows(members=tuple(members), shuffle=data.shuffle, skip=data.skip, **order), valid


def _load_stores(
    config: Config, tokenizer: Tokenizer, *, progress: bool
) -> dict[str, tuple[Store, Store | None]]:
    """The stores for training and validation: of each store of a mixture by its name, or of the one
    that there is by "".
    """
    data = config.data
    # A batch is not of one store alone in a mixture, so that need not fill it.
    batch_size = 1 if data.mixture else config.batch_size

    def accept(split: str, num_tokens: int) -> None:
        check_rows(num_tokens, config.model.context_size, batch_size, split)

    load = functools.partial(load_corpus, tokenizer=tokenizer, accept=accept, progress=progress)
    if not data.mixture:
        return {"": load(data)}
    stores = {}
    for one in data.mixture:
        own = {name: getattr(one, name) for name in ("path", "exclude", "valid_path", "holdout")}
        try:
            stores[one.name] = load(replace(data, mixture=(), **own))
        except DataError as error:
            raise DataError(f"data.mixture, {one.name}: {error}") from error
    return stores


def _take_up(run_dir: Path, start: int) -> tuple[Exclusion, ...]:
    """What the run leaves out, which goes on from a step: what was recorded since it was last
    started has not been in effect before.

    Raises:
      DataError: if the record cannot be read, or the processes read different ones.
    """
    exclusions = tuple(
        one if one.taken_up else replace(one, taken_up=True, from_step=start)
        for one in read_exclusions(run_dir)
    )
    if jax.process_count() > 1:
        digest = np.uint32(zlib.crc32(repr(exclusions).encode()))
        if len(set(multihost_utils.process_allgather(digest).tolist())) > 1:
            raise DataError(f"{run_dir}: skipped.json changed just as the run started; start again")
    return exclusions


def _left_out(exclusions: tuple[Exclusion, ...]) -> str:
    num_tokens = sum(one.stop - one.start for one in exclusions)
    return f"{len(exclusions):,} documents, {num_tokens:,} tokens"


def _describe(config: Config, mesh: Mesh, reason: str, train: Rows, valid: dict[str, Rows]) -> str:
    """What is about to run, in a few lines."""
    device = mesh.devices.flat[0]
    model, _ = resolve(config.model, device.platform)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(model, mesh)))
    axes = (
        " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
        or "one device"
    )
    steps = f"{config.steps:,} steps of {config.batch_size * model.context_size:,} tokens"
    read = train.rows_read(config.steps)
    stores = []
    for i, member in enumerate(train.members):
        name = member.name if config.data.mixture else ""
        held_out = f"{valid[name].num_tokens[0]:,}" if name in valid else "none"
        epochs = read[i] / train.epoch_rows[i]
        stores.append(
            f"{member.store.num_tokens:,} tokens ({held_out} held out), {epochs:.2f} epochs"
        )
    if config.data.mixture:
        shares = [f"{count / read.sum():.1%}" for count in read]
        width = max(len(member.name) for member in train.members)
        lines = [
            f"           {member.name:{width}}  {share:>6} of the rows, {store}"
            for member, share, store in zip(train.members, shares, stores, strict=True)
        ]
        data = "\n".join([f"a mixture, in {steps}", *lines])
    else:
        data = f"{stores[0]} in {steps}"
    return (
        f"model      {num_params:,} parameters, {model.compute_dtype} compute, "
        f"attention {model.attention} ({reason})\n"
        f"mesh       {axes}: {mesh.size} x {device.device_kind}\n"
        f"data       {data}"
    )


@dataclasses.dataclass
class _Run:
    """What the phases of a run share."""

    config: Config
    mesh: Mesh
    tokenizer: Tokenizer
    valid_splits: dict[str, Rows]
    checkpoints: Checkpoints
    log: Log
    events: Events

    def compile(self) -> Callable:
        """The step, compiled."""
        at("compile")
        with self.events.phase("compile"):
            return compile_train_step(self.config, self.mesh)

    def start(self) -> TrainState:
        """The state of the newest checkpoint, or a fresh one."""
        if self.checkpoints.latest() is not None:
            at("restore")
            state = self.checkpoints.restore(abstract_state(self.config, self.mesh))
            self.log.say(f"resumed    from step {self.checkpoints.latest():,}")
            return state
        state = jit_init_state(self.config, self.mesh)(jax.random.key(self.config.seed))
        if self.config.init_from is None:
            return state
        origin = Path(self.config.init_from)
        self.log.say(f"begun      with the parameters of {origin}")
        return with_params(state, lambda: load_params(origin, self.config.model, self.mesh))

    def train(self, state: TrainState, start: int, rows: Rows, step_fn: Callable) -> TrainState:
        """All steps from `start` on. Metrics of a step are fetched once the next is dispatched, so
        no device waits.
        """
        config, log = self.config, self.log
        which = local_rows(self.mesh, config.batch_size)

        def make(step: int) -> Batch:
            at("batch_read")
            return to_devices(self.mesh, batch_at(step, rows, which=which), config.batch_size)

        clock = _Clock(config, self.mesh)
        with (
            _stop_requests() as stop_requested,
            closing(prefetch(make, start, config.steps, config.data.prefetch)) as batches,
        ):
            waiting = None
            for step, batch in enumerate(batches, start=start + 1):
                with jax.transfer_guard("disallow"):
                    state, metrics = step_fn(state, batch)
                at("step_end")
                if waiting:
                    self.record(*waiting, clock)
                waiting = (step, metrics)
                log.advance(step)
                stop = stop_requested(step)
                last = step == config.steps
                evaluates = self.valid_splits and (last or _due(step, config.eval_every))
                saves = stop or last or _due(step, config.save_every)
                if evaluates or saves:  # before the next step takes the state's memory
                    self.record(*waiting, clock, state.params if evaluates else None)
                    waiting = None
                    if saves:
                        self.checkpoints.save(step, state)
                    clock.restart(step)
                self.checkpoints.poll()
                if stop and step < config.steps:
                    self.checkpoints.wait()
                    raise Interrupted(
                        f"by a signal after step {step:,}, which is saved: the same command goes on"
                    )
        self.checkpoints.wait()
        return state

    def record(
        self, step: int, metrics: dict, clock: "_Clock", evaluated: Params | None = None
    ) -> None:
        """Log a step if it is due, with the loss on the validation split if given parameters.

        Raises:
          DivergenceError: if too many updates were skipped in a row.
        """
        metrics = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if metrics["train/skipped"] >= self.config.guard.max_nonfinite:
            raise DivergenceError(
                f"the loss or its gradient was not finite for {metrics['train/skipped']} steps "
                f"in a row, up to step {step:,}: lower optimizer.learning_rate, lengthen the "
                "warm-up, or go on from an earlier checkpoint"
            )
        ends = step in (1, self.config.steps)
        if evaluated is not None or ends or _due(step, self.config.log_every):
            metrics |= clock.read(step)
            if evaluated is not None:
                metrics |= self.evaluate(evaluated)
            self.log.write(step, metrics)

    @functools.cached_property
    def eval_step(self) -> Callable:
        return jit_eval_step(self.config, self.mesh, self.tokenizer.bytes_per_token)

    def evaluate(self, params: Params) -> dict[str, float]:
        """The loss on the validation split, or on as much of it as the config says."""
        at("evaluate")
        splits, most = self.valid_splits, self.config.eval_batches
        return evaluate(params, splits, self.eval_step, self.mesh, max_batches=most)

    def finish(self, state: TrainState, run_dir: Path) -> None:
        """Say what came of it: a sample, the last figures, and where everything lies."""
        config, sample = self.config, self.config.sample
        if sample.max_tokens:
            prompt = [self.tokenizer.end, *self.tokenizer.encode(sample.prompt).tolist()]
            sampling = Sampling(
                max_tokens=sample.max_tokens,
                temperature=sample.temperature,
                top_k=sample.top_k,
                top_p=sample.top_p,
            )
            key = jax.random.key(config.seed)
            end = self.tokenizer.end
            (tokens,) = generate(state.params, [prompt], config.model, sampling, key, end=end)
            text = sample.prompt + self.tokenizer.decode(tokens)
            self.log.say(f"sample     at temperature {sample.temperature:g}:\n\n{text}\n")
        if jax.process_index() == 0:
            self.log.say(_summary(read_metrics(run_dir), run_dir))


def _summary(lines: list[dict[str, float]], run_dir: Path) -> str:
    """The figures of a finished run, and its folders."""
    evaluation = next((line for line in reversed(lines) if "eval/loss" in line), None)
    speeds = [line["perf/tokens_per_second"] for line in lines if "perf/tokens_per_second" in line]
    figures = []
    if evaluation:
        figures.append(
            f"result     validation loss {evaluation['eval/loss']:.4f} nats per token, "
            f"{evaluation['eval/bits_per_byte']:.4f} bits per byte, at step {evaluation['step']:,}"
        )
        names = [name.split("/")[1] for name in evaluation if re.fullmatch("eval/.+/loss", name)]
        figures += [
            f"           {evaluation[f'eval/{name}/loss']:.4f} nats per token, "
            f"{evaluation[f'eval/{name}/bits_per_byte']:.4f} bits per byte: {name}"
            for name in names
        ]
    if speeds:
        figures.append(f"speed      {statistics.median(speeds):,.0f} tokens per second")
    return "\n".join(
        [
            *figures,
            f"run        {run_dir}: config.json, metrics.jsonl, checkpoints/, tokenizer/",
            f"next       gptjax generate {run_dir} --prompt TEXT",
        ]
    )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


class _Clock:
    """Speed since the last reading, without evaluations, checkpoints, and the first step, which
    compiles.
    """

    def __init__(self, config: Config, mesh: Mesh):
        self.tokens = config.batch_size * config.model.context_size
        dtype = resolve(config.model, mesh.devices.flat[0].platform)[0].compute_dtype
        peak = peak_flops(mesh.devices.flat[0], dtype)
        # Tokens a second that the devices could reach.
        self.most = None if peak is None else peak * mesh.size / flops_per_token(config.model)
        self.step, self.time = None, 0.0

    def restart(self, step: int) -> None:
        self.step, self.time = step, time.perf_counter()

    def read(self, step: int) -> dict[str, float]:
        """The speed from the last reading to the end of `step`, which has just been fetched;
        nothing at first.
        """
        before, since = self.step, self.time
        self.restart(step)
        if before is None or step == before:
            return {}
        seconds = (self.time - since) / (step - before)
        speed = {"perf/step_seconds": seconds, "perf/tokens_per_second": self.tokens / seconds}
        return speed | ({"perf/mfu": self.tokens / seconds / self.most} if self.most else {})


@contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """A function of the step: whether the run should stop after it, as SIGTERM and SIGINT ask. A
    second signal ends at once.

    With several processes, jax.distributed watches for SIGTERM in each, and all learn to stop after
    the same step.
    """
    asked = False

    def ask(number: int, _: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, signal.SIG_DFL)

    def forward(_number: int, _: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGTERM)

    together = jax.process_count() > 1
    handlers = {signal.SIGINT: forward} if together else {signal.SIGTERM: ask, signal.SIGINT: ask}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield multihost_utils.reached_preemption_sync_point if together else lambda _: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
