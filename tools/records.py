"""The record of fine-tuning: what a pretrained run makes of labelled sets, and what else would.

    python tools/records.py runs/general ../shared/data --out records.jsonl
    python tools/records.py runs/general ../shared/data --only sib200-en wnut17 --quick

Looks in the folders for the sets that SETS names, or a file of --sets, and learns each in several
ways with several seeds: from random parameters, from the pretrained ones, and by adapters of low
rank (LoRA). Classes are read off the mean of a text's tokens, and also off its last one. Entities
have attention to both sides, and also to what came before alone, and the sentence shown twice;
questions the other way round. All have the model and the tokenizer of the run. Beside them stands
what `tools/baselines.py` makes of the set without a language model.

Each result is a line of --out as soon as it is there, and what has a line is not done again. At the
end comes a table: the median over the seeds, and the least and the most.
"""

import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from gptjax.best import best_by
from gptjax.config import Config, ConfigError, OptimizerConfig, TaskConfig, TuneConfig, to_json
from gptjax.outcome import final_figures

MAIN = "import sys; from gptjax.cli import main; sys.exit(main())"
# A run's file, beside which its config lies.
EXPERIMENT = """
from pathlib import Path
from gptjax.config import from_json

def config():
    return from_json(Path(__file__).with_name("given.json").read_text())
"""

# Where the files of each set lie below its folder, and how they are read.
SETS: dict[str, dict[str, Any]] = {
    "movie-sentiment": {
        "kind": "classify",
        "train": ["movie-sentiment/train.tsv"],
        "valid": ["movie-sentiment/dev.tsv"],
        "epochs": 3.0,
    },
    "clinc150": {
        "kind": "classify",
        "train": [
            "clinc150/data_full_train_val.json.gz@train",
            "clinc150/data_full_train_val.json.gz@oos_train",
        ],
        "valid": [
            "clinc150/data_full_train_val.json.gz@val",
            "clinc150/data_full_train_val.json.gz@oos_val",
        ],
        "text_column": "1",
        "label_column": "2",
    },
    "poem-sentiment": {
        "kind": "classify",
        "train": ["poem-sentiment/train.tsv"],
        "valid": ["poem-sentiment/dev.tsv"],
        "text_column": "2",
        "label_column": "3",
        "epochs": 10.0,
    },
    "med-nli": {
        "kind": "classify",
        "train": ["med-nli/train.tsv"],
        "valid": ["med-nli/dev.tsv"],
        "text_column": "sentence1",
        "second_column": "sentence2",
        "label_column": "gold_label",
    },
    "wnut17": {
        "kind": "entities",
        "train": ["wnut17/wnut17train.conll"],
        "valid": ["wnut17/emerging.dev.conll"],
    },
    "broad-twitter": {
        "kind": "entities",
        "train": [f"broad-twitter/{letter}.conll" for letter in "abeg"],
        "valid": ["broad-twitter/f.conll"],
    },
    "uner-zh": {
        "kind": "entities",
        "train": ["uner-zh/zh_gsdsimp-ud-train.iob2.gz"],
        "valid": ["uner-zh/zh_gsdsimp-ud-dev.iob2"],
        "text_column": "2",
        "label_column": "3",
    },
    "squad": {
        "kind": "questions",
        "train": ["squad/train-v1.1-subset.json.gz"],
        "valid": ["squad/dev-v1.1-subset.json.gz"],
    },
    "cmrc2018": {
        "kind": "questions",
        "train": ["cmrc2018/cmrc2018_dev.json.gz"],
        "valid": ["cmrc2018/cmrc2018_trial.json.gz"],
        "answers": "cmrc",
    },
}
SETS |= {
    f"sib200-{short}": {
        "kind": "classify",
        "train": [f"sib200/{folder}/train.tsv"],
        "valid": [f"sib200/{folder}/dev.tsv"],
        "label_column": "category",
        "epochs": 10.0,
    }
    for short, folder in (("en", "eng_Latn"), ("zh", "zho_Hans"), ("de", "deu_Latn"))
}
SETS |= {
    f"tatoeba-{pair}": {
        "kind": "pairs",
        "train": [f"tatoeba-{pair}/train.txt.gz"],
        "valid": [f"tatoeba-{pair}/valid.txt"],
        "source_column": "2",
        "target_column": "1",
        "epochs": epochs,
    }
    for pair, epochs in (("deu-eng", 3.0), ("cmn-eng", 6.0))
}
EPOCHS = {"classify": 5.0, "entities": 3.0, "questions": 3.0, "pairs": 3.0}
BATCH_SIZE = {"questions": 16}
# Learning rates: of all parameters, and of adapters.
RATES = {"lora": 2e-3}
USUAL_RATE = 1e-3
EVALUATIONS = 10  # of a run, of which the best step is kept


@dataclass(frozen=True)
class Options:
    """What is measured, and where it is written."""

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]  # the pretrained one
    folders: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FOLDER ...")]
    out: str = "records.jsonl"  # a line for each result
    work: str = "records"  # where the runs are; each goes when it is measured, unless --keep
    sets: str | None = None  # JSON of more sets, or others of the same name: as SETS, by name
    only: tuple[str, ...] = ()  # names of sets; (): all that are found
    # scratch, pretrained, lora, last, causal, repeated, both; (): all that suit
    ways: tuple[str, ...] = ()
    seeds: int = 3
    # rows of the run's context, with several examples in each; None: 4, but of questions 16, for a
    # row holds but one
    batch_size: int | None = None
    lora_rank: int = 8
    texts: int = 300  # validation texts that are translated
    quick: bool = False  # 20 steps, one seed, few texts: to see that it works
    keep: bool = False
    # options of every run, as in optimizer.beta2 0.99
    more: dict[str, str] = field(default_factory=dict)


def main() -> int:
    options = tyro.cli(Options, description=__doc__)
    try:
        tasks = find(options)
    except (ConfigError, OSError, ValueError) as error:
        print(f"records: error: {error}", file=sys.stderr)
        return 2
    failed = 0
    for name, task, way, seed in todo(options, tasks):
        began = time.perf_counter()
        try:
            line = baseline(task) if way == "baseline" else learn(options, name, task, way, seed)
        except subprocess.CalledProcessError as error:
            failed += 1
            print(f"{name}, {way}, seed {seed}: {error.stderr[-2000:]}", file=sys.stderr)
            continue
        line = key_of(options, name, way, seed) | line
        line["seconds"] = round(time.perf_counter() - began, 1)
        append(Path(options.out), line)
        print(f"{name:16} {way:10} seed {seed}: {line['name']} {line['figure']:.4f}", flush=True)
    print(table(options, tasks))
    return 1 if failed else 0


# --- what there is to do -------------------------------------------------------------------------


def find(options: Options) -> dict[str, TaskConfig]:
    """The sets that the folders hold.

    Raises:
      ConfigError: if one that is asked for is not there, or none is.
    """
    known = dict(SETS)
    if options.sets:
        known |= json.loads(Path(options.sets).read_text(encoding="utf-8"))
    found = {}
    for name, fields in known.items():
        for folder in map(Path, options.folders):
            paths = [*fields["train"], *fields["valid"]]
            if all(any(folder.glob(path.partition("@")[0])) for path in paths):
                found[name] = task_of(fields, folder)
    lost = [name for name in options.only if name not in found]
    if lost or not found:
        raise ConfigError(
            f"{', '.join(lost) or 'no set'}: not in {' '.join(options.folders)}: give folders with "
            f"the files of some of {', '.join(known)}"
        )
    return {name: task for name, task in found.items() if name in (options.only or found)}


def task_of(fields: dict[str, Any], folder: Path) -> TaskConfig:
    paths = {
        split: tuple(str(folder / path) for path in fields[split]) for split in ("train", "valid")
    }
    lists = {name: tuple(one) for name, one in fields.items() if isinstance(one, list)}
    task = {"on_bad_example": "skip", "epochs": EPOCHS.get(fields["kind"], 3.0)}
    return TaskConfig(**task | fields | lists | paths)


def ways_of(task: TaskConfig) -> list[str]:
    more = {"classify": ["last"], "entities": ["causal", "repeated"], "questions": ["both"]}
    return ["scratch", "pretrained", "lora", *more.get(task.kind, [])]


def key_of(options: Options, name: str, way: str, seed: int) -> dict[str, Any]:
    """By which a result is known again."""
    run = None if way == "baseline" else str(Path(options.run).absolute())
    key = {"set": name, "way": way, "seed": seed, "run": run, "quick": options.quick}
    settings = ("batch_size", "lora_rank", "texts", "more") if run else ()
    given = {name: getattr(options, name) for name in settings}
    plain = Options(run="", folders=())
    return key | {"given": {n: x for n, x in given.items() if x != getattr(plain, n)}}


def todo(
    options: Options, tasks: dict[str, TaskConfig]
) -> Iterator[tuple[str, TaskConfig, str, int]]:
    """What has no line yet."""
    for name, task in tasks.items():
        ways = ["baseline", *(way for way in ways_of(task) if way in (options.ways or [way]))]
        for way in ways:
            one = way == "baseline" or options.quick
            for seed in range(1 if one else options.seeds):
                key = key_of(options, name, way, seed)
                if not any(key.items() <= line.items() for line in lines_of(options)):
                    yield name, task, way, seed


def lines_of(options: Options) -> list[dict[str, Any]]:
    """The results that there are, but for one that was being written when the tool was killed."""
    path, found = Path(options.out), []
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        with suppress(ValueError):
            found.append({"given": {}} | json.loads(line))
    return found


def append(path: Path, line: dict[str, Any]) -> None:
    content = path.read_bytes() if path.exists() else b"\n"
    with path.open("a", encoding="utf-8") as file:
        file.write("" if content.endswith(b"\n") else "\n")
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


# --- one result ----------------------------------------------------------------------------------


def python(*arguments: object) -> str:
    """What a program prints."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return done.stdout


def baseline(task: TaskConfig) -> dict[str, Any]:
    """Of `tools/baselines.py`."""
    given, plain = [], TaskConfig()
    for one in dataclasses.fields(task):
        value = getattr(task, one.name)
        if value != getattr(plain, one.name):
            texts = value if isinstance(value, tuple) else (value,)
            given += [f"--{one.name.replace('_', '-')}", *map(str, texts)]
    said = json.loads(python(Path(__file__).with_name("baselines.py"), *given))
    figures = {name: value for name, value in said.items() if isinstance(value, float)}
    name = figure_of(task)
    return {"name": name, "figure": figures[name], "figures": figures}


def figure_of(task: TaskConfig) -> str:
    """What a set is judged by."""
    return "bleu" if task.kind == "pairs" else best_by(Config(task=task))[0].removeprefix("eval/")


def config_of(options: Options, task: TaskConfig, way: str, seed: int) -> Config:
    from gptjax.loading import take_over

    rate = RATES.get(way, USUAL_RATE)
    config = Config(
        name=f"{way}-{seed}",
        task=replace(task, repeat=way == "repeated", written=0),
        tune=TuneConfig(lora_rank=options.lora_rank if way == "lora" else None),
        optimizer=OptimizerConfig(learning_rate=rate, weight_decay=0.01),
        init_from=options.run,
        batch_size=options.batch_size or BATCH_SIZE.get(task.kind, 4),
        seed=seed,
        save_every=None,
        keep_last=1,
        tensorboard=False,
    )
    if way == "lora":
        targets = ("query", "key", "value", "out", "up", "down")
        config = replace(config, tune=replace(config.tune, lora_targets=targets))
    config = take_over(config, Path(options.run))
    both = way == "both" or (task.kind == "entities" and way in ("scratch", "pretrained", "lora"))
    mean = task.kind == "classify" and way != "last"
    model = replace(config.model, dropout=0.1, bidirectional=both, pool="mean" if mean else "last")
    config = replace(config, model=model)
    if way == "scratch":
        config = replace(config, init_from=None)
    if options.quick:
        config = replace(config, steps=20, task=replace(config.task, epochs=None))
    return config


def with_evaluations(config: Config) -> Config:
    """Evaluated so often while it learns, however many steps its epochs are."""
    from gptjax.labelled import load_labelled
    from gptjax.tokenizer import make_tokenizer

    steps = load_labelled(config, make_tokenizer(config.data))[0].steps
    warm = replace(config.optimizer, warmup_steps=steps // 10)
    return replace(config, eval_every=max(steps // EVALUATIONS, 1), optimizer=warm)


def learn(options: Options, name: str, task: TaskConfig, way: str, seed: int) -> dict[str, Any]:
    """Of a run."""
    place = Path(options.work, name, f"{way}-{seed}").absolute()
    place.mkdir(parents=True, exist_ok=True)
    config = with_evaluations(config_of(options, task, way, seed))
    (place / "given.json").write_text(to_json(config))
    (place / "experiment.py").write_text(EXPERIMENT)
    more = [part for pair in options.more.items() for part in (f"--{pair[0]}", *pair[1].split())]
    run = place / "run"
    python("-c", MAIN, "train", place / "experiment.py", "--run-dir", run, *more)
    step, found = final_figures(run, config)
    figures = found["valid"]
    if task.kind == "pairs":
        count = 20 if options.quick else options.texts
        said = python("-c", MAIN, "evaluate", run, "--limit", count, "--batch-size", 32)
        for line in said.splitlines():
            words = line.split()
            if len(words) >= 2 and words[0] in ("bleu", "chrf", "exact"):
                figures[words[0]] = float(words[1])
    if not options.keep:
        shutil.rmtree(place)
    chosen = figure_of(task)
    return {"name": chosen, "figure": figures[chosen], "figures": figures, "step": step}


# --- the table -----------------------------------------------------------------------------------


def table(options: Options, tasks: dict[str, TaskConfig]) -> str:
    """What there is of these sets: a row for each, the median over the seeds, least and most."""
    lines, ways = lines_of(options), ["baseline", "scratch", "pretrained", "lora"]
    ways += ["last", "causal", "repeated", "both"]
    rows = [["set", "figure", *ways]]
    for name, task in tasks.items():
        row = [name, figure_of(task)]
        for way in ways:
            key = {one: x for one, x in key_of(options, name, way, 0).items() if one != "seed"}
            values = [line["figure"] for line in lines if key.items() <= line.items()]
            cell = f"{statistics.median(values):.4f}" if values else ""
            if len(values) > 1:
                cell += f" ({min(values):.4f} to {max(values):.4f})"
            row.append(cell)
        rows.append(row)
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


if __name__ == "__main__":
    sys.exit(main())
