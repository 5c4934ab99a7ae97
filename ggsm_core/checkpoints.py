"""Checkpoints that are whole or absent: written aside, fsynced, renamed; tensors only, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Store:
    """The last ``keep`` checkpoints of a run, each a folder ``step-N`` with a manifest of checksums."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Write a checkpoint; a reader sees all of it or nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, final = self.folder / f".partial-{step}", self.folder / f"step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        weights = partial / "state.safetensors"
        save_file({k: v.detach().contiguous().clone() for k, v in state.items()}, weights)
        (partial / "manifest.json").write_text(json.dumps({weights.name: _sha256(weights)}), encoding="utf-8")
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _fsync(self.folder)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(self.folder / f"step-{old}")

    def latest(self) -> dict[str, Tensor] | None:
        """The newest whole checkpoint, or None. A torn one is named on stderr and passed over."""
        for step in reversed(self._steps()):
            folder = self.folder / f"step-{step}"
            try:
                manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
                torn = [name for name, digest in manifest.items() if _sha256(folder / name) != digest]
            except (OSError, ValueError) as error:
                torn = [str(error)]
            if not torn:
                return load_file(folder / "state.safetensors")
            print(f"checkpoint {folder.name}: torn ({', '.join(torn)}), passed over", file=sys.stderr)
        return None

    def remove(self) -> None:
        """Delete all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _steps(self) -> list[int]:
        return sorted(int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))


def keep_lines(path: Path, count: int) -> None:
    """Cut a per-step log back to its first ``count`` lines: those of the steps that a resume builds on."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    path.write_text("".join(lines[:count]), encoding="utf-8")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter number and name; hyper-parameters come from the profile."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": torch.as_tensor(value) for index, s in state.items() for name, value in s.items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of ``optimizer_tensors``."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
