"""A run that an earlier version saved (format gptjax-2, commit 4123ccd) is read, and goes on.

golden/run was made by `gptjax train run.py --run-dir run` in golden/, without its events. A change
of the format keeps this folder, says how such runs are read, and adds another one.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
from launch import finish, start

import gptjax
from gptjax.checkpoint import Checkpoints
from gptjax.config import MeshConfig
from gptjax.rundir import read_run
from gptjax.sharding import make_mesh
from gptjax.step import abstract_state

GOLDEN = Path(__file__).parent / "golden"
DIGEST = "f2ef341e7f91d702df1bc5ffc5a3097c722b34d03399742f3a45a0996852b1a7"


def test_every_bit_of_an_old_state_is_read():
    config, _ = read_run(GOLDEN / "run")
    like = abstract_state(config, make_mesh(MeshConfig(), jax.devices()[:1]))
    state = jax.device_get(Checkpoints(GOLDEN / "run").restore(like))
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(state):
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {np.shape(leaf)}".encode())
        digest.update(np.asarray(leaf).tobytes())
    assert int(state.step) == 4
    assert digest.hexdigest() == DIGEST


def test_an_old_run_goes_on_and_writes(tmp_path):
    folder = shutil.copytree(GOLDEN, tmp_path / "golden")
    said = finish(start(folder, "run", "--steps", "6", "--allow-config-change"))
    assert "resumed    from step 4" in said
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").open()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    config, params, tokenizer = gptjax.load(folder / "run")
    sampling = gptjax.Sampling(max_tokens=4, temperature=0.0)
    (new,) = gptjax.generate(
        params, [tokenizer.encode("to be")], config, sampling, jax.random.key(0), end=None
    )
    assert len(new) == 4
