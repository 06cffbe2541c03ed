import errno
import os

import pytest

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
