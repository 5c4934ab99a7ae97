"""What a training run needs: parameters, operations, memory and time, from a profile and a decoder's shape.

    python -m ggsm_core.cost --profile params/paper.yaml --recipe ggsm

Operations are counted (a multiplication with an addition is two), memory is what autograd keeps, weights,
gradients and AdamW's moments; both are held against a measurement in the tests. Time is operations over what
a device reaches, its stated peak times an assumed utilisation, and gradients over what a link carries.

Shapes: L layers, d hidden size, B batch; T tokens of a sequence, padding included.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, Qwen2Config

from ggsm_core import params, sections
from ggsm_core.params import Profile
from ggsm_core.sections import Lora
from ggsm_core.template import MODALITIES, NUMBERS, SPECIAL_TOKENS

FEATURES = 384
"""F of the text encoder, MiniLM."""
ROOM = 0.9
"""Share of a device's memory that may be planned with; the rest goes to kernels and to fragments."""
MFU = 0.4
"""Share of the peak that a run is taken to reach."""
QWEN_05B = Qwen2Config(
    vocab_size=151_936 + len(SPECIAL_TOKENS),
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=24,
    num_attention_heads=14,
    num_key_value_heads=2,
)
"""Qwen2.5-0.5B as published, with the template's tags."""


class CostError(ValueError):
    """A run whose cost can't be told."""


@dataclass(frozen=True)
class Device:
    """A GPU as its maker states it. All four are inputs: put your own."""

    name: str
    peak_flops: float  # bf16, dense [1/s]
    memory: float  # [bytes]
    link: float  # to the other devices, each way [bytes/s]


A100 = Device("A100 80GB", 312e12, 80e9, 25e9)
H100 = Device("H100 80GB", 989e12, 80e9, 50e9)
"""Peaks from the data sheets; links of one 200 and one 400 Gbit/s adapter a GPU, as between machines."""


@dataclass(frozen=True)
class Decoder:
    """A decoder's shape, as far as its cost goes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int  # key and value heads
    head: int
    vocab: int

    @classmethod
    def of(cls, config: Any) -> Decoder:
        """From a Hugging Face configuration of the Llama family. Raises ``CostError`` for another."""
        shape = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
                 "num_key_value_heads", "vocab_size")  # fmt: skip
        if lacking := [name for name in shape if getattr(config, name, None) is None]:
            raise CostError(
                f"config.json: no {lacking[0]!r}; the cost of Llama, Qwen and their kind alone can be told"
            )
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head,
            config.vocab_size,
        )

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Name -> inputs and outputs of a block's linear layers."""
        d, inner, queries, keys = (
            self.hidden,
            self.intermediate,
            self.heads * self.head,
            self.groups * self.head,
        )
        return {
            "q_proj": (d, queries),
            "k_proj": (d, keys),
            "v_proj": (d, keys),
            "o_proj": (queries, d),
            "gate_proj": (d, inner),
            "up_proj": (d, inner),
            "down_proj": (inner, d),
        }

    @property
    def matrices(self) -> int:
        """Parameters that every token is multiplied with: those of the linear layers."""
        return self.layers * sum(a * b for a, b in self.linear.values())

    @property
    def parameters(self) -> int:
        """With embeddings; norms and biases, a thousandth, left out."""
        return self.matrices + self.vocab * self.hidden

    def low_rank(self, lora: Lora) -> int:
        """Parameters of the low-rank updates."""
        return self.layers * sum(lora.rank * sum(self.linear[name]) for name in lora.targets)


@dataclass(frozen=True)
class Work:
    """One run, before it is known on what."""

    decoder: Decoder
    lora: Lora | None
    adapters: int  # parameters of one modality's adapter
    records: int  # soft tokens of a user, at most
    lengths: tuple[int, int]  # tokens of a user and of an answer, T
    batch: int
    steps: int
    probes: int  # steps with a probe pass: two_pass in warm-up, a frozen tower after it
    half: bool  # bf16 autocast
    micro_batch: int | None = None  # pairs of a process in memory at a time, if the profile limits them
    snapshot: bool = False  # freeze: tower keeps a second encoder

    @classmethod
    def of(cls, profile: Profile, recipe: str, config: Any = None) -> Work:
        """From a profile; ``config`` is that of its decoder, needed where a hub name stands for it.

        Sequences count as long as the template lets them become: an upper bound.

        Raises ``CostError``.
        """
        if recipe not in profile.trained:
            raise CostError(f"recipe: {recipe!r} is not in profile {profile.name!r}")
        row = profile.row(recipe)
        decoder, template, training = _decoder(profile, config), profile.template, row.training
        probes, snapshot = 0, False
        if isinstance(row.options, sections.Guidance):
            probes = sum(row.options.probes(step) for step in range(training.total_steps))
            snapshot = row.options.freeze == "tower"
        adapter = template.modality_input == "adapter"
        d = decoder.hidden
        return cls(
            decoder,
            profile.lora,
            ((FEATURES + len(NUMBERS)) * 2 * d + 2 * d * d) if adapter else 0,
            sum(getattr(template, name) for name in MODALITIES) if adapter else 0,
            (template.max_user_tokens, template.max_answer_tokens),
            training.batch_size,
            training.total_steps,
            probes,
            training.precision == "bf16",
            training.micro_batch,
            snapshot,
        )

    @property
    def trained(self) -> int:
        """Parameters that AdamW moves."""
        own = self.decoder.parameters if self.lora is None else self.decoder.low_rank(self.lora)
        return own + len(MODALITIES) * self.adapters

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.trained + (self.decoder.parameters if self.lora is not None else 0)

    @property
    def tokens(self) -> int:
        """Tokens of a pair, padding included."""
        return sum(self.lengths)

    def _pair(self, frozen: int, trained: int, attention: int) -> int:
        """Operations of a pair, with how often each kind of product is computed."""
        decoder = self.decoder
        low_rank = 0 if self.lora is None else decoder.low_rank(self.lora)
        matrices = frozen if self.lora is not None else trained
        return (
            2 * self.tokens * (matrices * decoder.matrices + trained * low_rank)
            + 2 * trained * self.records * self.adapters
            + attention * sum(4 * t * t for t in self.lengths) * decoder.layers * decoder.heads * decoder.head
        )

    @property
    def forward(self) -> int:
        """Operations of a pair's forward pass."""
        return self._pair(1, 1, 1)

    @property
    def train(self) -> int:
        """Forward and backward: each product twice more, but frozen weights need no gradient of their own."""
        return self._pair(2, 3, 3)

    @property
    def probe(self) -> int:
        """Forward, and backward to the embeddings: no weight gets a gradient."""
        return self._pair(2, 2, 3)

    @property
    def kept(self) -> int:
        """Bytes that a pair keeps from the forward for the backward pass."""
        decoder, size = self.decoder, 2 if self.half else 4
        d, a, inner = decoder.hidden, decoder.heads * decoder.head, decoder.intermediate
        # Norms: inputs and, if their weights train, what these multiply. Linear layers: their inputs, which
        # autocast copies for each layer. Attention: queries, keys, values, output. MLP: four of its width.
        norms = 4 if self.lora is None else 2
        inputs = 5 if self.half else 2
        low_rank = 0 if self.lora is None else a * self.half + self.lora.rank * len(self.lora.targets)
        wide = 4 * (norms * d + decoder.heads + 2)
        block = wide + size * (inputs * d + 4 * a + 4 * inner + low_rank)
        last = 4 * (norms // 2) * d  # the norm after the last block
        return (decoder.layers * block + last) * self.tokens + size * sum(t * t for t in self.lengths)

    def states(self, devices: int = 1, *, sharded: bool = False) -> float:
        """Bytes on a device of weights, gradients and AdamW's two moments, fp32; ``sharded`` by FSDP2.

        DDP holds gradients a second time, as it sends them; autocast, the weights in bf16.
        """
        held = 4 * self.parameters * (1 + self.snapshot) + 12 * self.trained
        if sharded:
            return held / devices
        sent = 4 * self.trained if devices > 1 else 0
        return held + sent + (2 * self.decoder.matrices if self.half else 0)


@dataclass(frozen=True)
class Estimate:
    """What a run needs on some devices."""

    device: Device
    devices: int
    rows: int  # pairs of a device's share of the batch that are in memory at a time
    cached: bool  # fewer than its share: representations are cached, at one forward pass more
    memory: float  # [bytes] on each device
    step_seconds: float
    hours: float


def estimate(
    work: Work,
    device: Device,
    devices: int,
    *,
    mfu: float = MFU,
    sharded: bool = False,
) -> Estimate:
    """Memory and time of a run.

    Args:
        work: what is computed.
        device: on what.
        devices: how many.
        mfu: the share of the peak that is reached; 0.3 to 0.5 is usual, measure yours.
        sharded: FSDP2 instead of DDP.

    Raises:
        CostError: devices that can't share the batch, or a model that fits nowhere.
    """
    if devices < 1:
        raise CostError(f"devices: {devices}; give 1 or more")
    if not 0 < mfu <= 1:
        raise CostError(f"mfu: {mfu:g} is no share of the peak; give a number above 0, at most 1")
    if work.batch % devices:
        raise CostError(f"devices: {devices} can't share a batch of {work.batch} evenly")
    share = work.batch // devices
    states = work.states(devices, sharded=sharded)
    fitting = int((ROOM * device.memory - states) // work.kept)
    if fitting < 1:
        raise CostError(
            f"device: {device.name} holds {device.memory / 1e9:.0f} GB, and {states / 1e9:.1f} GB of weights "
            "and their states leave no room for a pair; shard over more devices or train with LoRA"
        )
    most = min(share, fitting, work.micro_batch or share)
    rows = next(size for size in range(most, 0, -1) if share % size == 0)
    cached = rows < share
    probing = work.probes / work.steps * work.probe
    # Cached representations cost a forward pass more, of a probe pass too.
    first = (1 + work.probes / work.steps) * work.forward if cached else 0
    operations = share * (work.train + probing + first)
    gradients = 4 * work.trained * 2 * (devices - 1) / devices  # a ring sends each twice; nothing overlaps
    weights = 4 * work.parameters * 2 * (devices - 1) / devices if sharded else 0
    seconds = operations / (mfu * device.peak_flops) + (gradients + weights) / device.link
    return Estimate(
        device, devices, rows, cached, states + rows * work.kept, seconds, seconds * work.steps / 3600
    )


def _decoder(profile: Profile, config: Any) -> Decoder:
    backbone = profile.backbone
    if config is not None:
        return Decoder.of(config)
    if backbone.kind == "scratch":
        head = backbone.hidden // backbone.heads
        return Decoder(
            backbone.layers, backbone.hidden, backbone.intermediate, backbone.heads, backbone.heads, head,
            backbone.vocab,
        )  # fmt: skip
    if backbone.path == "Qwen/Qwen2.5-0.5B-Instruct":
        return Decoder.of(QWEN_05B)
    if backbone.source is not None and Path(backbone.source).is_dir():
        try:
            return Decoder.of(AutoConfig.from_pretrained(backbone.source, trust_remote_code=False))
        except OSError as problem:
            raise CostError(f"backbone.path: {backbone.path}/config.json can't be read ({problem})") from None
    raise CostError(f"backbone: {backbone.path or backbone.kind!r}; give the configuration of its decoder")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m ggsm_core.cost", description="What a run needs.")
    parser.add_argument("--profile", type=Path, required=True)
    parser.add_argument("--recipe", default="ggsm")
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--mfu", type=float, default=MFU, help="share of the peak that is reached")
    parser.add_argument("--fsdp2", action="store_true", help="sharded instead of DDP")
    given = parser.parse_args(arguments)
    try:
        work = Work.of(params.load(given.profile), given.recipe)
        print(
            f"{work.parameters:,} parameters, {work.trained:,} trained; "
            f"batch {work.batch:,} of {work.tokens} tokens"
        )
        for device in (A100, H100):
            for devices in given.devices:
                need = estimate(work, device, devices, mfu=given.mfu, sharded=given.fsdp2)
                cached = f"cached, {need.rows} at a time" if need.cached else f"{need.rows} at once"
                print(
                    f"{devices:3d} x {device.name}: {need.memory / 1e9:5.1f} GB each ({cached}), "
                    f"{need.step_seconds:7.3f} s a step, {need.hours:6.1f} hours"
                )
    except ValueError as problem:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
