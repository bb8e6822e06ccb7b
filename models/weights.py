"""From a file of weights to a network that has them: the official ``.pth`` files, or safetensors.

No pickled code is ever run.
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
"""Where a training checkpoint may hold its weights."""
PREFIX = "module."
"""What DataParallel puts in front of every name."""
HEAD = "final_layer."
"""The layer with one output a joint."""
SIMCC_HEAD = "simcc_head."
"""The layers behind the bins."""
COUNTER = "num_batches_tracked"
"""Files from before PyTorch 0.4.1 lack it, and no network here reads it."""


def load_weights(network: nn.Module, path: Path) -> list[str]:
    """Copies the weights of a file; returns the keys that were left at random.

    Only a head of another joint count is left so, and what of simcc's head is not in the file;
    everything else must agree by name and shape.

    Raises:
        ValueError: no file of weights, or other keys or shapes; names the first that differ.
    """
    own = network.state_dict()
    loaded = {
        key: value
        for key, value in read_weights(path).items()
        if not key.startswith(SIMCC_HEAD) or (key in own and own[key].shape == value.shape)
    }
    left = [
        key
        for key in own
        if key.startswith(HEAD)
        and key in loaded
        and loaded[key].shape[:1] != own[key].shape[:1]
        and loaded[key].shape[1:] == own[key].shape[1:]
    ]
    left += [key for key in own if key.startswith(SIMCC_HEAD) and key not in loaded]
    kept = {key: value for key, value in loaded.items() if key not in left}
    if differing := _differences(own, loaded, kept):
        first = ", ".join(line for lines in differing for line in lines[:2])
        raise ValueError(
            f"{path} must hold this model's weights by name and shape; "
            f"{sum(map(len, differing))} differ, the first are [{first}]; change the model's "
            "name and size, or the file"
        )
    network.load_state_dict(kept, strict=False)
    return left


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of one that ``torch.save`` wrote, by name, on the CPU.

    Raises:
        ValueError: it is neither, or holds anything but tensors and numbers.
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
            f"{path} must hold tensors and numbers alone, got pickled code ({code[1]}), which is "
            "not run; where you trust it, save its weights alone by torch.save(state_dict, ...)"
        )
    # what torch says beyond that is how to run the file's code
    reason = str(error) if isinstance(error, OSError) else type(error).__name__
    return (
        f"{path} must be a file of weights, safetensors or written by torch.save, got one that "
        f"can't be read ({reason}); give the path of another file"
    )


def _weights_in(content: Any, path: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, whatever they are wrapped in."""
    for wrapper in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    is_named = isinstance(content, Mapping) and bool(content)
    if not is_named or not all(isinstance(value, Tensor) for value in content.values()):
        held = f"a {type(content).__name__}"
        if is_named:
            held += f" of {', '.join(map(str, list(content)[:5]))}"
        raise ValueError(
            f"{path} must hold tensors by name, by themselves or under {' or '.join(WRAPPERS)}, "
            f"got {held}; save them by torch.save(model.state_dict(), ...)"
        )
    is_parallel = all(key.startswith(PREFIX) for key in content)
    return {key.removeprefix(PREFIX) if is_parallel else key: content[key] for key in content}


def _differences(
    own: Mapping[str, Tensor], loaded: Mapping[str, Tensor], kept: Mapping[str, Tensor]
) -> list[list[str]]:
    """Keys of another shape, missing keys, unknown keys; nothing if there are none."""
    reshaped = [
        f"{key}: {tuple(kept[key].shape)} in the file, {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in kept and kept[key].shape != value.shape
    ]
    missing = [
        f"{key}: not in the file"
        for key in own
        if key not in loaded and not key.startswith(SIMCC_HEAD) and not key.endswith(COUNTER)
    ]
    unknown = [f"{key}: not in the model" for key in loaded if key not in own]
    return [lines for lines in (reshaped, missing, unknown) if lines]
