"""How the build knows that what it made is what it would make again: digests of all that it was made from."""

import errno
import os
import platform
import sysconfig
from functools import cache
from pathlib import Path

import filter as reader

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room on the disk, in the quota, in a file


@cache
def installed():
    "Versions of Python and of every installed package, in one line."
    found = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    packages = {path.stem for folder in found for path in folder.glob("*.dist-info")}
    return " ".join([f"python-{platform.python_version()}", *sorted(packages)])


def digest_of(*files, root):
    "One fingerprint of files and of their places below `root`."
    parts = ((path.relative_to(root).as_posix().encode(), path.read_bytes()) for path in files)
    return reader.digest(*(part for pair in parts for part in pair))


def write_whole(path, content):
    "Write bytes to `path`, whole or not at all."
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read(path):
    "What a stamp says; nothing where there is none."
    return path.read_text() if path.exists() else ""
