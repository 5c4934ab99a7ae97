"""Records as soft tokens: a frozen text encoder's vector and numbers, mapped into the decoder (Fig. 1).

Shapes: B batch, L length, d hidden size, F size of the text encoder's vectors, N numbers of a record.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ggsm_core.collation import Batch
from ggsm_core.template import MODALITIES, NUMBERS, RECORD_TOKEN, SEGMENTS

FILE = "adapters.safetensors"


class EncoderError(ValueError):
    """An encoder that can't be built, loaded or trusted."""


class Adapter(nn.Module):
    """One modality's adapter: text vector and numbers of a record -> one soft token of the decoder.

    Text encoders are number-blind, so the numbers (``template.NUMBERS``) enter beside the vector.
    """

    def __init__(self, features: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features + len(NUMBERS), 2 * hidden),
            nn.GELU(),
            nn.Linear(2 * hidden, hidden),
            norm := nn.LayerNorm(hidden),
        )
        # Soft tokens start at the size of the decoder's own token embeddings.
        nn.init.constant_(norm.weight, scale)

    def forward(self, features: Tensor, numbers: Tensor) -> Tensor:
        """Float[n, F], Float[n, N] -> Float[n, d]."""
        return self.layers(torch.cat([features, numbers], dim=-1).to(next(self.parameters()).dtype))


class Adapters(nn.ModuleDict):
    """An adapter for each modality."""

    def __init__(self, features: int, embeddings: nn.Module) -> None:
        weight = embeddings.weight
        assert isinstance(weight, Tensor)
        hidden, scale = weight.shape[1], float(weight.detach().std())
        super().__init__({name: Adapter(features, hidden, scale) for name in MODALITIES})

    def insert(self, embedded: Tensor, batch: Batch, record_id: int) -> Tensor:
        """Float[B, L, d]: token embeddings ``embedded`` with each record's soft token in its place.

        ``record_id`` is the id of ``<record>``. Raises ``EncoderError`` for a batch without features.
        """
        slots = (batch.input_ids == record_id) & batch.valid
        if not bool(slots.any()):
            return embedded
        if batch.features is None or batch.numbers is None:
            raise EncoderError(
                f"features, numbers: missing from a batch with {RECORD_TOKEN} slots; collate with feature_of"
            )
        soft = embedded.clone()
        for name, adapter in self.items():
            here = slots & (batch.segments == SEGMENTS[name])
            if bool(here.any()):
                soft[here] = adapter(batch.features[here], batch.numbers[here]).to(soft.dtype)
        return soft

    def save(self, folder: Path) -> None:
        """Write the weights into ``folder``."""
        save_file({name: tensor.contiguous() for name, tensor in self.state_dict().items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        """Read what ``save`` wrote. Raises ``EncoderError`` where it does not fit."""
        try:
            self.load_state_dict(load_file(folder / FILE))
        except RuntimeError as problem:
            raise EncoderError(f"{folder.name}/{FILE}: does not fit these adapters ({problem})") from None
