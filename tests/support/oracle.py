"""transformers as the oracle: loads a tiny model from a checkpoint directory and records what it computes.

Imported only where torch and transformers are at hand; everywhere else tests compare with the recordings that
`python -m tests.support.make_fixtures` wrote.
"""

from __future__ import annotations

import json
import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

from tests.support.tiny_models import Case

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def write_checkpoint(case: Case, directory: pathlib.Path) -> None:
    """The case as a Hugging Face directory, written without any of the library's own exporters."""
    schedule = {"indexer_types": ["full" if letter == "F" else "shared" for letter in case.pattern]}
    (directory / "config.json").write_text(json.dumps(dict(case.fields) | schedule))
    safetensors.numpy.save_file(case.state, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: pathlib.Path) -> transformers.PreTrainedModel:
    """The model of a checkpoint directory in float32. AssertionError where a tensor has no place or a place no tensor."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    problems = {name: found for name, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def build(case: Case) -> transformers.PreTrainedModel:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(case, pathlib.Path(directory))
        return load(pathlib.Path(directory))


def record(model: transformers.PreTrainedModel, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Logits [B, S, V], zeros at padded positions, and the full layers' indices [num_full, B, S, k] as ours look."""
    caught: list[np.ndarray] = []
    hooks = [
        module.register_forward_hook(lambda _, __, indices: caught.append(indices.numpy()))
        for name, module in model.named_modules()
        if name.endswith("self_attn.indexer")
    ]
    valid = case.is_valid
    with torch.no_grad():
        mask = torch.from_numpy(valid.astype(np.int64))
        logits = model(torch.from_numpy(case.tokens).long(), attention_mask=mask, use_cache=False).logits.numpy()
    for hook in hooks:
        hook.remove()
    return np.where(valid[..., None], logits, 0), np.stack([_tidy(indices, valid) for indices in caught])


def _tidy(indices: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """transformers fills up with keys that a query must not see, in any order: ascending positions, then -1."""
    length = valid.shape[1]
    hidden = (indices > np.arange(length)[:, None]) | ~valid[..., None]
    tidy = np.sort(np.where(hidden, length, indices), axis=-1)
    return np.where(tidy == length, -1, tidy)
