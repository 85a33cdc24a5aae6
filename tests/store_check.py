"""Trains a tiny model in an object store, with one kill, and compares it with a local run.

  python tests/store_check.py gs://my-bucket/new-folder

The credentials are those of gcsfs and tensorstore (`gcloud auth application-default login`). It
leaves less than 10 MB there. It needs `pip install -e '.[gcs,test]'`.

Without a bucket, against an emulator (`pip install gcp-storage-emulator`):

  gcp-storage-emulator start --host=127.0.0.1 --port=9023 --in-memory --default-bucket=bucket &
  export STORAGE_EMULATOR_HOST=http://127.0.0.1:9023 TENSORSTORE_GCS_HTTP_URL=http://127.0.0.1:9023
  export GOOGLE_AUTH_TOKEN_FOR_TESTING=any GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false
  python tests/store_check.py gs://bucket/check

Status 0 means: the shards were read from there, the killed run resumed from a checkpoint there, all
its numbers equal those of the local run, and images were sampled from it.
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import soak
from etils import epath
from token_shards import write_workdir

from tokenbridge_jax.runtime import storage
from tokenbridge_jax.training.checkpoints import Checkpoints

STEPS, EVERY = 40, 5


def main(store: epath.Path) -> int:
    """Runs both and compares."""
    if (store / "metrics.jsonl").exists():
        sys.exit(f"{store} holds a run already; name a new folder")
    folder = Path(tempfile.mkdtemp(prefix="store_check"))
    local, log = folder / "run", folder / "log.txt"
    write_workdir(local)
    for path in filter(Path.is_file, sorted(local.rglob("*"))):
        storage.write_bytes(store / path.relative_to(local).as_posix(), path.read_bytes())
    config = {"training.steps": STEPS, "training.checkpoint_every": EVERY, "training.eval_every": 0}
    job = soak.start(store, 1, log, **config)
    while not (saved := Checkpoints(store / "checkpoints").latest) and job[0].poll() is None:
        time.sleep(0.2)
    soak.kill(job)
    print(f"killed with {saved} of {STEPS} steps saved: {soak.end(job)}")
    statuses = soak.end(soak.start(store, 1, log, **config))
    statuses += soak.end(soak.start(local, 1, log, **config))
    # A new process is needed, because gcsfs caches listings in this one.
    sample = [sys.executable, "-m", "tokenbridge_jax.commands.sample", f"--workdir={store}"]
    sample += ["--config.mesh.data=-1", "--config.mesh.fsdp=1", "--num_images=4"]
    statuses.append(subprocess.run(sample, check=False).returncode)
    equal = soak.results(store) == soak.results(local)
    print(f"statuses {statuses}, numbers {'equal' if equal else 'differ'}; the log is {log}")
    return not (saved and equal and not any(statuses))


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("gs://"):
        sys.exit(__doc__)
    sys.exit(main(epath.Path(sys.argv[1])))
