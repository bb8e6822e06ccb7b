"""Loads files of trained weights into networks: official ``.pth`` files, or safetensors.

Pickled code is never run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

WRAPPERS = ("state_dict", "model")
"""Keys under which a training checkpoint may hold its weights."""
PREFIX = "module."
"""Prefix of every name in a DataParallel checkpoint."""
HEAD = "final_layer."
"""Prefix of the layer with one output per joint."""
SIMCC_HEAD = "simcc_head."
"""Prefix of the layers that predict SimCC's bins."""
COUNTER = "num_batches_tracked"
"""Suffix of counters that files from before PyTorch 0.4.1 lack; no network here uses them."""


def load_weights(network: nn.Module, path: Path) -> list[str]:
    """Copy a file's weights into the network; return the keys that stay random.

    Only a head with another number of joints stays random, and SimCC layers that the file lacks.
    All other weights must match by name and shape.

    Raises:
        ValueError: the file holds no weights, or keys or shapes differ; the message names the
            first of them.
    """
    own = network.state_dict()
    loaded = {
        key: value
        for key, value in read_weights(path).items()
        if not key.startswith(SIMCC_HEAD) or (key in own and own[key].shape == value.shape)
    }
    still_random = [
        key
        for key in own
        if key.startswith(HEAD)
        and key in loaded
        and loaded[key].shape[:1] != own[key].shape[:1]
        and loaded[key].shape[1:] == own[key].shape[1:]
    ]
    still_random += [key for key in own if key.startswith(SIMCC_HEAD) and key not in loaded]
    used = {key: value for key, value in loaded.items() if key not in still_random}
    if differing := _differences(own, loaded, used):
        first = ", ".join(line for lines in differing for line in lines[:2])
        raise ValueError(
            f"{path} must hold this model's weights by name and shape; "
            f"{sum(map(len, differing))} differ, the first are [{first}]; change the model's "
            "name and size, or the file"
        )
    network.load_state_dict(used, strict=False)
    return still_random


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors, by name, of a safetensors file or one written by ``torch.save``.

    They are on the CPU.

    Raises:
        ValueError: the file is neither, or holds more than tensors and numbers.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except Exception as error:  # safetensors has no exported exception type
            raise ValueError(f"{path} must be a safetensors file of weights: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever its parsers do
        raise ValueError(_unreadable(path, error)) from None
    return _weights_in(content, path)


def _unreadable(path: Path, error: Exception) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    if isinstance(error, pickle.UnpicklingError) and code:
        return (
            f"{path} must hold only tensors and numbers, got pickled code ({code[1]}), which is "
            "not run; if you trust it, save only its weights by torch.save(state_dict, ...)"
        )
    # The rest of torch's message explains how to run the file's code.
    reason = str(error) if isinstance(error, OSError) else type(error).__name__
    return (
        f"{path} must be a file of weights, safetensors or written by torch.save, got an "
        f"unreadable one ({reason}); give the path of another file"
    )


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Find the weights in a checkpoint, under any of WRAPPERS and with or without PREFIX."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    is_named = isinstance(content, Mapping) and bool(content)
    if not is_named or not all(isinstance(value, Tensor) for value in content.values()):
        found = f"a {type(content).__name__}"
        if is_named:
            found += f" of {', '.join(map(str, list(content)[:5]))}"
        raise ValueError(
            f"{path} must hold tensors by name, at the top or under {' or '.join(WRAPPERS)}, "
            f"got {found}; save them by torch.save(model.state_dict(), ...)"
        )
    is_parallel = all(key.startswith(PREFIX) for key in content)
    return {key.removeprefix(PREFIX) if is_parallel else key: content[key] for key in content}


def _differences(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], used: Mapping[str, Tensor]
) -> list[list[str]]:
    """Describe keys of another shape, missing keys and unknown keys, without empty lists."""
    reshaped = [
        f"{key}: {tuple(used[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in used and used[key].shape != value.shape
    ]
    missing = [
        f"{key}: not in the file"
        for key in own
        if key not in loaded and not key.startswith(SIMCC_HEAD) and not key.endswith(COUNTER)
    ]
    unknown = [f"{key}: not in the model" for key in loaded if key not in own]
    return [lines for lines in (reshaped, missing, unknown) if lines]
