"""Hands the metadata of settings.ini to setuptools, so that it is written once."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser()
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
meta = config["DEFAULT"]


def lines(name):
    return meta[name].split("\n")[1:]


runs = lines("runs_requirements")
sweep = runs + lines("sweep_requirements")
see = lines("see_requirements")
setup(
    version=meta["version"],
    description=meta["description"],
    author=meta["author"],
    url=meta["repo_url"] or None,
    python_requires=f">={meta['min_python']}",
    install_requires=lines("requirements"),
    extras_require={
        "runs": runs,
        "see": runs + see,
        "deploy": runs + lines("deploy_requirements"),
        "sweep": sweep,
        "dev": sweep + see + lines("peers_requirements") + lines("dev_requirements"),
    },
)
