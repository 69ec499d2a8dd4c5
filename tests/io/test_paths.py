"""Paths to write to: what cannot be is said beforehand, what can comes back as it was given."""

import pytest

from hypernet.io.paths import name_below, output_file, output_folder


@pytest.fixture
def file(tmp_path):
    (tmp_path / "file").touch()
    return tmp_path / "file"


def test_output_that_can_be_written_stays_as_given(tmp_path, file):
    assert [output_folder(path) for path in ("new/one", str(tmp_path))] == ["new/one", str(tmp_path)]
    assert [output_file(path) for path in ("new/one", str(file))] == ["new/one", str(file)]
    assert [name_below(name) for name in ("a", "a/b", "..a", "a b")] == ["a", "a/b", "..a", "a b"]


def test_output_in_the_way_of_another_is_refused(tmp_path, file):
    with pytest.raises(ValueError, match=f"^{file} is a file. Name a folder.$"):
        output_folder(str(file))
    with pytest.raises(ValueError, match=f"^{tmp_path} is a folder. Name a file.$"):
        output_file(str(tmp_path))
    for output in (output_folder, output_file):
        with pytest.raises(ValueError, match=f"^{file}/x/y cannot be written: {file} is a file. Name another one.$"):
            output(f"{file}/x/y")


def test_home_is_looked_up_for_a_folder(monkeypatch, tmp_path, file):
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match="^~/file is a file"):
        output_folder("~/file")


@pytest.mark.parametrize("name", ["", " ", ".", "..", "../x", "a/../../x", "/x"])
def test_name_that_leaves_its_folder_is_refused(name):
    with pytest.raises(ValueError, match="stays in its folder, but "):
        name_below(name)
