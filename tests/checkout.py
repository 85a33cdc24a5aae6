"""The launch scripts in a folder with stand-ins for the programs that they call."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"

# Records its name, arguments and some variables, and ends with the next of its statuses.
STAND_IN = """#!{python}
import json, os, pathlib, sys, time
here = pathlib.Path({here!r})
name = pathlib.Path(sys.argv[0]).name
names = [n for n in os.environ if n.startswith("JAX_")]
called = dict(name=name, args=sys.argv[1:], env={{n: os.environ[n] for n in names}})
if name == "kubectl":
    called["stdin"] = sys.stdin.read()
with open(here / "calls", "a") as file:
    file.write(json.dumps(called) + "\\n")
left = here / (name + ".statuses")
statuses = json.loads(left.read_text()) if left.exists() else [0]
left.write_text(json.dumps(statuses[1:] or statuses))
if statuses[0] == "wait for a signal":
    import signal
    told = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *args: told.append(args[0]))
    print("waiting", flush=True)
    while not told:
        time.sleep(0.02)
    time.sleep(0.3)
    statuses[0] = 75 if len(told) == 1 else 1
sys.exit(statuses[0])
"""


class Checkout:
    """A copy of the launch scripts, and stand-ins for the programs that they call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "checkout"
        self.bin = folder / "bin"
        self.home = folder / "home"
        for path in (self.bin, self.home, self.folder / ".venv/bin"):
            path.mkdir(parents=True)
        shutil.copytree(LAUNCH, self.folder / "launch")
        self.tokenbridge = self.folder / ".venv/bin/tokenbridge"
        self.stand_in(self.tokenbridge)
        for name in ("gcloud", "kubectl", "srun", "scontrol", "sleep"):
            self.stand_in(self.bin / name)

    def stand_in(self, path: Path, text: str | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text or STAND_IN.format(python=sys.executable, here=str(self.home)))
        path.chmod(0o755)

    def statuses(self, name: str, *statuses: int | str) -> None:
        (self.home / f"{name}.statuses").write_text(json.dumps(statuses))

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen:
        path = f"{self.bin}{os.pathsep}{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", f"launch/{script}", *arguments],
            cwd=self.folder,
            env={"PATH": path, "HOME": str(self.home)} | variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, status: int = 0, **variables: str) -> str:
        """Runs a script, which must end with this status; returns its output."""
        process = self.start(script, *arguments, **variables)
        out, error = process.communicate(timeout=60)
        assert process.returncode == status, error
        return error if status == 2 and not out else out

    def calls(self, name: str) -> list[dict]:
        if not (self.home / "calls").exists():
            return []
        lines = (self.home / "calls").read_text().splitlines()
        return [call for call in map(json.loads, lines) if call["name"] == name]
