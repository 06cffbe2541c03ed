"""Commands that run at the same time and start in a tenth of a second.

Each is a fork of a process that has imported everything:

    with Commands(tmp_path) as commands:
        first, second = commands.start("train", file), commands.start("train", file)
        codes = [first.wait(), second.wait()]
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Command:
    """A running command.

    Args:
        server: Its server.
        pid: Its process.
        output_path: File of its output.
    """

    def __init__(self, server: "Commands", pid: int, output_path: Path):
        self.pid, self._server, self._output_path = pid, server, output_path

    @property
    def output(self) -> str:
        return self._output_path.read_text(errors="replace")

    def kill(self, signum: int = signal.SIGKILL):
        os.kill(self.pid, signum)

    def wait(self) -> int:
        """Return the exit code, as in subprocess: minus the signal that ended it."""
        return self._server.ask({"wait": self.pid})


class Commands:
    """A server that forks commands.

    Args:
        folder: Folder of their output.
    """

    def __init__(self, folder: Path):
        self._folder, self._count = Path(folder), 0
        self._server = subprocess.Popen(
            [sys.executable, "-m", __spec__.name],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._server.stdout.readline() == "ready\n"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.stdin.close()
        self._server.wait()

    def ask(self, request: dict) -> int:
        print(json.dumps(request), file=self._server.stdin, flush=True)
        return int(self._server.stdout.readline())

    def start(self, *arguments: object) -> Command:
        self._count += 1
        output_path = self._folder / f"output_{self._count}.txt"
        request = {"arguments": [str(x) for x in arguments], "output": str(output_path)}
        return Command(self, self.ask(request), output_path)

    def run(self, *arguments: object) -> tuple[int, str]:
        command = self.start(*arguments)
        return command.wait(), command.output


def serve():
    import tensorflow_datasets  # noqa: F401

    import radiance.ablation.trial
    import radiance.data.sources.digits
    import radiance.evaluation.report
    import radiance.loading
    import radiance.training.loop  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(execute(request["arguments"], request["output"]))
        print(pid, flush=True)


def execute(arguments: list[str], output: str) -> int:
    from radiance.cli import main

    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    for stream in (0, 1, 2):
        os.dup2(file if stream else os.open(os.devnull, os.O_RDONLY), stream)
    sys.argv = ["radiance", *arguments]
    try:
        return main(arguments)
    except SystemExit as error:
        return int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve()
