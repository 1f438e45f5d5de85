"""How the build knows that its results are up to date: digests of all inputs."""

import errno
import os
import platform
import sysconfig
from functools import cache
from pathlib import Path

import filter as reader

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # disk, quota or file size limit


@cache
def installed():
    "Versions of Python and of every installed package, in one line."
    found = {Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    packages = {path.stem for folder in found for path in folder.glob("*.dist-info")}
    return " ".join([f"python-{platform.python_version()}", *sorted(packages)])


def digest_of(*files, root):
    "One fingerprint of files and of their paths below `root`."
    parts = ((path.relative_to(root).as_posix().encode(), path.read_bytes()) for path in files)
    return reader.digest(*(part for pair in parts for part in pair))


def write_whole(path, content):
    "Write bytes to `path`, completely or not at all."
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        draft.write_bytes(content)
        os.replace(draft, path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def read(path):
    "The contents of a stamp; empty if there is none."
    return path.read_text() if path.exists() else ""
