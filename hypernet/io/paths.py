"""Paths that something will be written to, checked before the work that leads there. Imports nothing slow.

output_file("outputs/rows.jsonl")  # the same, if a file can be there
output_folder("outputs/adapter")   # the same, if a folder can
name_below("tiny/first")           # the same, if it stays in the folder that it is put behind
"""

from pathlib import Path


def output_file(path: str) -> str:
    """Raises ValueError: the path is a folder's, or below a file."""
    if Path(path).expanduser().is_dir():
        raise ValueError(f"{path} is a folder. Name a file.")
    return _below_folders(path)


def output_folder(path: str) -> str:
    """Raises ValueError: the path is a file's, or below one."""
    there = Path(path).expanduser()
    if there.exists() and not there.is_dir():
        raise ValueError(f"{path} is a file. Name a folder.")
    return _below_folders(path)


def name_below(name: str) -> str:
    """Raises ValueError: the name is empty or absolute, or has a `..`."""
    path = Path(name)
    if path.is_absolute() or not path.parts or ".." in path.parts or not name.strip():
        raise ValueError(f"A name is part of a path and stays in its folder, but {name!r} does not. Name it otherwise.")
    return name


def _below_folders(path: str) -> str:
    parents = Path(path).expanduser().parents
    if file := next((parent for parent in parents if parent.exists() and not parent.is_dir()), None):
        raise ValueError(f"{path} cannot be written: {file} is a file. Name another one.")
    return path
