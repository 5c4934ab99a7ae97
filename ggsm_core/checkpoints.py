"""Checkpoints that are whole or absent: written aside, fsynced, renamed; tensors only, no pickle."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ggsm_core.provenance import sha256
from ggsm_core.sharding import spread_like, whole


class CheckpointError(ValueError):
    """A checkpoint that is another run's, or can't be written."""


class Store:
    """The last ``keep`` checkpoints of a run, each a folder ``step-N`` with a manifest.

    The manifest holds the checksum of every file and the ``identity`` of the run: recipe, vocabulary, shape.
    """

    def __init__(self, folder: Path, keep: int, identity: dict[str, Any]) -> None:
        self.folder, self.keep, self.identity = folder, keep, identity

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Write a checkpoint; a reader sees all of it or nothing.

        Raises ``CheckpointError`` if it can't be written, as on a full disk; earlier checkpoints stay.
        """
        partial = self.folder / f".partial-{step}"
        try:
            self._write(partial, step, state)
        except (OSError, SafetensorError) as problem:
            shutil.rmtree(partial, ignore_errors=True)
            kept = ", ".join(f"step-{n}" for n in self._steps()) or "none"
            raise CheckpointError(
                f"checkpoint step-{step}: can't be written ({problem}). Make room where {self.folder} lies "
                f"and start again; training goes on from what is kept there: {kept}"
            ) from problem

    def _write(self, partial: Path, step: int, state: dict[str, Tensor]) -> None:
        final = self.folder / f"step-{step}"
        self.folder.mkdir(parents=True, exist_ok=True)
        for abandoned in self.folder.glob(".partial-*"):
            shutil.rmtree(abandoned)
        partial.mkdir()
        weights = partial / "state.safetensors"
        save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, weights)
        manifest = {"identity": self.identity, "files": {weights.name: sha256(weights)}}
        (partial / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _fsync(self.folder)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old}")

    def latest(self) -> dict[str, Tensor] | None:
        """The newest whole checkpoint, or None. A torn one is named on stderr and passed over.

        Raises ``CheckpointError`` for another run's: going on would delete it.
        """
        for step in reversed(self._steps()):
            folder = self.folder / f"step-{step}"
            try:
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                identity, files = manifest["identity"], {"state.safetensors": None} | manifest["files"]
                torn = [name for name, digest in files.items() if sha256(folder / name) != digest]
            except (OSError, ValueError, KeyError, TypeError) as error:
                torn = [str(error)]
            if torn:
                print(f"checkpoint {folder.name}: torn ({', '.join(torn)}), passed over", file=sys.stderr)
                continue
            self._check_identity(folder, identity)
            return load_file(folder / "state.safetensors")
        return None

    def _check_identity(self, folder: Path, found: dict[str, Any]) -> None:
        expected = json.loads(json.dumps(self.identity))
        other = [
            f"{name} {found.get(name)!r}, here {expected.get(name)!r}"
            for name in sorted(expected.keys() | found.keys())
            if found.get(name) != expected.get(name)
        ]
        if other:
            raise CheckpointError(
                f"checkpoint {folder}: of another run ({'; '.join(other)}); move it away, or go on with its "
                "own profile"
            )

    def _steps(self) -> list[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)  # a folder set aside has another name


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter number and name; hyper-parameters come from the profile."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": whole(torch.as_tensor(value))
        for index, s in state.items()
        for name, value in s.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = spread_like(value, parameters[int(index)])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
