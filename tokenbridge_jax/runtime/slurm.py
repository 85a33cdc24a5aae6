"""Facts about a job that Slurm tells its processes and JAX does not use."""

import os
import re

# With these variables JAX recognises a task of a step, which `srun` starts.
_OF_TASK = ("SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def is_task() -> bool:
    """Whether `srun` has started this process."""
    return "SLURM_JOB_ID" in os.environ and all(name in os.environ for name in _OF_TASK)


def left_out() -> bool:
    """Whether this process is in a job of Slurm, but is not one of its tasks.

    This is the case in a shell of `salloc`, or in a batch script without `srun`. Some of those
    shells are a step of one task in a job of several tasks.
    """
    tasks = _number("SLURM_STEP_NUM_TASKS")
    of_shell = tasks == 1 and (_number("SLURM_NTASKS") or 1) > 1
    return "SLURM_JOB_ID" in os.environ and (not is_task() or of_shell)


def idle_gpus() -> str:
    """A warning about GPUs of this node that JAX will not use; empty if it uses all.

    JAX gives every task of a step one GPU. Values that Slurm would not write are ignored.
    """
    given = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x.strip()]
    gpus = _number("SLURM_GPUS_ON_NODE") or len(given)
    bound = "CUDA_VISIBLE_DEVICES" in os.environ and len(given) < 2  # Slurm chose one for the task.
    tasks = tasks_on_node()
    chosen = bound or os.environ.get("JAX_LOCAL_DEVICE_IDS")
    if not is_task() or chosen or not tasks or gpus <= tasks:
        return ""
    advice = f"start {gpus} processes a node (srun --ntasks-per-node={gpus})"
    if tasks == 1:
        every = ",".join(map(str, range(gpus)))
        advice = f"set JAX_LOCAL_DEVICE_IDS={every}, as launch/slurm.sbatch does, or {advice}"
    return f"{gpus - tasks} of the {gpus} GPUs of this node will not be used: {advice}"


def tasks_on_node() -> int | None:
    """How many tasks of this step are on this node. Slurm writes `8` or `2(x3),1`, for example."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"):
        by_node = []
        for item in os.environ.get(name, "").split(","):
            if found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", item.strip()):
                by_node.append((int(found[1]), int(found[2] or 1)))
        node = _number("SLURM_NODEID") or 0
        for tasks, nodes in by_node:
            if node < nodes:
                return tasks
            node -= nodes
        if by_node and name == "SLURM_NTASKS_PER_NODE":  # The same on every node.
            return by_node[0][0]
    return None


def _number(name: str) -> int | None:
    found = re.fullmatch(r"(?:.*:)?(\d+)", os.environ.get(name, "").strip())
    return int(found[1]) if found else None
