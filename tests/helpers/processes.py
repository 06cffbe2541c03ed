"""Processes that run `radiance train` and start in a tenth of a second.

Each is a fork of a process that has imported everything:

    with Forks(tmp_path) as forks:
        process = forks.train(run, kill=Moment("checkpoints", 7, 0.01))

JAX starts only in the fork, because its threads would not survive forking.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from typing import NamedTuple

from radiance import config
from tests.helpers.toy_runs import written_experiment

ROOT = Path(__file__).parents[2]
WRITES = os.O_WRONLY | os.O_RDWR
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")


class Moment(NamedTuple):
    """A moment after the n-th change of a file in a part of the run directory."""

    part: str  # "", checkpoints, averages, samples or metrics.jsonl
    n: int
    seconds: float = 0.0
    once: str = ""  # path in the run directory that must exist before changes are counted


class EndedProcess(NamedTuple):
    code: int  # as in subprocess: minus the signal that ended it
    output: str
    events: dict[str, int]  # number of changes by part


class Forks:
    """A server that forks processes.

    Args:
        folder: Folder of their output.
        prefix: A command that starts the server, for example in its own file system.
    """

    def __init__(self, folder: Path, *prefix: str):
        self.folder = folder
        self._server = subprocess.Popen(
            [*prefix, sys.executable, "-m", __spec__.name, str(folder)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = int(self._server.stdout.readline())

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()

    def train(
        self, run: config.Config, kill: Moment | None = None, fill: Moment | None = None
    ) -> EndedProcess:
        """Train a run in a fork.

        Args:
            run: The run.
            kill: When the process is killed.
            fill: When the disk is filled, by a file `ballast` beside the run directory.
        """
        request = [str(written_experiment(run, self.folder)), str(run.run_dir), kill, fill]
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return EndedProcess(*json.loads(self._server.stdout.readline()))


# --- the server ---------------------------------------------------------------------------------


def serve(folder: Path):
    """Import everything that a run needs, and fork a process for every request."""
    import tensorflow_datasets  # noqa: F401

    import radiance.data.sources.digits
    import radiance.evaluation.report
    import radiance.training.loop  # noqa: F401

    print(os.getpid(), flush=True)
    for line in sys.stdin:
        experiment, directory, kill, fill = json.loads(line)
        files = [folder / "output.txt", folder / "events.txt"]
        for file in files:
            file.unlink(missing_ok=True)
        process = os.fork()
        if process == 0:
            os._exit(
                child(experiment, directory, kill and Moment(*kill), fill and Moment(*fill), *files)
            )
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(
            json.dumps(
                [
                    code,
                    files[0].read_text(),
                    json.loads(files[1].read_text()) if files[1].exists() else {},
                ]
            ),
            flush=True,
        )


def child(
    experiment: str,
    directory: str,
    kill: Moment | None,
    fill: Moment | None,
    output: Path,
    events: Path,
) -> int:
    from radiance.cli import main

    file = os.open(output, os.O_CREAT | os.O_WRONLY)
    for stream in (0, 1, 2):
        os.dup2(file if stream else os.open(os.devnull, os.O_RDONLY), stream)
    watcher = FileWatcher(directory)
    if kill:
        watcher.on(kill, lambda: os.kill(os.getpid(), signal.SIGKILL))
    if fill:
        watcher.on(fill, lambda: fill_disk(Path(directory).with_name("ballast")))
    code = main(["train", experiment])
    events.write_text(json.dumps(watcher.counts))
    sys.stdout.flush()
    return code


class FileWatcher:
    """Counts changes below a directory, and acts at given moments.

    It sees only files that Python opens, not those that Orbax writes in C++.
    """

    def __init__(self, directory: str):
        self.root, self.counts, self.counters, self.actions = directory + os.sep, {}, {}, []
        sys.addaudithook(self._audit)

    def on(self, moment: Moment, action):
        self.actions.append((moment, count(1), action))

    def _audit(self, event: str, arguments: tuple):
        if event == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & WRITES:
                return
        elif event not in CHANGES:
            return
        path = (
            os.fsdecode(arguments[0]) if isinstance(arguments[0], (str, bytes, os.PathLike)) else ""
        )
        if not path.startswith(self.root):
            return
        for part in {"", path[len(self.root) :].split(os.sep)[0]}:
            self.counts[part] = next(self.counters.setdefault(part, count(1)))
            for moment, counter, action in self.actions:
                if (
                    moment.part == part
                    and os.path.exists(self.root + moment.once)
                    and next(counter) == moment.n
                ):
                    threading.Timer(moment.seconds, action).start() if moment.seconds else action()


def fill_disk(path: Path):
    for size in (1 << 16, 1 << 12, 1):
        try:
            with path.open("ab", buffering=0) as file:
                while file.write(b"0" * size):
                    pass
        except OSError:
            pass


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
