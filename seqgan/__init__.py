"""SeQ-GAN: what a vector-quantized tokenizer should keep of an image.

`from seqgan import Tokenizer, Transformer, sample, preset` is all that most programs need. The
names are imported when they are first used, so that `import seqgan` alone stays fast.
"""

__version__ = "0.1.0"

from importlib import import_module

_MODULES = {
    "Tokenizer": "seqgan.models.tokenizer",
    "Transformer": "seqgan.models.transformer",
    "sample": "seqgan.models.sampling",
    "preset": "seqgan.presets",
}
__all__ = list(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
