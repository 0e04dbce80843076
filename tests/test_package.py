"""`import seqgan` is fast, what most programs need is at its top, and a plain install works."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import seqgan


def test_importing_the_package_imports_nothing_slow():
    code = "import sys, seqgan; print(seqgan.__version__, [m for m in sys.modules if 'torch' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [seqgan.__version__, "[]"]


def test_the_command_imports_the_judges_only_to_measure():
    code = "import sys, seqgan.__main__; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_public_names():
    from seqgan import Tokenizer, Transformer, preset, sample

    assert Tokenizer.__module__ == "seqgan.models.tokenizer"
    assert Transformer.__module__ == "seqgan.models.transformer"
    assert preset("smoke").preset == "smoke"
    assert sample.__module__ == "seqgan.models.sampling"
    assert {"Tokenizer", "Transformer", "sample", "preset", "__version__"} <= set(dir(seqgan))
    with pytest.raises(AttributeError, match="no attribute 'tokenizer_of'"):
        _ = seqgan.tokenizer_of


def test_a_plain_install_writes_into_the_current_folder(tmp_path):
    site, work = tmp_path / "site-packages", tmp_path / "another project"
    shutil.copytree(Path(seqgan.__file__).parent, site / "seqgan")
    work.mkdir()
    (work / "settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    for name in ("SEQGAN_HOME", "IN_TEST"):
        env.pop(name, None)
    code = (
        "import os, seqgan.core as c; print(c.__file__, c.home()); os.chdir('/'); print(c.home())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=work, env=env, capture_output=True, text=True, check=True
    )
    first, then = done.stdout.splitlines()
    assert first == f"{site}/seqgan/core.py {work}"
    assert then == str(work)
