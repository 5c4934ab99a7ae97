"""Arrays in safetensors files, mapped into memory: opened at once, read where touched."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {"BOOL": "?", "U8": "u1", "I8": "i1", "U32": "<u4", "I32": "<i4", "I64": "<i8", "F32": "<f4"}
"""Names of safetensors -> of numpy, as far as our files use them."""


class ShardError(ValueError):
    """A data file that is missing, cut off, or not what was written."""


def mapped(path: Path) -> dict[str, np.ndarray]:
    """Name -> array of a safetensors file, read-only.

    Raises ``ShardError`` for a file that is missing, or whose header and size do not agree.
    """
    try:
        with safe_open(path, framework="numpy"):  # the library holds header, offsets and size together
            pass
    except (OSError, SafetensorError) as problem:
        raise ShardError(
            f"{path.parent.name}/{path.name}: can't be read ({problem}); delete that folder and start "
            "again, so that it is made anew"
        ) from None
    whole = np.asarray(np.memmap(path, mode="r"))
    begin = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:begin].tobytes())
    header.pop("__metadata__", None)
    return {
        name: whole[slice(*(begin + offset for offset in entry["data_offsets"]))]
        .view(DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        for name, entry in header.items()
    }
