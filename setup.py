"""Installs the package; everything it says is read from settings.ini."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(root / "settings.ini")
settings = config["DEFAULT"]
# The models that come with the package lie, in a checkout that has some, beside the datasets.
models = {"seqgan.pretrained": "data/pretrained"} if (root / "data/pretrained").is_dir() else {}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    keywords=settings["keywords"],
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    long_description=(root / "README.md").read_text(),
    long_description_content_type="text/markdown",
    packages=[*find_packages(include=["seqgan", "seqgan.*"]), *models],
    package_dir=models,
    package_data={"seqgan": ["weights/*", "study/*.html"], "seqgan.pretrained": ["*/*/*"]},
    python_requires=f">={settings['min_python']},<3.13",
    install_requires=settings["requirements"].split(),
    extras_require={
        extra: settings[f"{extra}_requirements"].split()
        for extra in ("dev", "bench", "browser", "lsun")
    },
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
