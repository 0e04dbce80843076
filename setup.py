"""Installs the package; everything it says is read from settings.ini."""
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="], interpolation=None)
settings.read(Path(__file__).parent / "settings.ini")
cfg = settings["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"],
    author=cfg["author"], author_email=cfg["author_email"], license="Apache-2.0",
    long_description=(Path(__file__).parent / "README.md").read_text(), long_description_content_type="text/markdown",
    packages=find_packages(include=["seqgan", "seqgan.*"]), python_requires=f">={cfg['min_python']},<3.13",
    install_requires=cfg["requirements"].split(), extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "bench", "lsun")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)
