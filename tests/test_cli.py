"""The command line as a user meets it: exit codes, last words, and what it leaves behind."""

import errno
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import REPOSITORY

from gptjax import cli, decoding
from gptjax.checkpoint import Checkpoints
from gptjax.config import Config, ConfigError, DataConfig, GPTConfig
from gptjax.rundir import BusyError, CheckpointError, save_run
from gptjax.sources import DataError
from gptjax.step import init_state
from gptjax.stop import Interrupted
from gptjax.tokenizer import ByteTokenizer
from gptjax.train import DivergenceError

# Runs the command line, and says at the end whether JAX was imported.
PROGRAM = """
import sys
from gptjax import cli
try:
    code = cli.main()
finally:
    print("jax" in sys.modules, file=sys.stderr)
sys.exit(code)
"""
EXPERIMENT = """
from gptjax import Config, DataConfig

def config():
    return Config(data=DataConfig(path=("text.txt",)))

def other():
    return {"steps": 3}

def broken():
    return 1 / 0
"""


def without_jax(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command that must not import JAX nor write anything."""
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    assert sorted(folder.rglob("*")) == before
    return done.returncode, done.stdout, done.stderr


def last_words(monkeypatch, capsys, *arguments: str) -> tuple[int, str]:
    """Exit code and stderr of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
    code = cli.main()
    return code, capsys.readouterr().err


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    return tmp_path


def test_the_package_is_the_command():
    said = [
        subprocess.run([*how, "--help"], capture_output=True, text=True, check=True).stdout
        for how in ([sys.executable, "-m", "gptjax"], [Path(sys.executable).with_name("gptjax")])
    ]
    assert said[0] == said[1] != ""


def test_help_without_jax(folder):
    for arguments in (["--help"], ["train", "--help"], ["train", "experiment.py", "--help"]):
        code, out, _ = without_jax(folder, *arguments)
        assert code == 0
        assert "usage: gptjax" in out


def test_refusals_without_jax(folder):
    arguments = "train experiment.py --stepz 3 --model.width 100 --batch-size none".split()
    code, out, err = without_jax(folder, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("gptjax: error[2]: 3 problems\n  - --stepz: there is no such option.")


def test_experiments_without_jax():
    for path in sorted((REPOSITORY / "experiments").glob("*.py")):
        code, _, err = without_jax(REPOSITORY / "experiments", "train", path.name, "--steps", "-1")
        assert code == 2
        assert "steps = -1" in err


@pytest.mark.parametrize(
    ("selector", "source", "words"),
    [
        ("experimint.py", "", "there is no such file. Did you mean 'experiment.py'?"),
        ("experiment", "", "is not an experiment: give FILE.py or FILE.py:function"),
        ("experiment.py:confg", EXPERIMENT, "it has config, other, broken. Did you mean 'config'?"),
        ("experiment.py", "x = 1", "there is no function 'config'; it has none"),
        ("experiment.py:other", EXPERIMENT, "returned {'steps': 3}; an experiment returns a"),
        ("experiment.py:broken", EXPERIMENT, "failed at line 11 with ZeroDivisionError"),
        ("experiment.py", "import json\n\nimport nothing_such", "failed at line 3 with ModuleNot"),
        ("experiment.py", "x = (1", "failed at line 1 with SyntaxError: '(' was never closed"),
        ("experiment.py", "raise SystemExit(3)", "failed at line 1 with SystemExit: 3"),
        ("experiment.py", "from gptjax import Confg", "cannot import name 'Confg'"),
        ("nothing/experiment.py", "", "there is no such file"),
    ],
)
def test_bad_experiments(folder, monkeypatch, capsys, selector, source, words):
    monkeypatch.chdir(folder)
    if source:
        (folder / "experiment.py").write_text(source)
    code, err = last_words(monkeypatch, capsys, "train", selector)
    assert code == 2
    assert err.startswith("gptjax: error[2]: ")
    assert words in err
    assert err.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["experiment.py"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], "'trian' is not a verb: give one of prepare, train, check, plan, generate"),
        (["train"], "FILE is missing: give it first, as in `gptjax train FILE`"),
        (["train", "--steps", "3"], "FILE is missing"),
        (["inspect"], "RUN is missing"),
        (["inspect", "run", "--stp", "3"], "--stp: there is no such option. Did you mean '--step'"),
        (["generate", "run", "--top-p", "1.5"], "top_p = 1.5: must be a number from 1e-30 to 1"),
        (["generate", "run", "--max-token", "3"], "--max-token: there is no such option. Did you"),
        (["prepare"], "FILE is missing: give it first, as in `gptjax prepare FILE`"),
        (["predict", "run", "text", "more"], "'more': one argument too many"),
        (["tokenizer", "trian"], "'tokenizer trian' is not a verb: give one of"),
        (["tokenizer", "train"], "TEXT is missing: give it first, as in `gptjax tokenizer train"),
        (["tokenizer", "train", "a.txt"], "out = None: give the new file, as in --out text.model"),
        (["tokenizer", "train", "a", "--kind", "x"], "kind = 'x': must be one of 'unigram', 'bpe'"),
        (["tokenizer", "inspect"], "TOKENIZER is missing"),
        (["tokenizer", "encode", "byts", "text"], "data.tokenizer: byts: there is no 'byts' in"),
    ],
)
def test_bad_arguments(monkeypatch, capsys, arguments, words):
    code, err = last_words(monkeypatch, capsys, *arguments)
    assert code == 2
    assert err.startswith(f"gptjax: error[2]: {words}")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ConfigError("a"), 2, "a"),
        (DataError("a"), 3, "a"),
        (CheckpointError("a"), 4, "a"),
        (DivergenceError("a"), 5, "a"),
        (BusyError("a"), 7, "a"),
        (Interrupted("a"), 75, "a"),
        (OSError(errno.ENOSPC, "No space", "run"), 6, "No space -- run -- free some space"),
        (PermissionError(errno.EACCES, "Denied", "run"), 6, "Denied -- run -- give a folder that"),
        (FileNotFoundError(errno.ENOENT, "Missing", "run"), 6, "Missing -- run -- check the path"),
        (KeyboardInterrupt(), 130, "by the keyboard"),
    ],
)
def test_what_is_said_of_an_error(error, code, words):
    said = cli.explain(error)
    assert said[0] == code
    assert said[1].startswith(words)


def test_a_bug_is_said_to_be_one(monkeypatch, capsys):
    def fail(target: str, given: cli.Inspect) -> None:
        raise KeyError("x")

    monkeypatch.setitem(cli.VERBS, "inspect", (fail, cli.Inspect))
    code, err = last_words(monkeypatch, capsys, "inspect", "run")
    assert code == 1
    assert err.startswith(f"gptjax: error[1]: KeyError: 'x' -- {__file__}:")
    assert "Traceback" not in err
    assert "Traceback" in last_words(monkeypatch, capsys, "inspect", "run", "--debug")[1]


# --- a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A run that stopped at step 3, with parameters drawn by NumPy: that needs no compilation."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    model = GPTConfig(vocab_size=258, context_size=16, num_layers=2, width=16, num_heads=2)
    config = Config(name="small", model=model, data=DataConfig(path=("text.txt",)))
    shapes = jax.eval_shape(partial(init_state, config), jax.random.key(0))
    draw = np.random.default_rng(0).normal
    state = jax.tree.map(lambda leaf: jnp.asarray(draw(0, 0.1, leaf.shape), leaf.dtype), shapes)
    save_run(folder, config, ByteTokenizer())
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, state)
    return folder


def printed(monkeypatch, capsys, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["gptjax", *map(str, arguments)])
    code = cli.main()
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_inspect(monkeypatch, capsys, run_dir):
    out = printed(monkeypatch, capsys, "inspect", run_dir)
    assert "\nsteps 3\n" in out
    config, _ = json.JSONDecoder().raw_decode(out.partition("\nconfig ")[2])
    assert config["model"]["num_layers"] == 2
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line}
    assert lines["embedding/tokens"][1:] == ["VD", "320", "x", "16", "float32", "20,480"]
    parameters = [line for line in lines.values() if "float32" in line]
    sizes = [int(line[-1].replace(",", "")) for line in parameters]
    total = out.splitlines()[-1].replace(",", "").split()
    assert [int(total[0]) * 4, int(total[-1])] == [sum(sizes)] * 2


def test_generate(monkeypatch, capsys, run_dir):
    arguments = ["generate", run_dir, "--prompt", "naïve", "--max-tokens", "8", "--seed", "1"]
    out = printed(monkeypatch, capsys, *arguments)
    assert out.startswith("naïve")
    assert len(out) > len("naïve\n")
    assert printed(monkeypatch, capsys, *arguments) == out
    two = printed(monkeypatch, capsys, *arguments, "--num-samples", "2")
    assert two.startswith(f"--- sample 1 of 2 ---\n{out}--- sample 2 of 2 ---\nnaïve")
    assert not two.endswith(out)


def test_generate_with_everything(monkeypatch, capsys, run_dir, tmp_path):
    (tmp_path / "prompts.txt").write_text("one\n\ntwo\nthree\n")
    words = ["generate", run_dir, "--prompt-file", tmp_path / "prompts.txt", "--max-tokens", "4"]
    words += ["--batch-size", "2", "--num-samples", "2", "--logprobs", "1", "--top-p", "0.9"]
    out = printed(monkeypatch, capsys, *words, "--no-repeat-ngram", "2", "--min-tokens", "4")
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert titles[0] == "--- prompt 1 of 3, sample 1 of 2 ---"
    assert titles[-1] == "--- prompt 3 of 3, sample 2 of 2 ---"
    assert len(titles) == 6
    assert len([line for line in out.splitlines() if line[:3].strip().startswith("-")]) >= 6 + 24
    beams = ["--prompt", "x", "--beams", "2", "--max-tokens", "4", "--early-stopping", "never"]
    assert "\nscore -" in printed(monkeypatch, capsys, "generate", run_dir, *beams)


def test_generate_reads_prompts_from_standard_input(monkeypatch, capsys, run_dir):
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    words = ["--prompt-file", "-", "--max-tokens", "4", "--stop", "a", "b", "--stop-ids", "7"]
    out = printed(monkeypatch, capsys, "generate", run_dir, *words)
    assert "--- prompt 1 of 2 ---\none" in out and "--- prompt 2 of 2 ---\ntwo" in out


def test_what_is_sampled_does_not_depend_on_how_it_is_asked_for(
    monkeypatch, capsys, run_dir, tmp_path
):
    """By batches of any size, from standard input, with log-probabilities or as it comes."""
    (tmp_path / "prompts.txt").write_bytes("\ufeffone\r\ntwo\nthree\n".encode())
    words = ["--max-tokens", "6", "--num-samples", "2", "--seed", "3"]
    file = ["generate", run_dir, "--prompt-file", tmp_path / "prompts.txt", *words]
    whole = printed(monkeypatch, capsys, *file)
    assert "--- prompt 1 of 3, sample 1 of 2 ---\none" in whole
    for size in ("1", "2"):
        assert printed(monkeypatch, capsys, *file, "--batch-size", size) == whole
    alone = ["generate", run_dir, "--prompt", "one", *words]
    streamed = printed(monkeypatch, capsys, *alone)
    logged = printed(monkeypatch, capsys, *alone, "--logprobs", "0")
    for text in streamed.split("--- sample")[1:]:
        assert text.partition("---\n")[2] in whole
        assert text in logged.replace("--- sample", "")


@pytest.mark.parametrize(
    "words, message",
    [
        (["generate", "RUN", "--prompt", os.fsdecode(b"ab\xff")], "--prompt: not UTF-8 at byte 2"),
        (["predict", "RUN", os.fsdecode(b"\xff")], "TEXT: not UTF-8 at byte 0: give text"),
        (["generate", "RUN", "--prompt-file", "bad"], "--prompt-file bad: not UTF-8, "),
        (["generate", "RUN", "--prompt-file", "none"], "--prompt-file none: holds no prompt"),
    ],
)
def test_prompts_that_are_no_text(monkeypatch, capsys, run_dir, tmp_path, words, message):
    (tmp_path / "bad").write_bytes(b"fine\n\xff\n")
    (tmp_path / "none").write_text("\n\n")
    run = str(Path(run_dir).absolute())
    monkeypatch.chdir(tmp_path)
    code, err = last_words(monkeypatch, capsys, *(run if word == "RUN" else word for word in words))
    assert code == 2 and message in err


def test_generate_says_all_that_is_wrong(monkeypatch, capsys, run_dir):
    words = ["--beams", "2", "--temperature", "1", "--stop-ids", "999", "--prompt", "x"]
    words += ["--prompt-file", "y", "--stride", "16"]
    code, err = last_words(monkeypatch, capsys, "generate", run_dir, *words)
    assert code == 2
    for word in ("beams = 2 with temperature", "stop_ids", "--prompt-file", "stride = 16"):
        assert word in err


def test_a_generation_that_is_interrupted_keeps_what_it_printed(monkeypatch, capsys, run_dir):
    def interrupted(*arguments, **options):
        yield "so far"
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "stream_text", interrupted)
    monkeypatch.setattr(sys, "argv", ["gptjax", "generate", str(run_dir), "--prompt", "x"])
    assert cli.main() == 130
    out, err = capsys.readouterr()
    assert out == "xso far\n" and err.startswith("gptjax: stopped[130]")


def test_predict(monkeypatch, capsys, run_dir):
    out = printed(monkeypatch, capsys, "predict", run_dir, "the", "--top", "300").splitlines()
    shares = [float(line.split()[0]) for line in out]
    assert shares[:-1] == sorted(shares[:-1], reverse=True)
    assert len(out) == 258 + 1  # padding of the vocabulary is no token
    assert sum(shares) == pytest.approx(1, abs=0.02)
    assert any(line.endswith("'e'") for line in out)
    assert any(line.endswith("b'\\xc3'") for line in out)
    assert any(line.endswith("end of text") for line in out)
    assert printed(monkeypatch, capsys, "predict", run_dir)  # what begins a document


@pytest.mark.parametrize("verb", ["generate", "predict", "inspect"])
def test_runs_and_steps_that_are_not_there(monkeypatch, capsys, run_dir, verb):
    for arguments in ([run_dir.parent / "smal"], [run_dir, "--step", 4]):
        code, err = last_words(monkeypatch, capsys, verb, *arguments)
        assert code == 4
        assert err.startswith("gptjax: error[4]: ")
        assert "small" in err or "give one of 3" in err


def test_tokenizer(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for name in ("first.txt", "second.txt"):
        words = draw.choice("the quick brown fox jumps over a lazy dog again".split(), 3000)
        Path(name).write_text(" ".join(words) + "\n")
    arguments = ["first.txt", "second.txt", "--out", "fox.model", "--vocab-size", "290"]
    out = printed(monkeypatch, capsys, "tokenizer", "train", *arguments)
    size = sum(Path(name).stat().st_size for name in arguments[:2]) - 2  # line breaks
    assert f"{size:,} of {size:,} bytes were learnt from" in out
    assert "tokenizer  fox.model: 290 pieces, unigram" in out
    assert out.endswith("next       gptjax train FILE.py --data.tokenizer fox.model\n")
    code, err = last_words(monkeypatch, capsys, "tokenizer", "train", *arguments)
    assert code == 2 and "fox.model: is there already" in err

    out = printed(
        monkeypatch, capsys, "tokenizer", "inspect", "fox.model", "--text", *arguments[:2]
    )
    lines = [line.split(None, 1) for line in out.splitlines()]
    assert [word for word, _ in lines] == "kind ids special fingerprint changes text text".split()
    assert lines[3][1] == hashlib.sha256(Path("fox.model").read_bytes()).hexdigest()
    assert lines[5][1].startswith(f"first.txt: {Path('first.txt').stat().st_size:,} bytes, ")

    # As the messages about text advise.
    lines = [json.dumps({"words": Path(name).read_text()}) for name in arguments[:2]]
    Path("fox.jsonl").write_text("\n".join([*lines, '{"other": 1}']))
    inspect = ["tokenizer", "inspect", "fox.model", "--text", "fox.jsonl"]
    code, err = last_words(monkeypatch, capsys, *inspect)
    assert code == 3 and "give one with --data.text-field" in err
    inspect += ["--data.text-field", "words"]
    code, err = last_words(monkeypatch, capsys, *inspect)
    assert code == 3 and "leave such records out with --data.on-bad-record skip" in err
    out = printed(monkeypatch, capsys, *inspect, "--data.on-bad-record", "skip")
    sizes = [Path(name).stat().st_size for name in arguments[:2]]
    assert f"text         fox.jsonl: {sum(sizes):,} bytes" in out

    out = printed(monkeypatch, capsys, "tokenizer", "encode", "fox.model", "the é\udcff")
    words = [line.split(None, 1)[1] for line in out.splitlines()]
    assert words[-3:] == ["b'\\xc3'", "b'\\xa9'", "b'\\xff'"]


def test_help_of_the_verbs_of_tokenizers(folder):
    for arguments in (["tokenizer", "--help"], ["tokenizer", "train", "--help"]):
        code, out, _ = without_jax(folder, *arguments)
        assert code == 0 and "tokenizer train" in out


# --- training ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_train_then_use(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    (tmp_path / "experiment.py").write_text(EXPERIMENT)
    settings = (
        "--name fox --steps 4 --batch-size 8 --model.width 16 --model.num-heads 2 "
        "--model.num-layers 2 --model.context-size 16 --sample.max-tokens 8 --save-every 2"
    )

    program = "import sys; from gptjax.cli import main; sys.exit(main())"
    for arguments in (["train", "experiment.py", *settings.split()], ["predict", "runs/fox"]):
        command = [sys.executable, "-c", program, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10 + 1  # tokens, and all others
    assert sorted(path.name for path in (tmp_path / "runs" / "fox" / "checkpoints").iterdir()) == [
        "2",
        "4",
    ]
    for verb in ("inspect", "generate"):  # in this process, which takes less time
        assert printed(monkeypatch, capsys, verb, "runs/fox")

    monkeypatch.setattr("gptjax.cli.runs._join_processes", lambda given: None)
    again = ["train", "experiment.py", *settings.split(), "--mesh.data", "4"]
    code, err = last_words(monkeypatch, capsys, *again)
    assert code == 2 and "mesh: data 4 x" in err.splitlines()[-1]
    empty = ["train", "experiment.py", "--data.path", "nothing.txt", "--run-dir", "empty"]
    code, err = last_words(monkeypatch, capsys, *empty)
    assert code == 3 and "nothing.txt" in err.splitlines()[-1]
    assert not (tmp_path / "empty").exists()


# --- prepare -----------------------------------------------------------------------------------

MIXED = """
from gptjax import Config, DataConfig, GPTConfig
from gptjax.config import MixtureConfig

def config():
    data = DataConfig(path=("text.txt",), on_bad_record="skip", store_dir="stores")
    return Config(model=GPTConfig(context_size=8), batch_size=2, data=data)

def mixed():
    first = MixtureConfig(name="a", path=("text.txt",))
    second = MixtureConfig(name="b", path=("lines.jsonl",), holdout=0.0)
    data = DataConfig(mixture=(first, second), deduplicate=True, store_dir="stores")
    return Config(model=GPTConfig(context_size=8), batch_size=2, data=data)
"""


def prepare_without_jax(folder: Path, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "prepare", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == "False", done.stderr
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def mixed(tmp_path):
    (tmp_path / "experiment.py").write_text(MIXED)
    (tmp_path / "text.txt").write_text("0123456789" * 100)
    (tmp_path / "lines.jsonl").write_text('{"text": "a line of text"}\n{"text": "more"}\n' * 3)
    return tmp_path


def test_prepare_builds_once_and_says_what(mixed):
    code, out, _ = prepare_without_jax(mixed, "experiment.py")
    assert code == 0
    lines = out.splitlines()
    assert "documents  1" in lines and "tokens     902" in lines
    assert "bytes      900, 1.000 per token" in lines and "left out   nothing" in lines
    assert lines[-1] == "next       gptjax train experiment.py"
    assert " MB/s" in out
    [folder] = (mixed / "stores").iterdir()
    built = (folder / "train" / "manifest.json").stat().st_mtime_ns
    code, again, _ = prepare_without_jax(mixed, "experiment.py", "--data.workers", "1")
    assert code == 0
    assert "time       built before" in again and again.endswith("py and the same options\n")
    assert (folder / "train" / "manifest.json").stat().st_mtime_ns == built


def test_prepare_builds_every_store_of_a_mixture(mixed):
    program = (
        "from gptjax import cli, load_experiment; name = 'experiment.py:mixed'; "
        "cli.prepare(name, cli.Prepare(config=load_experiment(name)))"
    )
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, cwd=mixed, capture_output=True, text=True, check=True).stdout
    assert out.count("store ") == 3
    assert "left out   duplicate 4" in out


def test_prepare_refuses_what_cannot_be_trained_on(mixed):
    code, _, err = prepare_without_jax(mixed, "experiment.py", "--model.context-size", "500")
    assert code == 3
    assert "valid split: 102 tokens" in err
    assert not (mixed / "stores").exists()


def test_what_follows_beam_is_for_the_pipeline(mixed, monkeypatch):
    seen = []
    monkeypatch.chdir(mixed)
    monkeypatch.setitem(cli.VERBS, "prepare", (lambda *both: seen.append(both), cli.Prepare))
    cli.run_verb(
        ["prepare", "experiment.py", "--steps", "3", "--beam", "--runner=X", "--steps", "4"]
    )
    [(experiment, given)] = seen
    assert (experiment, given.config.steps) == ("experiment.py", 3)
    assert given.beam == ("--runner=X", "--steps", "4")


def test_a_signal_stops_prepare_and_the_next_goes_on(mixed):
    slow = "import time\ndef keep(text):\n    open('called', 'w')\n    time.sleep(100)\n"
    (mixed / "mine.py").write_text(slow)
    command = [sys.executable, "-c", PROGRAM, "prepare", "experiment.py"]
    for name in (signal.SIGTERM, signal.SIGINT):
        given = [*command, "--data.filter", "mine.py:keep"]
        running = subprocess.Popen(given, cwd=mixed, stderr=subprocess.PIPE, text=True)
        while not (mixed / "called").exists():
            time.sleep(0.01)
        (mixed / "called").unlink()
        running.send_signal(name)
        words = running.communicate(timeout=5)[1]
        assert "gptjax: stopped[75]: the same command goes on" in words
        assert running.returncode == 75
