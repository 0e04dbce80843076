"""`import seqgan` is fast, and what most programs need is at its top."""

import subprocess
import sys

import pytest

import seqgan


def test_importing_the_package_imports_nothing_slow():
    code = "import sys, seqgan; print(seqgan.__version__, [m for m in sys.modules if 'torch' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [seqgan.__version__, "[]"]


def test_public_names():
    from seqgan import Tokenizer, Transformer, preset, sample

    assert Tokenizer.__module__ == "seqgan.models.tokenizer"
    assert Transformer.__module__ == "seqgan.models.transformer"
    assert preset("smoke").preset == "smoke"
    assert sample.__module__ == "seqgan.models.sampling"
    assert {"Tokenizer", "Transformer", "sample", "preset", "__version__"} <= set(dir(seqgan))
    with pytest.raises(AttributeError, match="no attribute 'tokenizer_of'"):
        _ = seqgan.tokenizer_of
