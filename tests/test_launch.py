"""Launchers: the templates of tools/launch, and runs under Open MPI."""

import os
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import REPOSITORY
from launch import MAIN, figures, finish, make_folder, start

from gptjax.cli.runs import _launched
from gptjax.errors import EXIT_CODES, NO_ERRORS
from gptjax.events import read_events

LAUNCH = REPOSITORY / "tools" / "launch"
# Of ends that would come again, and of those after which the same command goes on.
FINAL = sorted({code for code in EXIT_CODES.values() if 2 <= code <= 7})
PASSING = [42, 43, 44, 75, 137]


def write_program(folder, name, *lines):
    """A program of bash in a folder that is searched first."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text("\n".join(["#!/bin/bash", *lines, ""]))
    (folder / name).chmod(0o755)


def run_template(folder, name, *arguments, **environment):
    """A template with the programs of a folder, which stand for those of a cluster."""
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [LAUNCH / name, *arguments],
        cwd=folder,
        env=os.environ | {"PATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )


# --- the templates -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_templates_are_programs(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / name, os.X_OK)


def test_codes_of_templates_are_those_of_errors():
    assert FINAL == [2, 3, 4, 5, 6, 7]
    assert all(code > 7 for code in NO_ERRORS if code)


@pytest.mark.parametrize("code", [0, 1, *FINAL, *PASSING])
def test_a_slurm_job_is_requeued_if_the_same_command_goes_on(tmp_path, code):
    write_program(tmp_path / "bin", "srun", 'echo "srun $*"', f"exit {code}")
    write_program(tmp_path / "bin", "scontrol", 'echo "scontrol $*"')
    write_program(tmp_path / "bin", "sleep")
    ended = run_template(tmp_path, "slurm.sh", "run.py", "--steps", "5 6", SLURM_JOB_ID="17")
    assert ended.returncode == code
    assert "gptjax train run.py --steps 5 6\n" in ended.stdout
    assert ("scontrol requeue 17" in ended.stdout) == (code in PASSING)


@pytest.mark.parametrize("code", [0, 1, *FINAL, *PASSING])
def test_mpirun_is_started_again_if_something_was_lost(tmp_path, code):
    again = ["echo started $*", "[ -e begun ] && exit 0", "touch begun", f"exit {code}"]
    write_program(tmp_path / "bin", "mpirun", *again)
    write_program(tmp_path / "bin", "sleep")
    ended = run_template(tmp_path, "mpirun.sh", "run.py", NP="2", HOSTS="a:1,b:1")
    lost = code in PASSING and code != 75  # which is what a person asked for
    assert ended.returncode == (0 if lost else code)
    assert ended.stdout.count("started -n 2 --host a:1,b:1 ") == (2 if lost else 1)


@pytest.mark.parametrize("moment", ["while it runs", "between two attempts"])
def test_mpirun_is_not_started_again_after_a_signal(tmp_path, moment):
    stop = "kill -TERM $PPID"
    lost = ["echo started", "exit 43"]
    if moment == "while it runs":
        lost.insert(1, f"{stop}; sleep 9")
    write_program(tmp_path / "bin", "mpirun", *lost)
    write_program(tmp_path / "bin", "sleep", *([stop] if moment == "between two attempts" else []))
    ended = run_template(tmp_path, "mpirun.sh", "run.py", NP="2")
    assert ended.returncode == 75 and ended.stdout.count("started") == 1


@pytest.mark.parametrize("code", [0, *FINAL, 43, 75, 137])
def test_hosts_of_a_tpu_start_again_if_the_same_command_goes_on(tmp_path, code):
    again = ['echo "started $# $*"', "[ -e begun ] && exit 0", "touch begun", f"exit {code}"]
    write_program(tmp_path / "bin", "gptjax", *again)
    write_program(tmp_path / "bin", "sleep")
    write_program(tmp_path / "bin", "gcloud", 'bash -c "${@: -1}"')  # what a host would run
    ended = run_template(tmp_path, "tpu_vm.sh", "pod", "here", "run.py", "--name", "a 'b' $HOME")
    lost = code in (43, 137)
    assert ended.returncode == (0 if lost else code), ended.stdout
    started = ended.stdout.count("started 4 train run.py --name a 'b' $HOME\n")
    assert started == (2 if lost else 1)


def test_hosts_of_a_tpu_do_not_start_again_for_ever(tmp_path):
    write_program(tmp_path / "bin", "gptjax", "echo started", "exit 43")
    write_program(tmp_path / "bin", "sleep")
    write_program(tmp_path / "bin", "gcloud", 'bash -c "${@: -1}"')
    ended = run_template(tmp_path, "tpu_vm.sh", "pod", "here", "run.py")
    assert ended.returncode == 43 and ended.stdout.count("started") == 100


def test_the_jobset_has_what_jax_asks_the_cluster_for():
    account, role, binding, jobset = yaml.safe_load_all((LAUNCH / "jobset.yaml").read_text())
    (job,) = (part["template"]["spec"] for part in jobset["spec"]["replicatedJobs"])
    pod = job["template"]["spec"]
    assert jobset["kind"] == "JobSet" and jobset["spec"]["network"]["enableDNSHostnames"]
    assert job["completionMode"] == "Indexed" and job["completions"] == job["parallelism"]
    allowed = {kind for rule in role["rules"] for kind in rule["resources"]}
    assert {"pods", "services", "jobs"} <= allowed
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert [who["name"] for who in binding["subjects"]] == [pod["serviceAccountName"]]
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    # One that fails ends its job, the JobSet starts all of them anew, but not for every code.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == FINAL
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


# --- launchers that JAX does not see -------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "1"}, ""),
        ({"SLURM_NTASKS": "4"}, "SLURM_NTASKS = 4"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE = 2"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "jax[k8s]"),
    ],
)
def test_what_launchers_say(environment, words):
    what = _launched(environment)
    assert words in what and bool(words) == bool(what)


def test_one_of_several_does_not_train_alone(tmp_path, monkeypatch):
    make_folder(tmp_path)
    monkeypatch.setenv("PMI_SIZE", "2")
    last = finish(start(tmp_path, "alone"), 2).splitlines()[-1]
    assert last.startswith("gptjax: error[2]: PMI_SIZE = 2") and "--coordinator" in last
    assert not (tmp_path / "alone").exists()


# --- Open MPI ------------------------------------------------------------------------------------

EXACT = ("--steps", "20", "--model.compute-dtype", "float32")
# Armed in process 1 the first time that it is started.
GPTJAX = (
    '[ $OMPI_COMM_WORLD_RANK = 1 ] && [ "$FAULT" ] && mkdir fault 2> /dev/null &&',
    "  export GPTJAX_FAULT=$FAULT",
    f"exec {sys.executable} -c '{MAIN}' \"$@\"",
)

needs_mpirun = pytest.mark.skipif(
    not shutil.which("mpirun"), reason="needs mpirun: apt-get install openmpi-bin"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a run of one process."""
    folder = make_folder(tmp_path_factory.mktemp("launched"))
    finish(start(folder, "one", *EXACT))
    write_program(folder / "bin", "gptjax", *GPTJAX)
    write_program(folder / "bin", "sleep")
    return folder


def run_under_mpirun(folder, run, count, fault=""):
    """Processes of two devices each; losses are those of one process."""
    ended = run_template(
        folder,
        "mpirun.sh",
        *("run.py", "--run-dir", run, *EXACT),
        NP=str(count),
        FAULT=fault,
        XLA_FLAGS=os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        OMPI_ALLOW_RUN_AS_ROOT="1",
        OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1",
        OMPI_MCA_rmaps_base_oversubscribe="1",
    )
    assert ended.returncode == 0, ended.stdout
    one, several = figures(folder, "one"), figures(folder, run)
    assert one.keys() == several.keys()
    for step in one:
        assert several[step]["data/batch_hash"] == one[step]["data/batch_hash"]
        assert several[step]["train/loss"] == pytest.approx(one[step]["train/loss"], rel=5e-5)
    return [event for event in read_events(folder / run) if event["event"] == "start"]


@pytest.mark.slow
@needs_mpirun
def test_processes_under_mpirun_give_the_losses_of_one(folder):
    (only,) = run_under_mpirun(folder, "four", 4)
    assert only["processes"] == 4 and only["mesh"] == {"data": 8}


@pytest.mark.slow
@needs_mpirun
def test_a_run_under_mpirun_goes_on_after_one_of_its_processes_was_killed(folder):
    first, second = run_under_mpirun(folder, "two", 2, fault="step_end:kill9@9")
    assert first["step"] == 0 and second["step"] >= 4
    logs = max(folder.glob("mpirun-logs/*")) / "1" / "1"  # of the first attempt of the last run
    last, killed = (logs / f"rank.{n}" / "stderr" for n in (0, 1))
    assert "fault on purpose: kill9" in killed.read_text()
    assert "error[43]: peer lost: process 1 -- " in last.read_text().splitlines()[-1]
    # A machine with much to do is given half as many seconds again.
    assert last.stat().st_mtime - killed.stat().st_mtime < 1.5 * 30
