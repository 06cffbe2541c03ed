import errno
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from radiance.base import files
from radiance.base.errors import OutputError, RadianceError
from radiance.base.files import (
    create_folder_atomically,
    is_disk_full,
    open_for_append,
    replace_atomically,
    require_file,
    require_folder,
    require_space,
)
from radiance.base.temp_files import ABANDONED_SECONDS, HOST, remove_abandoned

WRITER = """
import sys, time
from pathlib import Path
from radiance.base.files import create_folder_atomically, replace_atomically
write = create_folder_atomically if sys.argv[2] == "folder" else replace_atomically
with write(Path(sys.argv[1])) as temp_path:
    (temp_path / "weights" if temp_path.is_dir() else temp_path).write_bytes(bytes(1000))
    print("ready", flush=True)
    time.sleep(600)
"""


def write_and_fail(path, error):
    with replace_atomically(path) as temp_path:
        temp_path.write_text("new")
        raise error


def create_and_fail(path, error):
    with create_folder_atomically(path) as folder:
        (folder / "a").touch()
        raise error


def test_a_failed_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="stop"):
        write_and_fail(path, ValueError("stop"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_system_errors_become_output_errors_with_a_remedy(tmp_path):
    full_disk = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OutputError, match=r"No space left.*run the same command again"):
        write_and_fail(tmp_path / "a.txt", full_disk)
    with pytest.raises(OutputError, match="nothing was changed"), open_for_append(tmp_path):
        pass
    assert issubclass(OutputError, RadianceError)


def test_an_output_error_inside_a_block_is_not_wrapped(tmp_path):
    with pytest.raises(OutputError) as error:
        write_and_fail(tmp_path / "outer", OutputError("inner"))
    assert str(error.value) == "inner"


def test_text_is_appended_in_utf_8_whatever_its_bytes_were(tmp_path):
    path = tmp_path / "command.txt"
    with open_for_append(path) as file:
        file.write("radiance train é → \udcff\n")  # as Python reads a byte that is not UTF-8
    assert path.read_bytes() == "radiance train é → \\udcff\n".encode()


def test_folders_appear_complete_or_not_at_all(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(ValueError, match="stop"):
        create_and_fail(path, ValueError("stop"))
    assert list(tmp_path.iterdir()) == []
    with create_folder_atomically(path) as folder:
        (folder / "a").touch()
    assert [x.name for x in path.iterdir()] == ["a"]
    with pytest.raises(OutputError, match="exists already"), create_folder_atomically(path):
        pass


def test_paths_and_space_are_checked_before_any_work(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="give a folder"):
        require_folder(tmp_path / "file" / "a" / "b")
    with pytest.raises(OutputError, match="give the name of a file"):
        require_file(tmp_path)
    with pytest.raises(OutputError, match="GB free"):
        require_space(tmp_path / "absent", 10**18)
    require_space(tmp_path / "absent", 1)


def test_a_full_disk_is_recognized_inside_other_errors():
    assert is_disk_full(RuntimeError(f"write failed: {os.strerror(errno.ENOSPC)}"))
    assert not is_disk_full(RuntimeError("write failed"))


# --- what killed processes leave ------------------------------------------------------------------


def start_writer(path, kind="file") -> subprocess.Popen:
    """Start a process that has written a part of a file or folder."""
    command = [sys.executable, "-c", WRITER, str(path), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen):
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.fixture(autouse=True)
def forget_cleaned_folders():
    files._cleaned_folders.clear()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("next_name", ["model", "another"])
def test_the_next_writer_removes_what_a_killed_one_left(kind, next_name, tmp_path):
    kill(start_writer(tmp_path / "model", kind))
    (left_path,) = tmp_path.iterdir()
    assert left_path.name.startswith(".model.")
    with replace_atomically(tmp_path / next_name) as temp_path:
        temp_path.write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == [next_name]


def test_the_space_that_is_needed_includes_what_a_killed_writer_left(tmp_path):
    """Otherwise the same command would find no space for its file of 19 GB."""
    kill(start_writer(tmp_path / "model"))
    require_space(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_files_of_running_writers_stay(kind, tmp_path):
    process = start_writer(tmp_path / "model", kind)
    try:
        with replace_atomically(tmp_path / "another") as temp_path:
            temp_path.write_text("new")
        assert len(list(tmp_path.iterdir())) == 2
    finally:
        kill(process)


def is_removed(path, age=0.0) -> bool:
    path.write_text("a part")
    os.utime(path, (time.time() - age, time.time() - age))
    remove_abandoned(path.parent)
    return not path.exists()


def test_only_files_of_processes_that_are_gone_are_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    gone, running = process.pid, os.getpid()
    # Files of versions without a lock and a host, whose process is known by its number.
    assert is_removed(tmp_path / f".model.safetensors.{gone}.part")
    assert is_removed(tmp_path / f".a.b.{'9' * 10}.part")
    assert not is_removed(tmp_path / f".model.safetensors.{running}.part")
    # The number may have been given to another process since.
    assert is_removed(tmp_path / f".model.safetensors.{running}@{HOST}.part")
    # Processes of other hosts cannot be asked.
    assert not is_removed(tmp_path / f".model.safetensors.{gone}@another-host.part")
    assert is_removed(
        tmp_path / f".old.safetensors.{gone}@another-host.part", 2 * ABANDONED_SECONDS
    )
    # Other programs have such names too.
    for name in (f"model.{gone}.part", f".model.{gone}", ".model.part", f".model.{gone}.part~"):
        assert not is_removed(tmp_path / name, 2 * ABANDONED_SECONDS)


def test_links_and_pipes_are_not_followed(tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (tmp_path / ".a.9999999999.part").symlink_to(tmp_path / "kept")
    os.mkfifo(tmp_path / ".b.9999999999.part")  # opening it to read would wait for ever
    remove_abandoned(tmp_path)
    assert (tmp_path / "kept" / "file").exists()


def test_threads_may_write_the_same_file(tmp_path):
    num_threads, paths = 8, []
    starting, writing = threading.Barrier(num_threads), threading.Barrier(num_threads)

    def write():
        starting.wait(30)
        with replace_atomically(tmp_path / "a") as temp_path:
            paths.append(temp_path)
            writing.wait(30)
            temp_path.write_text("complete")

    threads = [threading.Thread(target=write) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == num_threads
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_names_may_have_the_length_that_disks_allow(tmp_path):
    path = tmp_path / ("\u00e4" * 127)
    with replace_atomically(path) as temp_path:
        temp_path.write_text("complete")
    assert path.read_text() == "complete"


def test_writing_is_possible_in_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    def raise_error(self):
        raise PermissionError(errno.EACCES, "denied")

    monkeypatch.setattr("pathlib.Path.iterdir", raise_error)
    with replace_atomically(tmp_path / "a") as temp_path:
        temp_path.write_text("complete")
    assert (tmp_path / "a").read_text() == "complete"
