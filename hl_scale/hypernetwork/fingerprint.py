"""What a hypernetwork is, in one line: adapters that it generated name it."""

from __future__ import annotations

import hashlib
import json
from weakref import WeakKeyDictionary

import torch
from torch import nn

_KNOWN: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def weights_fingerprint(module: nn.Module) -> str:
    """sha256 of names, types, shapes and bytes of all parameters and persistent buffers, in the order of their names.

    Computed once for each module, so for trained ones that change no more.
    """
    if module not in _KNOWN:
        digest = hashlib.sha256()
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
        _KNOWN[module] = digest.hexdigest()
    return _KNOWN[module]
