"""Checkpoints in and out: Hugging Face safetensors (bfloat16, float32, FP8) and orbax, streamed layer by layer.

    config, schedule, params = load(directory)
    config, schedule, weights = load(directory, form="serving", weights="stored")
    save(directory, params, config, schedule, format="safetensors")
    save_indexers(directory, params, config, schedule, source)     links to all that did not change
    convert(source, directory)     as a command: python -m checkpoints_convert SRC DST
    Layers(directory)              reads a layer when it is asked for it

No torch, no pickle. Headers are checked before memory is allocated for what they claim, and names in a checkpoint
never become paths outside it.
"""

import sys

if sys.argv[:1] == ["-m"]:  # Python is starting `python -m checkpoints_convert`, whose imports take seconds
    import checkpoints_convert.early

    checkpoints_convert.early.end_at_signals()

from checkpoints_convert.layers import Layers
from checkpoints_convert.linked import save_indexers
from checkpoints_convert.load import load, stored_weights
from checkpoints_convert.save import convert, save

__all__ = ["Layers", "convert", "load", "save", "save_indexers", "stored_weights"]
