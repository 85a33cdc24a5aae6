"""The meaning of Slurm's variables, from its manual."""

import pytest

from tokenbridge_jax.runtime import slurm

TASK = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_NODELIST": "node[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.fixture
def given(monkeypatch):
    """Sets the variables of a task, and others."""

    def given(variables):
        for name, value in (TASK | variables).items():
            monkeypatch.setenv(name, value)

    return given


@pytest.mark.parametrize(
    ("text", "node", "tasks"),
    [("8", 0, 8), ("1(x4)", 3, 1), ("2(x3),1", 2, 2), ("2(x3),1", 3, 1), ("4,2(x2)", 1, 2)],
)
def test_tasks_of_each_node_are_counted(given, text, node, tasks):
    given({"SLURM_STEP_TASKS_PER_NODE": text, "SLURM_NODEID": str(node)})
    assert slurm.tasks_on_node() == tasks


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "7 of the 8 GPUs of this node will not be used: set JAX_LOCAL_DEVICE_IDS=0,1,2,3,4,5"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, "7 of the 8 GPUs"),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, "6 of the 8 GPUs of this node will not be used: "),
        ({"SLURM_GPUS_ON_NODE": "gpu:a100:4"}, "3 of the 4 GPUs"),
        ({"SLURM_GPUS_ON_NODE": "", "CUDA_VISIBLE_DEVICES": "0,1"}, "1 of the 2 GPUs"),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x4)"}, ""),
        ({"SLURM_GPUS_ON_NODE": "1"}, ""),
        ({"CUDA_VISIBLE_DEVICES": "3"}, ""),  # Bound to one by the user, or by --gpus-per-task.
        ({"JAX_LOCAL_DEVICE_IDS": "0,1,2,3,4,5,6,7"}, ""),
        ({"SLURM_GPUS_ON_NODE": "many"}, ""),
        ({"SLURM_STEP_TASKS_PER_NODE": "(x4),,1(y2)"}, ""),
    ],
)
def test_idle_gpus_are_reported(given, variables, words):
    given({"SLURM_GPUS_ON_NODE": "8", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"} | variables)
    found = slurm.idle_gpus()
    assert words in found
    assert bool(found) == bool(words)


def test_a_shell_of_salloc_is_no_task(given, monkeypatch):
    given({"SLURM_STEP_NUM_TASKS": "4"})
    assert not slurm.left_out()
    given({"SLURM_STEP_NUM_TASKS": "1"})
    assert slurm.left_out()
    given({"SLURM_NTASKS": "1"})
    assert not slurm.left_out()
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert slurm.left_out()
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not slurm.left_out()
