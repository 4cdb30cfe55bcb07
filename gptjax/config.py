"""Every knob of a run: frozen dataclasses, presets, and the checks between fields.

Standard library only, so that `--help` and every refusal of a bad config come without JAX.
`None` means absent, 0 means zero. The comment of a field is its help on the command line.
"""

import dataclasses
import difflib
import itertools
import json
import math
import re
import reprlib
import runpy
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints


class ConfigError(ValueError):
    """A config that cannot run: for each violation what was given, what is allowed, what to do."""


class Range(NamedTuple):
    """The values that a number may have, both ends included."""

    least: float
    most: float


# Counts fit the int32 in which devices count.
Count = Annotated[int, Range(1, 2**31 - 1)]
Whole = Annotated[int, Range(0, 2**31 - 1)]
Positive = Annotated[float, Range(1e-30, 1e30)]
NotNegative = Annotated[float, Range(0.0, 1e30)]
Finite = Annotated[float, Range(-1e30, 1e30)]
Share = Annotated[float, Range(0.0, 0.9999999)]  # a part, never the whole
Probability = Annotated[float, Range(1e-30, 1.0)]

# Rows of a mixture come in blocks, in each of which every store has exactly its share of the rows.
BLOCK_ROWS = 1 << 16

# Updates whose loss and gradient norm the state of a run remembers.
MOST_SPIKE_WINDOW = 128


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The model."""

    vocab_size: Count | None = None  # ids of the tokenizer; None: as many as it has
    # rows of the embedding are a multiple of this; those past vocab_size are never predicted
    vocab_multiple: Count = 64
    context_size: Count = 1024  # tokens that a row holds
    num_layers: Count = 12  # blocks
    width: Count = 768  # width of the residual stream
    num_heads: Count = 12  # query heads
    num_kv_heads: Count | None = None  # key/value heads; None: as many as query heads
    head_size: Count | None = None  # None: width / num_heads
    # None: 4 x width; for swiglu 8/3 x width, rounded up to a multiple of 64
    ffn_size: Count | None = None
    positions: Literal["learned", "rope"] = "learned"  # how a token knows its place
    rope_base: Positive = 10_000.0  # longest wavelength of RoPE over 2 pi, in tokens
    # as Llama 3.1 stretches RoPE: factor, its factors of low and of high frequencies, and the
    # context_size before; None: not at all
    rope_scaling: tuple[Positive, Positive, Positive, Count] | None = None
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    # before: of what attention, feed-forward and head read, as in GPT-2; after: of the residual
    # stream after each addition to it, and not before the head, as in GPT-1
    norm_place: Literal["before", "after"] = "before"
    norm_epsilon: Positive = 1e-5  # added to the variance
    # gelu is its tanh approximation, as in GPT-2
    activation: Literal["gelu", "gelu_exact", "relu", "silu", "swiglu"] = "gelu"
    bias: bool = True  # in linear layers and LayerNorm
    query_bias: bool = True  # in the maps to queries, keys and values, if bias; GPT-Neo has none
    scale_attention: bool = True  # scores are divided by the root of head_size; GPT-Neo's are not
    tied_embedding: bool = True  # the unembedding is the embedding
    # what is said at each position: lm: the token that follows; label: one of num_labels; labels:
    # any number of them; span: whether a passage begins or ends there, of all positions of the
    # segment. A task of classes, entities or questions sets it
    head: Literal["lm", "label", "labels", "span"] = "lm"
    num_labels: Count | None = None  # of label and labels; a task sets it
    # attention also sees what comes after, within the segment; not for lm
    bidirectional: bool = False
    # share of embeddings, attention outputs and feed-forward outputs set to zero in training
    dropout: Share = 0.0
    # positions that a banded layer sees, its own included; None: no layer is banded
    window: Count | None = None
    window_every: Count = 1  # 1: every layer is banded; 2: every second one, as in GPT-3
    # standard deviation of initial weights; of those that write to the residual stream,
    # this / sqrt(2 x num_layers)
    initial_scale: Positive = 0.02
    # auto: float32 on a CPU, bfloat16 elsewhere; parameters are float32 in any case
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # auto: the fastest that is right for the device
    attention: Literal["auto", "xla", "blockwise", "cudnn", "splash"] = "auto"
    # over rows split on mesh.context. ring: keys and values travel from device to device, memory
    # and work are split evenly; all_gather: each device has all of them. auto: ring, where
    # context_size is a multiple of 2 x mesh.context and attention is not cudnn
    context_attention: Literal["auto", "ring", "all_gather"] = "auto"
    # between blocks, positions are split over mesh.tensor too: less memory, as many bytes sent
    split_residual: bool = False
    # of each block, what is kept for the backward pass: all, matrix products, or only its input
    remat: Literal["none", "dots", "full"] = "dots"
    # positions of a row whose logits exist at once; None: as many as 128 MiB a device hold
    loss_piece: Count | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """The length of each parameter dimension, by letter; V includes the padding."""
        if self.vocab_size is None:
            raise ConfigError("model.vocab_size is None: give it, or take it from a tokenizer")
        num_kv_heads = self.num_kv_heads or self.num_heads
        return {
            "D": self.width,
            "N": self.num_heads,
            "K": num_kv_heads,
            "G": self.num_heads // num_kv_heads,
            "H": self.head_size or self.width // self.num_heads,
            "F": self.ffn_size or default_ffn_size(self.width, self.activation),
            "V": _round_up(self.vocab_size, self.vocab_multiple),
            "L": self.num_layers,
            "P": self.context_size,
            "C": 2 if self.head == "span" else self.num_labels or 0,
        }

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer of one period; the pattern repeats over the stack."""
        return (None,) * (self.window_every - 1) + (self.window,) if self.window else (None,)


def default_ffn_size(width: int, activation: str) -> int:
    """GPT-2's, and for SwiGLU one with as many parameters (Shazeer 2020, section 3)."""
    return _round_up(math.ceil(8 * width / 3), 64) if activation == "swiglu" else 4 * width


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """One store of a mixture: where its text comes from, and its share of the rows."""

    name: str  # of its validation metrics, eval/NAME/loss
    path: tuple[str, ...]  # as DataConfig.path
    exclude: tuple[str, ...] = ()  # as DataConfig.exclude
    valid_path: tuple[str, ...] = ()  # as DataConfig.valid_path
    holdout: Share = 0.1  # as DataConfig.holdout
    weight: NotNegative = 1.0  # rows are shared out in proportion
    # (step, weight) pairs, steps ascending: from that step on the weight is this one
    weights: tuple[tuple[Count, NotNegative], ...] = ()
    max_epochs: Count | None = None  # refuse a run that reads the store more often


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    # files, folders, globs (.gz, .bz2, .zst are opened), URLs (gs://, s3://, https://), tfds:NAME,
    # folders of Hugging Face datasets, or FILE.py:function that yields documents
    path: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()  # globs; files whose path matches one are left out
    valid_path: tuple[str, ...] = ()  # as path, for validation; without it `holdout` decides
    # share kept for validation: whole documents, or the tail of a single one
    holdout: Share = 0.1
    # of files: auto goes by the ending, .json .jsonl .csv .tsv .parquet, and takes all others as
    # text; json is a list of records
    format: Literal["auto", "text", "json", "jsonl", "csv", "tsv", "parquet"] = "auto"
    # of a record that has several fields, such as a line of JSON; a list of strings is lines
    text_field: str = "text"
    # of tfds:NAME, where tfds:NAME@SPLIT does not say, and of a folder that holds several splits of
    # a Hugging Face data set, where FOLDER/SPLIT does not
    tfds_split: str = "train"
    tfds_dir: str | None = None  # where TFDS keeps data sets; None: as TFDS does
    tfds_prepare: bool = False  # download and prepare a data set that is not there
    on_bad_record: Literal["error", "skip"] = "error"  # skip: count and list them; at most 0.1 %
    filter: str | None = None  # FILE.py:function of a document's text; False leaves it out
    deduplicate: bool = False  # leave out documents whose text has been before
    # several stores, read in proportion to their weights; each has a path, exclude, valid_path and
    # holdout of its own. They are given in the experiment's file, not on the command line
    mixture: tuple[MixtureConfig, ...] = ()
    max_epochs: Count | None = None  # refuse a run that reads the text, or a store, more often
    # FIRST LAST FIRST LAST ...: batches that are passed over, both ends included; batch n is what
    # step n would see if none were
    skip: tuple[tuple[Count, Count], ...] = ()
    # bytes: 256 bytes, end of text, padding; or a SentencePiece .model, a tokenizer.json, or a
    # folder with that, vocab.json and merges.txt, or encoder.json and vocab.bpe
    tokenizer: str = "bytes"
    store_dir: str = "stores"  # token stores are built under it, and found again; may be a URL
    workers: Count | None = None  # processes that tokenise; None: as many as there are cores
    shuffle: bool = True  # another order of rows in every epoch; otherwise the order of the text
    prefetch: Whole = 4  # batches made ahead of the step, off the main thread


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Labelled data, and what is to be learnt from it.

    A column is named by the header or the key that the files have, or by its number from 1, or from
    the end by -1; PATH@KEY takes the records of a JSON file from the value of that key.
    """

    # classify: a class for a text or a pair of texts, or several; entities: a tag for each word;
    # questions: answers that are passages of a text; pairs: a text to another, as in translation;
    # dialogue: what the assistant says; choices: the likeliest of some continuations.
    # None: no task, but text as `data` says
    kind: Literal["classify", "entities", "questions", "pairs", "dialogue", "choices"] | None = None
    train: tuple[str, ...] = ()  # files, folders, globs or URLs of labelled examples
    valid: tuple[str, ...] = ()  # as train, for validation
    test: tuple[str, ...] = ()  # as train, looked at once, after the last step
    # of files: auto goes by the ending and else by the task; conll: columns, a word a line, a blank
    # line after a sentence; parallel: two text files in turn, whose lines belong together
    file_format: Literal[
        "auto", "tsv", "csv", "jsonl", "json", "yaml", "parquet", "conll", "parallel"
    ] = "auto"
    # whether the first line of TSV and CSV names the columns; auto: unless numbers are given
    header: Literal["auto", "yes", "no"] = "auto"
    # error: no record may be wrong; skip: those that are wrong are left out; repair: broken tags
    # are read as conlleval does, and answers moved to where they are found nearest; what cannot be
    # repaired is left out. Whatever was wrong is counted and named by line
    on_bad_example: Literal["error", "skip", "repair"] = "error"
    # an example that is longer than model.context_size: window: it becomes several, where the task
    # can put them together again; error, skip: as above
    too_long: Literal["window", "error", "skip"] = "window"
    overlap: Whole = 32  # tokens, words or turns that a window shows again, without counting them

    # column of the text; None: "text"; of entities' words the first; of choices "query"
    text_column: str | None = None
    second_column: str | None = None  # classify: column of a second text
    label_column: str | None = None  # column of the label; None: "label"; of tags the last; "gold"
    labels: tuple[str, ...] = ()  # all there are, in their order; (): those of the training files
    several: bool = False  # classify: a record has any number of labels
    label_separator: str = ","  # between several labels in a cell; a list in JSON needs none
    class_weights: Literal["equal", "balanced"] = "equal"  # balanced: 1 / share of the label
    separator: str = "\n"  # between a text and the second, a question and its text, and repetitions

    scheme: Literal["iob1", "iob2", "bioes", "io"] = "iob2"  # entities: of the files' tags
    # entities: between two words; None: a space, but none beside a script that writes without
    joiner: str | None = None
    # entities: the sentence is shown twice and tagged the second time, so that every word can see
    # all of it though attention looks back only
    repeat: bool = False

    max_answer: Count = 30  # questions: tokens of the longest answer that is looked for
    answers: Literal["squad1", "squad2", "cmrc"] = "squad1"  # questions: what counts as the same

    source_column: str = "source"  # pairs: column of the given text
    target_column: str = "target"  # pairs: column of the text to be written
    bleu_tokens: Literal["13a", "zh", "char", "intl", "none"] = "13a"  # as sacrebleu calls them

    messages_column: str = "messages"  # dialogue: column of the list of messages
    role_key: str | None = "role"  # dialogue: key of who speaks; None: user and assistant in turn
    content_key: str = "content"  # dialogue: key of what is said
    assistant: tuple[str, ...] = ("assistant",)  # dialogue: roles that the model learns to speak
    system: tuple[str, ...] = ("system",)  # dialogue: roles that set the scene; all others: users
    # dialogue: a message as text. What the model writes begins after it, and ends with end-of-text
    turn: str = "{role}:\n{content}"

    choice_columns: tuple[str, ...] = (
        "choices",
    )  # choices: column of their list, or a column for each

    # of prompting, and of pairs in training: how an example is shown, with {columns} in it.
    # None: as the task says
    template: str | None = None
    words: tuple[str, ...] = ()  # of prompting: the word for each of the labels; (): the labels
    # in training, times that every example is seen, instead of `steps`; None: as `steps` says
    epochs: Positive | None = None
    # in training, evaluations without a better figure after which the run ends; None: it goes to
    # its last step. The best step is kept in any case
    patience: Count | None = None
    # of classes: this share of each target is spread over all labels
    label_smoothing: Share = 0.0
    # of classes, entities and questions: the loss of the token that follows is added with this
    # weight, as in GPT-1
    lm_weight: NotNegative = 0.0
    # of prompting: what makes the likeliest choice: the sum of the log-likelihoods of its tokens,
    # their mean, or by byte; or the sum less that of the choice without the example
    score: Literal["sum", "token", "byte", "unconditional"] = "sum"


# The weights of a block that may have an adapter: their part of it, and the letters of what they
# read and of what they write.
LORA_TARGETS = {
    "query": ("attention", "D", "NH"),
    "key": ("attention", "D", "KH"),
    "value": ("attention", "D", "KH"),
    "out": ("attention", "NH", "D"),
    "up": ("ffn", "D", "F"),
    "gate": ("ffn", "D", "F"),
    "down": ("ffn", "F", "D"),
}


@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """Which parameters a run trains; all others stay as they are, and have no optimizer state."""

    # the last so many blocks, and the head; 0: the head alone; None: all parameters
    layers: Whole | None = None
    # the learning rate of a block is that of the next one, or of the head, times this
    layer_decay: Probability = 1.0
    # adapters of this rank are trained instead, and a head of labels (LoRA); None: no adapters
    lora_rank: Count | None = None
    lora_alpha: Positive = 16.0  # what adapters add is multiplied by lora_alpha / lora_rank
    # weights that have an adapter: query, key, value, out, up, gate (of swiglu), down
    lora_targets: tuple[str, ...] = ("query", "value")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW and its learning rate (Loshchilov and Hutter 2019, algorithm 2)."""

    learning_rate: NotNegative = 6e-4  # at its highest
    final_learning_rate: NotNegative | None = None  # after the decay; None: learning_rate / 10
    # form of the decay; constant: learning_rate until decay_steps before the end, then linear
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Whole = 0  # the rate grows from 0 to learning_rate over these steps
    # steps of decay; None: all after the warm-up, for constant a fifth of them
    decay_steps: Whole | None = None
    final_steps: Whole = 0  # steps at final_learning_rate, after the decay
    beta1: Share = 0.9  # of the mean of gradients, a step
    beta2: Share = 0.95  # of the mean of their squares, a step
    epsilon: Positive = 1e-8  # added to the root of that mean
    weight_decay: NotNegative = 0.1  # of matrices and embeddings; not of biases and norm scales
    clip_norm: Positive | None = 1.0  # gradients are scaled down to this global norm; None: never


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many devices lie along each axis of the mesh."""

    # copies of the model, each with rows of its own; None: all devices that the others leave
    data: Count | None = None
    fsdp: Count = 1  # rows as data; parameters and optimizer state split by width
    tensor: Count = 1  # heads, feed-forward and vocabulary split
    context: Count = 1  # positions of a row split
    pipe: Count = 1  # layers split into stages of a pipeline
    # groups of layers that each stage of a pipeline has: more make the time shorter in which a
    # stage has no work, and the traffic between stages larger
    rounds: Count = 1
    # parts of the rows of a device that follow each other through the stages; None: one row each
    microbatches: Count | None = None
    # groups of devices joined by a slower network; None: as the hardware says
    slices: Count | None = None
    across: Literal["data", "fsdp", "pipe"] = "data"  # the axis that crosses that network


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What a run does when its numbers, its storage or one of its processes go wrong."""

    # updates skipped in a row, for a loss or gradient that is not finite, before the run stops
    max_nonfinite: Count = 5
    # seconds that a step may take, with the wait for its data, before the run is taken to be stuck
    # and ends with the stacks of its threads; None: any time
    step_seconds: Positive | None = 600.0
    # the same of a batch of an evaluation, the first of which is compiled
    evaluate_seconds: Positive | None = 1800.0
    start_seconds: Positive | None = 7200.0  # of the start: to compile and to restore
    save_seconds: Positive | None = 1800.0  # of the wait for a checkpoint to be on the disk
    save_retries: Whole = 3  # times that a save is tried again that failed, before the run stops
    save_backoff: NotNegative = 30.0  # seconds before the first retry; each further one doubles it
    # finite updates are skipped too whose loss or norm of the gradient is far above those of the
    # last so many that were taken, after the warm-up; 16 to 128, 0: never
    spike_window: Annotated[int, Range(0, MOST_SPIKE_WINDOW)] = 128
    # far is so many standard deviations over their median: by the median of the distances from it,
    # and never less than a tenth of it. None: however high. In 2,000 steps of each of several small
    # models without a fault, with 1 to 16 rows a step, the most were 4 of the loss, and 41 of the
    # norm, which has rare large values when batches are small
    spike_loss: Positive | None = 20.0
    spike_grad_norm: Positive | None = 200.0
    max_spikes: Count = 5  # skipped in a row; what still comes then is the new normal
    # updates skipped in a row, for either reason, after which the run goes back to the newest
    # checkpoint and passes over their batches; None: never
    rollback_after: Count | None = None
    max_rollbacks: Whole = 3  # of a run; then it stops instead
    # steps between comparisons of all copies of parameters and optimizer state on different
    # devices, which stop the run where a bit differs; every state that is saved is compared too;
    # None: never
    cross_check_every: Count | None = 100


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """What a finished run prints."""

    prompt: str = ""  # empty: the model begins a document
    max_tokens: Whole = 200  # 0: no sample
    temperature: NotNegative = 0.8  # 0: always the likeliest token
    top_k: Count | None = None  # choose among the k likeliest
    top_p: Probability | None = None  # among the likeliest that have this probability together


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run. An experiment file returns one from `config()`."""

    name: str = "gpt"  # the run directory is runs/NAME unless --run-dir says otherwise
    model: GPTConfig = field(default_factory=GPTConfig)
    data: DataConfig = field(default_factory=DataConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    # a run, or a folder of Hugging Face's Transformers, whose parameters a new run begins with;
    # None: random ones. Its model and tokenizer must be those of this run
    init_from: str | None = None
    steps: Count = 1000  # updates of the parameters
    batch_size: Count = 8  # rows of a step, over all devices and accumulated parts
    accumulate: Count = 1  # parts that a batch is computed in, one after the other
    seed: Whole = 0  # of parameters, order of rows and dropout
    log_every: Count = 10  # steps between lines of metrics.jsonl
    eval_every: Count | None = 250  # steps between evaluations; None: only after the last step
    # of an evaluation, of each store of a mixture; None: the whole validation split
    eval_batches: Count | None = None
    save_every: Count | None = 1000  # steps between checkpoints; None: only after the last step
    keep_last: Count = 2  # checkpoints kept: the newest ones
    keep_every: Count | None = None  # and those whose step is a multiple of this
    tensorboard: bool = True  # write TensorBoard event files beside metrics.jsonl


# --- presets -----------------------------------------------------------------------------------

GPT2_VOCAB_SIZE = 50257

# Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2.
GPT2 = {
    name: GPTConfig(
        vocab_size=GPT2_VOCAB_SIZE,
        context_size=1024,
        num_layers=layers,
        width=width,
        num_heads=heads,
    )
    for name, layers, width, heads in [
        ("small", 12, 768, 12),
        ("medium", 24, 1024, 16),
        ("large", 36, 1280, 20),
        ("xl", 48, 1600, 25),
    ]
}

# Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1, context 2,048, dense and
# locally banded layers in turn (section 2.1). Two entries of the table contradict the sizes it
# states: XL's 24 heads of 128 (16 give 2,048 and 1.3B parameters) and 13B's width 5,140 (40 heads
# of 128 give 5,120). The paper does not say how wide the band is; 256 is GPT-Neo's.
GPT3 = {
    name: GPTConfig(
        vocab_size=GPT2_VOCAB_SIZE,
        context_size=2048,
        num_layers=layers,
        width=width,
        num_heads=heads,
        window=256,
        window_every=2,
    )
    for name, layers, width, heads in [
        ("small", 12, 768, 12),
        ("medium", 24, 1024, 16),
        ("large", 24, 1536, 16),
        ("xl", 24, 2048, 16),
        ("2.7b", 32, 2560, 32),
        ("6.7b", 32, 4096, 32),
        ("13b", 40, 5120, 40),
        ("175b", 96, 12288, 96),
    ]
}


# --- checks ------------------------------------------------------------------------------------


def check(config: Config, num_devices: int | None = None) -> None:
    """Refuse a config that cannot run, before anything is allocated.

    Args:
      config: the run.
      num_devices: devices of the whole run; None leaves out the rules that need it.
    Raises:
      ConfigError: with all violations.
    """
    refuse(violations(config, num_devices))


def refuse(problems: list[str]) -> None:
    """Raise one ConfigError that lists all problems, if there are any."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError("\n  - ".join([f"{len(problems)} problems", *problems]))


def violations(config: Config, num_devices: int | None = None) -> list[str]:
    """What is wrong with a config: for each violation what was given, what is allowed, what to do.

    A rule between fields is left out when one of them has no usable value: that is a violation too.
    """
    wrong = field_problems(config, Config)
    unusable = {re.sub(r"(\[\d+\])+$", "", path) for path in wrong}  # a wrong item: the whole tuple
    problems, readable = list(wrong.values()), _readable("", config, unusable)
    for rule in RULES:
        try:
            for problem in rule(readable, num_devices):
                problems.append(problem)  # those before a field that is not there count
        except AttributeError:
            if not wrong:
                raise
    return problems


class Kind(NamedTuple):
    """What a field takes."""

    base: type  # int, float, bool, str, tuple or a dataclass
    choices: tuple[str, ...]  # of a string; () for any
    optional: bool  # None as well
    limits: Range | None
    items: tuple[Any, ...] = ()  # of a tuple: the annotation of each place, or of `many` items
    many: bool = False  # of a tuple: any number of items

    def __str__(self) -> str:
        noun = {
            int: "a whole number",
            float: "a number",
            bool: "True or False",
            str: "a string",
            tuple: f"({', '.join(str(kind_of(item)) for item in self.items)})",
        }.get(self.base, f"a gptjax.{self.base.__name__}")
        if self.many:
            strings = "a tuple of strings, such as ('text.txt',)"
            noun = strings if self.items == (str,) else f"a tuple, each item {noun[1:-1]}"
        if self.choices:
            noun = "one of " + ", ".join(map(repr, self.choices))
        if self.limits:
            noun += f" from {self.limits.least:.12g} to {self.limits.most:.12g}"
        return f"{noun}, or None" if self.optional else noun

    def takes(self, value: Any) -> bool:
        """Whether a field of this kind may have the value; `many` items are not looked at."""
        if value is None:
            return self.optional
        if self.base is tuple:
            if not isinstance(value, tuple) or self.many:
                return isinstance(value, tuple)
            return len(value) == len(self.items) and all(
                kind_of(inner).takes(item) for inner, item in zip(self.items, value, strict=True)
            )
        if isinstance(value, bool) and self.base is not bool:
            return False
        if not isinstance(value, (int, float) if self.base is float else self.base):
            return False
        if self.limits and not self.limits.least <= value <= self.limits.most:  # NaN is not either
            return False
        return not self.choices or value in self.choices


def kind_of(annotation: Any) -> Kind:
    """The kind that a field's annotation stands for."""
    options = [annotation]
    if get_origin(annotation) in (Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not types.NoneType]
    inner, limits = options[0], None
    if get_origin(inner) is Annotated:
        inner, *notes = get_args(inner)
        limits = next((note for note in notes if isinstance(note, Range)), None)
    choices = get_args(inner) if get_origin(inner) is Literal else ()
    base = str if choices else get_origin(inner) or inner
    items = get_args(inner) if base is tuple else ()
    many = items[-1:] == (...,)
    return Kind(base, choices, options != [annotation], limits, items[: 1 if many else None], many)


def field_problems(value: Any, annotation: Any = None, path: str = "") -> dict[str, str]:
    """The violations of each field's kind, by the field's path.

    Args:
      value: a dataclass, or with `annotation` the value of a field of it.
    """
    kind = kind_of(annotation or type(value))
    if not kind.takes(value):
        near = did_you_mean(value, kind.choices)
        return {
            path: f"{path or 'config'} = {reprlib.repr(value)}: must be {kind}{near and '.' + near}"
        }
    problems = {}
    for i, item in enumerate((value or ()) if kind.many else ()):
        problems |= field_problems(item, kind.items[0], f"{path}[{i}]")
    if dataclasses.is_dataclass(kind.base):
        for name, inner in get_type_hints(kind.base, include_extras=True).items():
            below = f"{path}.{name}".lstrip(".")
            problems |= field_problems(getattr(value, name), inner, below)
    return problems


def _readable(path: str, value: Any, wrong: Collection[str]) -> Any:
    """The same fields without those at a wrong path."""
    if isinstance(value, tuple):
        return tuple(_readable(f"{path}[{i}]", item, wrong) for i, item in enumerate(value))
    if not dataclasses.is_dataclass(value):
        return value
    paths = {f.name: f"{path}.{f.name}".lstrip(".") for f in dataclasses.fields(value)}
    return types.SimpleNamespace(
        **{
            name: _readable(below, getattr(value, name), wrong)
            for name, below in paths.items()
            if below not in wrong
        }
    )


# --- rules between fields: each yields its violations ------------------------------------------


def _multiple(name: str, value: int, of: str, divisor: int, otherwise: str = "") -> Iterator[str]:
    if rest := value % divisor:
        near = " or ".join(str(n) for n in (value - rest, value - rest + divisor) if n)
        yield (
            f"{name} = {value} is not a multiple of {of} = {divisor} (remainder {rest}): "
            f"give {name} {near}{otherwise}"
        )


def _name_is_a_folder(config: Config, _: int | None) -> Iterator[str]:
    if config.name in ("", ".", "..") or set(config.name) & set("/\\\0"):
        yield f"name = {config.name!r}: it names a folder: give letters, digits, '-' and '_'"


def _heads(config: Config, _: int | None) -> Iterator[str]:
    model = config.model
    if model.num_kv_heads:
        heads, kv_heads = model.num_heads, model.num_kv_heads
        yield from _multiple("model.num_heads", heads, "model.num_kv_heads", kv_heads)
    if model.head_size is None:
        otherwise = ", or model.head_size"
        yield from _multiple(
            "model.width", model.width, "model.num_heads", model.num_heads, otherwise
        )
    head_size = model.head_size or model.width // model.num_heads
    if model.positions == "rope" and head_size % 2:
        near = " or ".join(str(size) for size in (head_size - 1, head_size + 1) if size)
        yield (
            f"model.head_size = {head_size}: RoPE turns pairs of numbers, so it must be even: "
            f"give model.head_size {near}"
        )


def _rope_scaling(config: Config, _: int | None) -> Iterator[str]:
    model = config.model
    if model.rope_scaling is None:
        return
    if model.positions != "rope":
        yield (
            f"model.rope_scaling is given, but model.positions = {model.positions!r}: give "
            "model.positions rope, or model.rope_scaling None"
        )
    _, low, high, _ = model.rope_scaling
    if low >= high:
        yield (
            f"model.rope_scaling = {model.rope_scaling}: the factor of low frequencies, {low:g}, "
            f"must be below that of high ones, {high:g}, as in 8 1 4 8192"
        )


def _head(config: Config, _: int | None) -> Iterator[str]:
    model, task = config.model, config.task
    labelled = model.head in ("label", "labels")
    if labelled and model.num_labels is None and task.kind is None:
        yield f"model.head = {model.head!r}, but model.num_labels is None: give model.num_labels"
    if not labelled and model.num_labels is not None:
        yield (
            f"model.num_labels = {model.num_labels}, but model.head = {model.head!r}: give "
            "model.head label or labels, or model.num_labels None"
        )
    says_tokens = task.kind in ("pairs", "dialogue", "choices") or (
        model.head == "lm" and task.kind is None
    )
    if model.bidirectional and says_tokens:
        yield (
            "model.bidirectional = True, but the token that follows is to be predicted: give "
            "model.bidirectional False, or a task of kind classify, entities or questions"
        )


def _tune(config: Config, _: int | None) -> Iterator[str]:
    tune = config.tune
    if tune.layers is not None and tune.layers > config.model.num_layers and not config.init_from:
        yield (
            f"tune.layers = {tune.layers}, but model.num_layers = {config.model.num_layers}: give "
            "at most as many"
        )
    if tune.lora_rank is None:
        return
    if tune.layers is not None:
        yield (
            f"tune.layers = {tune.layers} and tune.lora_rank = {tune.lora_rank} exclude each "
            "other: give one of them"
        )
    swiglu = config.model.activation == "swiglu"
    allowed = [name for name in LORA_TARGETS if swiglu or name != "gate"]
    for name in tune.lora_targets:
        if name not in allowed:
            near = did_you_mean(name, allowed)
            yield f"tune.lora_targets: {name!r}: give some of {', '.join(allowed)}.{near}"
    if not tune.lora_targets:
        yield f"tune.lora_targets is empty: give some of {', '.join(allowed)}"


def _windows(config: Config, _: int | None) -> Iterator[str]:
    model = config.model
    if model.window is not None:
        every = model.window_every
        yield from _multiple("model.num_layers", model.num_layers, "model.window_every", every)
    elif model.window_every != 1:
        yield (
            f"model.window_every = {model.window_every}, but model.window is None: give "
            "model.window, or model.window_every 1"
        )


def _learning_rates(config: Config, _: int | None) -> Iterator[str]:
    highest, final = config.optimizer.learning_rate, config.optimizer.final_learning_rate
    if final is not None and final > highest:
        yield (
            f"optimizer.final_learning_rate = {final:g} is above optimizer.learning_rate = "
            f"{highest:g}: give at most that"
        )


def _schedule(config: Config, _: int | None) -> Iterator[str]:
    names = ("warmup_steps", "decay_steps", "final_steps")
    parts = {name: getattr(config.optimizer, name) or 0 for name in names}
    if (total := sum(parts.values())) > config.steps:
        terms = " + ".join(f"{name} {size}" for name, size in parts.items())
        yield (
            f"optimizer: {terms} = {total}, but steps = {config.steps}: "
            f"give fewer of them, or steps {total}"
        )


def _guard(config: Config, _: int | None) -> Iterator[str]:
    guard = config.guard
    if 0 < guard.spike_window < 16:
        yield (
            f"guard.spike_window = {guard.spike_window}: too few to tell what is usual: "
            f"give 16 to {MOST_SPIKE_WINDOW}, or 0 to take every finite update"
        )
    if guard.rollback_after and guard.rollback_after > guard.max_nonfinite:
        yield (
            f"guard.rollback_after = {guard.rollback_after} is more than guard.max_nonfinite = "
            f"{guard.max_nonfinite}, after which the run stops: give at most as many"
        )


def _data(config: Config, _: int | None) -> Iterator[str]:
    data = config.data
    if config.task.kind is not None:
        return
    if not data.path and not data.mixture:
        yield "data.path is empty: give files, folders or globs, as in --data.path text.txt"
    stores = data.mixture or [data]
    if config.eval_every is not None and not any(one.holdout or one.valid_path for one in stores):
        each = "in every store of data.mixture " if data.mixture else ""
        section = "" if data.mixture else "data."
        yield (
            f"{each}{section}holdout = 0 and {section}valid_path is empty, so there is nothing to "
            "evaluate on: give one of them, or eval_every None"
        )


def _task(config: Config, _: int | None) -> Iterator[str]:
    task = config.task
    if task.kind is None:
        for name in ("train", "valid", "test"):
            if given := getattr(task, name):
                yield (
                    f"task.{name} = {reprlib.repr(given)}, but task.kind is None: give "
                    "task.kind, such as --task.kind classify"
                )
        return
    if not task.train:
        yield "task.train is empty: give files of labelled examples, as in --task.train train.tsv"
    if config.eval_every is not None and not task.valid:
        yield (
            "task.valid is empty, so there is nothing to evaluate on: give --task.valid FILE, or "
            "eval_every None"
        )


def _task_evaluation(config: Config, _: int | None) -> Iterator[str]:
    task = config.task
    if task.kind is None:
        return
    if config.eval_batches is not None and task.kind in ("classify", "entities", "questions"):
        yield (
            f"eval_batches = {config.eval_batches}, but the figures of a task are those of all "
            "examples: give eval_batches None, and fewer examples in task.valid"
        )
    if task.patience is not None and config.eval_every is None:
        yield (
            f"task.patience = {task.patience}, but eval_every is None: give eval_every, or "
            "task.patience None"
        )


def _task_losses(config: Config, _: int | None) -> Iterator[str]:
    task, model = config.task, config.model
    if task.label_smoothing and task.kind not in ("classify", "entities"):
        yield (
            f"task.label_smoothing = {task.label_smoothing:g}, but task.kind = {task.kind!r} has "
            "no labels: give 0, or task.kind classify or entities"
        )
    if not task.lm_weight:
        return
    if task.kind not in ("classify", "entities", "questions"):
        yield (
            f"task.lm_weight = {task.lm_weight:g}, but task.kind = {task.kind!r}: give 0, or "
            "task.kind classify, entities or questions"
        )
    if model.bidirectional or not model.tied_embedding:
        yield (
            f"task.lm_weight = {task.lm_weight:g} needs model.bidirectional False and "
            "model.tied_embedding True: give these, or 0"
        )


def _task_texts(config: Config, _: int | None) -> Iterator[str]:
    task = config.task
    if len({*task.labels}) < len(task.labels):
        yield f"task.labels = {reprlib.repr(task.labels)}: a label is given twice: give each once"
    if task.words and len(task.words) != len(task.labels):
        yield (
            f"task.words has {len(task.words)} words, but task.labels {len(task.labels)} labels: "
            "give task.labels, and a word for each of them in the same order"
        )
    role, content = task.turn.find("{role}"), task.turn.find("{content}")
    if content < 0 or role > content or task.turn.count("{content}") > 1:
        yield (
            f"task.turn = {task.turn!r}: give a text with {{role}} before {{content}}, each once"
        )
    if task.file_format == "parallel" and task.kind not in (None, "pairs"):
        yield f"task.file_format = 'parallel', but task.kind = {task.kind!r}: give task.kind pairs"


def _mixture_alone(config: Config, _: int | None) -> Iterator[str]:
    data = config.data
    for name in ("path", "exclude", "valid_path") if data.mixture else ():
        if given := getattr(data, name):
            yield (
                f"data.{name} = {reprlib.repr(given)} and data.mixture exclude each other: give "
                f"the {name} of each store of the mixture, or no mixture"
            )


def _mixture_stores(config: Config, _: int | None) -> Iterator[str]:
    before: dict[str, int] = {}
    for i, store in enumerate(config.data.mixture):
        here = f"data.mixture[{i}]"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", store.name):
            yield (
                f"{here}.name = {store.name!r}: it is a part of the names of metrics: give "
                "letters from A to Z, digits, '-' and '_'"
            )
        elif store.name in before:
            yield (
                f"{here}.name = {store.name!r} is that of data.mixture[{before[store.name]}] too: "
                "give each store another"
            )
        before.setdefault(store.name, i)
        if not store.path:
            yield f"{here}.path is empty: give files, folders or globs, as in ('text.txt',)"


def _mixture_weights(config: Config, _: int | None) -> Iterator[str]:
    stores = config.data.mixture
    for i, store in enumerate(stores):
        for (step, _), (following, _) in itertools.pairwise(store.weights):
            if following <= step:
                yield (
                    f"data.mixture[{i}].weights: step {following} comes after step {step}: give "
                    "the pairs with ascending steps"
                )
                return
    steps = sorted({1}.union(*({step for step, _ in store.weights} for store in stores)))
    weights = {step: [weight_at(store, step) for store in stores] for step in steps}
    for step in steps:
        if stores and not any(weights[step]):
            yield (
                f"data.mixture: at step {step} the weight of every store is 0: give at least one "
                "of them more"
            )
    for i in range(len(stores)):
        for step in steps:
            weight, total = weights[step][i], sum(weights[step])
            if weight and weight / total * BLOCK_ROWS < 1:
                least = (total - weight) / (BLOCK_ROWS - 1) * 1.000001  # as it is rounded below
                yield (
                    f"data.mixture[{i}]: at step {step} its weight {weight:g} of {total:g} is less "
                    f"than one row of {BLOCK_ROWS:,}: give at least {least:.7g}, or 0"
                )
                break


def weight_at(store: MixtureConfig, step: int) -> float:
    """The weight of a store of a mixture at a step, counted from 1."""
    return next(
        (weight for first, weight in reversed(store.weights) if first <= step), store.weight
    )


def _skip(config: Config, _: int | None) -> Iterator[str]:
    before = None
    for i, (first, last) in enumerate(config.data.skip):
        if first > last:
            yield (
                f"data.skip[{i}] = ({first}, {last}): its first batch comes after its last: "
                f"give {last} {first}"
            )
        if before and first <= before[1]:
            yield (
                f"data.skip[{i}] = ({first}, {last}) begins before data.skip[{i - 1}] = {before} "
                "ends: give ascending pairs that have no batch in common"
            )
        before = (first, last)


def _stages(config: Config, _: int | None) -> Iterator[str]:
    model, mesh, tune = config.model, config.mesh, config.tune
    if mesh.pipe == 1:
        for name, otherwise in (("rounds", 1), ("microbatches", None)):
            if (given := getattr(mesh, name)) != otherwise:
                yield (
                    f"mesh.{name} = {given}, but mesh.pipe = 1: give mesh.pipe, or mesh.{name} "
                    f"{otherwise}"
                )
        return
    groups = {"mesh.pipe": mesh.pipe, "mesh.rounds": mesh.rounds}
    if model.window is not None:
        groups["model.window_every"] = model.window_every  # a group has whole periods
    groups = {name: size for name, size in groups.items() if size > 1}
    each, of = math.prod(groups.values()), "mesh.pipe"
    if len(groups) > 1:
        of = " x ".join(f"{name} {size}" for name, size in groups.items())
    otherwise = ""
    for name in [name for name in groups if name.startswith("mesh.")]:
        rest = each // groups[name]
        if model.num_layers > rest and model.num_layers % rest == 0:
            nearest = _nearest_divisors(model.num_layers, rest, groups[name])
            otherwise += f", or {name} {nearest}"
    yield from _multiple("model.num_layers", model.num_layers, of, each, otherwise)
    if tune.layers and tune.lora_rank is None:
        yield from _multiple(
            "tune.layers", tune.layers, "mesh.pipe", mesh.pipe, ", or another mesh.pipe"
        )


def _positions(config: Config, _: int | None) -> Iterator[str]:
    model, mesh = config.model, config.mesh
    size, halves = model.context_size, 2 if model.context_attention == "ring" else 1
    otherwise = f", or mesh.context {_nearest_divisors(size, halves, mesh.context)}"
    if halves == 2 and mesh.context > 1:
        of, least = "2 x mesh.context", 2 * mesh.context
        otherwise += ", or model.context_attention all_gather"
    else:
        of, least = "mesh.context", mesh.context
    problems = [*_multiple("model.context_size", size, of, least, otherwise)]
    if model.split_residual and not problems:
        both = mesh.context * mesh.tensor
        otherwise = ", another mesh.tensor, or model.split_residual False"
        of = f"mesh.context {mesh.context} x mesh.tensor {mesh.tensor}"
        problems += _multiple("model.context_size", size, of, both, otherwise)
    yield from problems


def _nearest_divisors(size: int, halves: int, given: int) -> str:
    """The numbers next to the given one that divide a size, each with so many parts."""
    allowed = [n for n in range(1, size + 1) if size % (n * halves) == 0] or [1]
    below = [n for n in allowed if n <= given][-1:]
    return " or ".join(str(n) for n in below + [n for n in allowed if n > given][:1])


def _split_sizes(config: Config, _: int | None) -> Iterator[str]:
    model, mesh = config.model, config.mesh
    yield from _multiple(
        "model.width", model.width, "mesh.fsdp", mesh.fsdp, ", or another mesh.fsdp"
    )
    sizes = {name: getattr(model, name) for name in ("num_heads", "num_kv_heads", "vocab_multiple")}
    sizes["ffn_size"] = model.ffn_size or default_ffn_size(model.width, model.activation)
    for name, size in sizes.items():
        if size:
            otherwise = ", or another mesh.tensor"
            yield from _multiple(f"model.{name}", size, "mesh.tensor", mesh.tensor, otherwise)


def _devices(config: Config, num_devices: int | None) -> Iterator[str]:
    mesh = config.mesh
    rest = {axis: getattr(mesh, axis) for axis in ("fsdp", "tensor", "context", "pipe")}
    rest_size, data = math.prod(rest.values()), mesh.data
    if num_devices is not None:
        given = rest if data is None else {"data": data} | rest
        used = math.prod(given.values())
        if used != num_devices and (data is not None or num_devices % used):
            product = " x ".join(f"{axis} {size}" for axis, size in given.items())
            divisors = [n for n in range(1, num_devices + 1) if num_devices % n == 0]
            wanted = num_devices if data is not None else f"one of {divisors}"
            yield (
                f"mesh: {product} = {used}, but there are {num_devices} devices: "
                f"give axes whose product is {wanted}"
            )
            return
        data = num_devices // rest_size
    of = f"mesh.data {data or 1} x mesh.fsdp {mesh.fsdp} x accumulate {config.accumulate}"
    rows, otherwise = (data or 1) * mesh.fsdp * config.accumulate, ", or another accumulate"
    if mesh.pipe > 1 and mesh.microbatches and config.batch_size % rows == 0:
        nearest = _nearest_divisors(config.batch_size // rows, 1, mesh.microbatches)
        of += f" x mesh.microbatches {mesh.microbatches}"
        rows, otherwise = rows * mesh.microbatches, f", or mesh.microbatches {nearest}"
    yield from _multiple("batch_size", config.batch_size, of, rows, otherwise)
    across = data if mesh.across == "data" else getattr(mesh, mesh.across)
    if mesh.slices and across:
        name = f"mesh.{mesh.across}"
        yield from _multiple(name, across, "mesh.slices", mesh.slices, ", or another mesh.across")


RULES = (
    _name_is_a_folder,
    _heads,
    _rope_scaling,
    _head,
    _tune,
    _windows,
    _learning_rates,
    _schedule,
    _guard,
    _data,
    _task,
    _task_evaluation,
    _task_losses,
    _task_texts,
    _mixture_alone,
    _mixture_stores,
    _mixture_weights,
    _skip,
    _stages,
    _positions,
    _split_sizes,
    _devices,
)


def did_you_mean(given: object, allowed: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the allowed name nearest to a given one, or nothing."""
    near = difflib.get_close_matches(str(given), list(allowed), n=5)
    near.sort(key=lambda name: _edits(str(given), name))
    return f" Did you mean {near[0]!r}?" if near else ""


def _edits(one: str, other: str) -> int:
    """How many letters to leave out, put in, replace, or swap with the next, turn one into the
    other.
    """
    last: list[int] = []
    row = list(range(len(other) + 1))
    for i, letter in enumerate(one, 1):
        before, last, row = last, row, [i]
        for j, wanted in enumerate(other, 1):
            row.append(min(row[-1] + 1, last[j] + 1, last[j - 1] + (letter != wanted)))
            if i > 1 and j > 1 and (one[i - 2], letter) == (wanted, other[j - 2]):
                row[-1] = min(row[-1], before[j - 2] + 1)
    return row[-1]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


# --- JSON and files ----------------------------------------------------------------------------


def to_json(config: Config) -> str:
    """The config as text; `from_json` reads it back equal."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """A config from its text; a field that is not there has its default.

    Raises:
      ConfigError: for text that is not JSON, unknown names, and values not of their field's kind.
    """
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the config is not JSON: {error}") from None
    refuse(list(_name_problems("", values, Config)))
    config = _from_value(Config, values)
    refuse(list(field_problems(config).values()))
    return config


def _name_problems(path: str, values: Any, dataclass_type: type) -> Iterator[str]:
    """Names that are no fields, and fields without a default that are not there."""
    if not isinstance(values, dict):
        yield f"{path or 'config'} = {reprlib.repr(values)}: must be an object of fields"
        return
    hints = get_type_hints(dataclass_type)
    for name, value in values.items():
        here = f"{path}.{name}".lstrip(".")
        if name not in hints:
            yield f"{here}: there is no such field.{did_you_mean(name, hints)}"
            continue
        kind = kind_of(hints[name])
        if dataclasses.is_dataclass(kind.base):
            yield from _name_problems(here, value, kind.base)
        elif kind.many and dataclasses.is_dataclass(kind.items[0]) and isinstance(value, list):
            for i, item in enumerate(value):
                yield from _name_problems(f"{here}[{i}]", item, kind.items[0])
    for one in dataclasses.fields(dataclass_type):
        required = one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING
        if required and one.name not in values:
            yield f"{path}.{one.name}: it has no default: give it"


def _from_value(annotation: Any, value: Any) -> Any:
    """A value of JSON as its field has it: objects are dataclasses, and lists tuples."""
    kind = kind_of(annotation)
    if isinstance(value, dict) and dataclasses.is_dataclass(kind.base):
        hints = get_type_hints(kind.base)
        return kind.base(**{name: _from_value(hints[name], item) for name, item in value.items()})
    if isinstance(value, list):
        return tuple(_from_value(kind.items[0], item) if kind.many else item for item in value)
    return value


def load_experiment(selector: str) -> Config:
    """The config that an experiment returns.

    Args:
      selector: `FILE.py`, whose function `config` is called, or `FILE.py:function`.
    Raises:
      ConfigError: if there is no such file or function, it fails, or it returns no Config.
    """
    function = load_function(selector, default="config")
    try:
        config = function()
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(selector, error)) from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"{selector}: returned {reprlib.repr(config)}; an experiment returns a gptjax.Config"
        )
    return config


def load_function(selector: str, default: str = "") -> Callable:
    """The function that `FILE.py:function` names; `default` where no function is named.

    Raises:
      ConfigError: if there is no such file or function, or the file fails.
    """
    match = re.fullmatch(r"(.+\.py)(?::(\w*))?", selector)
    if not match:
        raise ConfigError(f"{selector!r} is not an experiment: give FILE.py or FILE.py:function")
    path, name = Path(match[1]), match[2] or default
    if not path.is_file():
        siblings = (str(sibling) for sibling in path.parent.glob("*.py"))
        raise ConfigError(f"{path}: there is no such file.{did_you_mean(path, siblings)}")
    try:
        # Unlike an import, this leaves no __pycache__ beside a file that belongs to the user.
        module = runpy.run_path(str(path), run_name=path.stem)
    except (Exception, SystemExit) as error:
        raise ConfigError(_failure(str(path), error)) from error
    if not callable(module.get(name)):
        own = [
            key
            for key, value in module.items()
            if callable(value) and getattr(value, "__module__", None) == path.stem
        ]
        raise ConfigError(
            f"{path}: there is no function {name!r}; it has {', '.join(own) or 'none'}."
            + did_you_mean(name, own)
        )
    return module[name]


def _failure(selector: str, error: BaseException) -> str:
    """What failed in a file, and at which of its lines."""
    path = re.sub(r":\w*$", "", selector)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, error = [error.lineno], type(error)(error.msg)
    where = f" at line {lines[-1]}" if lines else ""
    return f"{selector}: failed{where} with {type(error).__name__}: {error}"
