"""Every knob of a run: frozen dataclasses, and presets.

`None` means absent, 0 means zero. The comment of a field is its help on the command line.
"""

import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

from gptjax.config.kinds import (
    ConfigError,
    Count,
    NotNegative,
    Positive,
    Probability,
    Range,
    Share,
    Whole,
)

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
    # layernorm takes the mean away and divides by the deviation, rmsnorm divides by the root of the
    # mean square alone, as in Llama
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
    # what the class of a text is read off. last: its last token, as in GPT; mean: the mean of what
    # the head says of its tokens, for task.kind classify
    pool: Literal["last", "mean"] = "last"
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
            "V": round_up(self.vocab_size, self.vocab_multiple),
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
    return round_up(math.ceil(8 * width / 3), 64) if activation == "swiglu" else 4 * width


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """One store of a mixture: where its text comes from, and its share of the rows."""

    name: str  # of its validation metrics, eval/NAME/loss
    path: tuple[str, ...]  # as DataConfig.path
    exclude: tuple[str, ...] = ()  # as DataConfig.exclude
    valid_path: tuple[str, ...] = ()  # as DataConfig.valid_path
    holdout: Share = 0.1  # as DataConfig.holdout
    weight: NotNegative = 1.0  # rows are shared out in proportion
    # (step, weight) pairs, steps ascending: from that step on the weight is this one. Batches that
    # are passed over count, so that it comes as many steps earlier
    weights: tuple[tuple[Count, NotNegative], ...] = ()
    max_epochs: Count | None = None  # refuse a run that reads the store more often


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes rows."""

    # files, folders, globs (.gz, .bz2, .xz, .zst are opened), URLs (gs://, s3://, https://),
    # tfds:NAME, folders of Hugging Face datasets, or FILE.py:function that yields documents
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
    # line after a sentence; parallel: two text files in turn, whose lines belong together; folders:
    # each file is a text, whose label is the name of the folder that it lies in, as auto has it for
    # classes in folders below a given one, unless columns are given
    file_format: Literal[
        "auto", "tsv", "csv", "jsonl", "json", "yaml", "parquet", "conll", "parallel", "folders"
    ] = "auto"
    # whether the first line of TSV and CSV names the columns; auto: unless numbers are given
    header: Literal["auto", "yes", "no"] = "auto"
    # of TSV and CSV: what is between columns; cells may have quotes then. None: a comma, and in TSV
    # a tab, where a quote is a character like any other
    delimiter: str | None = None
    # error: no record may be wrong; skip: those that are wrong are left out; repair: broken tags
    # are read as conlleval does, and answers moved to where they are found nearest; what cannot be
    # repaired is left out. Whatever was wrong is counted and named by line
    on_bad_example: Literal["error", "skip", "repair"] = "error"
    # an example that is longer than model.context_size: window: it becomes several, where the task
    # can put them together again; error, skip: as above
    too_long: Literal["window", "error", "skip"] = "window"
    overlap: Whole = 32  # tokens, words or turns that a window shows again, without counting them

    # column of the text; None: "text"; of entities' words the first, or "words" of JSON and
    # Parquet; of choices "query". A column within another is a.b, as in translation.en
    text_column: str | None = None
    second_column: str | None = None  # classify: column of a second text
    # column of the label; None: "label"; of entities' tags the last, or "tags" of JSON and Parquet;
    # of choices "gold"
    label_column: str | None = None
    # classify, with `several`: a column for each label, which says 0 or 1, or false or true
    label_columns: tuple[str, ...] = ()
    # all there are, in their order; where none of them is a number, a number is a place among them.
    # (): those of the training files
    labels: tuple[str, ...] = ()
    first_label: Whole = 0  # of classes and entities: the number of the first of `labels`
    # classify: a record has any number of labels; a list of as many 0 and 1 as there are labels
    # says of each whether it has that
    several: bool = False
    label_separator: str = ","  # between several labels in a cell; a list in JSON needs none
    class_weights: Literal["equal", "balanced"] = "equal"  # balanced: 1 / share of the label
    # of classes, entities and questions: an example is shown with the token that begins a text
    # before it, and end-of-text after it, but for entities. False: bare, as Transformers shows it
    delimit: bool = True
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
    # as sacrebleu calls them; auto: by the script that the right texts are written in
    bleu_tokens: Literal["auto", "13a", "zh", "char", "intl", "none"] = "auto"

    messages_column: str = "messages"  # dialogue: column of the list of messages
    role_key: str | None = "role"  # dialogue: key of who speaks; None: user and assistant in turn
    content_key: str = "content"  # dialogue: key of what is said
    assistant: tuple[str, ...] = ("assistant",)  # dialogue: roles that the model learns to speak
    system: tuple[str, ...] = ("system",)  # dialogue: roles that set the scene; all others: users
    # dialogue: a message as text. What the model writes begins after it, and ends with end-of-text
    turn: str = "{role}:\n{content}"

    # choices: column of their list, or a column for each
    choice_columns: tuple[str, ...] = ("choices",)
    first_choice: Whole = 0  # choices: what the first is called where a number says which is right

    # of prompting, and of pairs in training: how an example is shown, with {columns} in it.
    # None: as the task says
    template: str | None = None
    words: tuple[str, ...] = ()  # of prompting: the word for each of the labels; (): the labels
    # in training, times that every example is seen, instead of `steps`; None: as `steps` says
    epochs: Positive | None = None
    # in training, evaluations without a better figure after which the run ends; None: it goes to
    # its last step. The best step is kept in any case
    patience: Count | None = None
    # of pairs, dialogue and choices: examples of a split, the first, for which the best step writes
    # a text, or chooses one, at the end of training: for the figures and the report
    written: Whole = 100
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
    # a run, or a folder of Hugging Face's Transformers or of PEFT's adapters, whose parameters a
    # new run begins with; None: random ones. Its model and tokenizer must be those of this run
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


def weight_at(store: MixtureConfig, step: int) -> float:
    """The weight of a store of a mixture at a step, counted from 1."""
    return next(
        (weight for first, weight in reversed(store.weights) if first <= step), store.weight
    )


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
