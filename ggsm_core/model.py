"""The encoder: adapters, decoder under a recipe's mask, read-out (Fig. 1, Eq. 11-14).

Shapes: B batch, L length, d hidden size, F size of the text encoder's vectors.
Both towers are this one module; they differ in their template and in what the recipe says of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from ggsm_core import masks, recipes
from ggsm_core.adapters import Adapters
from ggsm_core.adapters import EncoderError as EncoderError
from ggsm_core.backbone import check_mask, positions
from ggsm_core.collation import Batch, locate
from ggsm_core.provenance import digest
from ggsm_core.sections import AnswerMask, Lora, Template
from ggsm_core.sharding import spread_like, whole
from ggsm_core.template import EOS_TOKEN, RECORD_TOKEN, SPECIAL_TOKENS, USER_TOKEN

OUTER_SITES = ("embeddings", "final")
"""Values of ``grad_site`` beside those of a block, ``layer:0`` and on."""


class NotFinite(EncoderError):
    """A hidden state that is NaN or infinite."""


@dataclass(frozen=True)
class Output:
    """embedding: Float[B, d], L2-normalised. site: Float[B, L, d], the states that guidance asked for.

    visibility, valid: what the mask was made of, for the sequence as the decoder saw it (a global token
    included).
    """

    embedding: Tensor
    site: Tensor | None
    visibility: Tensor
    valid: Tensor


class UserEncoder(nn.Module):
    """Template tokens -> L2-normalised embedding, under a recipe's mask.

    Args:
        decoder: any Hugging Face decoder without head; it must honour a 4-D additive mask (checked here).
        tokenizer: holds the template's special tokens.
        recipe: which future tokens are visible, when.
        features: F, or None for plain text input without adapters.
        lora: train low-rank updates and the rows of the tags instead of the whole decoder.
        answer_mask: ``same`` (the recipe's own rule), ``causal`` or ``bidirectional`` for the answer tower.
        template, history_days, breakdowns: how users became its sequences; saved with it, so that new users
            become them alike.
        base: with LoRA, the digest of the decoder's weights that it is saved with; of ``decoder`` by default.
    """

    decoder: Any  # a PreTrainedModel, or peft's wrapper around one

    def __init__(
        self,
        decoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        recipe: recipes.Recipe,
        *,
        features: int | None,
        lora: Lora | None = None,
        answer_mask: AnswerMask = "same",
        template: Template | None = None,
        history_days: int | None = None,
        breakdowns: bool = False,
        base: str | None = None,
    ) -> None:
        super().__init__()
        if answer_mask not in get_args(AnswerMask):
            raise EncoderError(
                f"answer_mask: {answer_mask!r} is not one of {', '.join(get_args(AnswerMask))}"
            )
        check_mask(decoder)
        self.tokenizer = tokenizer
        self.recipe = recipe
        self.features = features
        self.answer_mask = answer_mask
        self.template, self.history_days, self.breakdowns = template, history_days, breakdowns
        added = tokenizer.get_added_vocab()
        if lacking := [token for token in SPECIAL_TOKENS if token not in added]:
            raise EncoderError(f"tokenizer: {', '.join(lacking)} missing; add all of template.SPECIAL_TOKENS")
        self.ids: dict[str, int] = {token: added[token] for token in SPECIAL_TOKENS}
        embeddings: Any = decoder.get_input_embeddings()
        self.adapters = Adapters(features, embeddings) if features is not None else None
        self.lora = lora
        self.base = None if lora is None else base or _sha256("", decoder.state_dict())
        self.decoder = decoder if lora is None else _with_lora(decoder, lora, sorted(self.ids.values()))

    @property
    def hidden_size(self) -> int:
        """d."""
        return self.decoder.config.hidden_size

    def embed_tokens(self, batch: Batch) -> Tensor:
        """Float[B, L, d]: token embeddings, with each record's soft token in its place."""
        embedded = self.decoder.get_input_embeddings()(batch.input_ids)
        if self.adapters is None:
            return embedded
        return self.adapters.insert(embedded, batch, self.ids[RECORD_TOKEN])

    def forward(
        self,
        batch: Batch,
        *,
        tower: recipes.Tower = "user",
        step: int | None = None,
        weights: Tensor | None = None,
        site: str | None = None,
        causal: bool = False,
    ) -> Output:
        """Encode one tower.

        Args:
            batch: padded sequences, L tokens.
            tower: whose template this is.
            step: training step t, or None for the mask of inference.
            weights: Float[B, L], guidance weights for recipes that use them.
            site: also return the hidden states at this ``grad_site``.
            causal: ignore the recipe and mask as in pre-training (the probe pass of two_pass).

        Raises:
            collation.NoToken, collation.TwoTokens: a row whose read-out token is not there exactly once.
            EncoderError: a sequence longer than the recipe was built for.
            NotFinite: an embedding that is NaN or infinite, with the row.
        """
        read_out = self._read_out(batch, tower)
        longest = int(batch.valid.sum(1).max())
        if longest > self.recipe.max_length:  # a span or frozen weights would end before the sequence does
            raise EncoderError(
                f"input_ids: a sequence of {longest} tokens ({tower}), and the recipe was built for at most "
                f"{self.recipe.max_length}; truncate with encode_user or raise template.max_user_tokens"
            )
        hidden, valid, segments = self.embed_tokens(batch), batch.valid, batch.segments
        if self.recipe.prefix is not None and tower == "user":
            hidden, valid, segments = _prepend(self.recipe.prefix, hidden, valid, segments)
            read_out = read_out + 1
        view = recipes.View(valid, segments, hidden, step, tower, weights)
        visibility = self._visibility(view, causal)
        bias = masks.additive_bias(visibility, valid, _compute_dtype(hidden))
        with self._capture(site) as captured:
            states = self.decoder(
                inputs_embeds=hidden, attention_mask=bias, position_ids=positions(valid), use_cache=False
            ).last_hidden_state
        row = torch.arange(len(states), device=states.device)
        read = states[row, read_out]
        read = read.to(torch.promote_types(read.dtype, torch.float32))
        finite = torch.isfinite(read).all(1)
        if not bool(finite.all()):
            raise NotFinite(
                f"hidden state: not finite at the read-out of row {int((~finite).nonzero()[0])} ({tower})"
            )
        sites = dict(zip(OUTER_SITES, (hidden, states), strict=True)) | captured
        chosen = None if site is None else sites[site]
        return Output(nn.functional.normalize(read, dim=1), chosen, visibility, valid)

    @torch.inference_mode()
    def embed(self, batch: Batch, tower: recipes.Tower = "user") -> Tensor:
        """Float[B, d]: frozen embeddings under the mask of inference."""
        was_training = self.training
        self.eval()
        try:
            return self(batch, tower=tower).embedding
        finally:
            self.train(was_training)

    def attention_of_read_out(self, batch: Batch) -> Tensor:
        """Float[B, L]: how much ``<USER>`` attends to each of n tokens under the causal mask, as norms.

        The mean over blocks and heads, which sums to 1, times n: of mean 1, so that a long sequence does not
        have small weights.
        """
        hidden, valid = self.embed_tokens(batch), batch.valid
        bias = masks.additive_bias(masks.causal(valid), valid, _compute_dtype(hidden))
        with self.eager():
            states = self.decoder(
                inputs_embeds=hidden,
                attention_mask=bias,
                position_ids=positions(valid),
                use_cache=False,
                output_attentions=True,
            )
        row = torch.arange(len(valid), device=valid.device)
        read_out = self._read_out(batch, "user")
        paid = torch.stack([block[row, :, read_out].float().mean(1) for block in states.attentions]).mean(0)
        return paid * valid.sum(1, keepdim=True)

    @contextmanager
    def eager(self) -> Iterator[Any]:
        """The plain decoder, computed meanwhile in the one way that hands its attention over."""
        base = self._base()
        backend = base.config._attn_implementation
        base.set_attn_implementation("eager")
        try:
            yield base
        finally:
            base.set_attn_implementation(backend)

    def _visibility(self, view: recipes.View, causal: bool) -> Tensor:
        if causal or (view.tower == "answer" and self.answer_mask == "causal"):
            return masks.causal(view.valid)
        if view.tower == "answer" and self.answer_mask == "bidirectional":
            return masks.bidirectional(view.valid)
        return self.recipe.visibility(view)

    def _read_out(self, batch: Batch, tower: recipes.Tower) -> Tensor:
        """Long[B]: where ``<USER>`` (Eq. 12) or ``<EOS>`` (Eq. 14) stands."""
        token = USER_TOKEN if tower == "user" else EOS_TOKEN
        return locate(batch.input_ids, self.ids[token], token)

    @contextmanager
    def _capture(self, site: str | None) -> Iterator[dict[str, Tensor]]:
        captured: dict[str, Tensor] = {}
        if site in (None, *OUTER_SITES):
            yield captured
            return
        blocks: Any = self._base().layers
        index = re.fullmatch(r"layer:(\d+)", site)
        if index is None or int(index[1]) >= len(blocks):
            raise EncoderError(
                f"grad_site: {site!r} is not one of {', '.join(OUTER_SITES)}, layer:0 to "
                f"layer:{len(blocks) - 1}"
            )

        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            captured[site] = output if isinstance(output, Tensor) else output[0]

        handle = blocks[int(index[1])].register_forward_hook(keep)
        try:
            yield captured
        finally:
            handle.remove()

    def _base(self) -> PreTrainedModel:
        return self.decoder if self.lora is None else self.decoder.get_base_model()

    def trained_state(self) -> dict[str, Tensor]:
        """All that a checkpoint needs: with LoRA, not the frozen decoder.

        Under FSDP2 the processes gather it, so all must ask.
        """
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        left_out = frozen if self.lora is not None else set()
        return {name: whole(tensor) for name, tensor in self.state_dict().items() if name not in left_out}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of ``trained_state``. A key missing, unexpected or misshapen: ``EncoderError``."""
        expected = self.trained_state()
        missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
        misshapen = sorted(k for k in expected.keys() & state.keys() if expected[k].shape != state[k].shape)
        if missing or unexpected or misshapen:
            raise EncoderError(
                f"checkpoint does not fit the encoder: missing {missing[:3]}, unexpected {unexpected[:3]}, "
                f"other shape {misshapen[:3]} (of {len(missing)}, {len(unexpected)}, {len(misshapen)})"
            )
        own = self.state_dict()
        self.load_state_dict({k: spread_like(v, own[k]) for k, v in state.items()}, strict=False)

    def merged(self) -> UserEncoder:
        """A copy whose LoRA update lies in the decoder's own weights, added in fp32.

        Rounding moves a coordinate of an embedding by at most 1e-4 (SmolLM2, 30 layers). What it saves needs
        no ``base``. Raises ``EncoderError`` without LoRA.
        """
        if self.lora is None:
            raise EncoderError("lora: this encoder has none, so there is nothing to merge")
        other = copy.deepcopy(self).float().eval()
        other.decoder, other.lora = other.decoder.merge_and_unload(safe_merge=True), None
        other.base = None
        return other

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write weights (safetensors), recipe with its state, tokenizer and configuration into ``folder``.

        ``state`` is that of ``trained_state``, given where all processes gathered it and one writes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        state = state if state is not None else self.trained_state()
        save_file({k: v.contiguous() for k, v in state.items()}, folder / "encoder.safetensors")
        self._base().config.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        described = json.dumps(self.description(), indent=2)
        (folder / "encoder.json").write_text(described + "\n", encoding="utf-8")

    def description(self) -> dict[str, Any]:
        """What makes this encoder, beside its weights, tokenizer and the decoder's configuration."""
        return {
            "recipe": self.recipe.name,
            "options": self.recipe.options.model_dump(),
            "total_steps": self.recipe.total_steps,
            "max_length": self.recipe.max_length,
            "features": self.features,
            "lora": self.lora.model_dump() if self.lora is not None else None,
            "answer_mask": self.answer_mask,
            "template": self.template.model_dump() if self.template is not None else None,
            "history_days": self.history_days,
            "breakdowns": self.breakdowns,
            "base": self.base,
            "attention": self._base().config._attn_implementation,
        }

    def fingerprint(self) -> str:
        """Hex sha256 of all that makes an embedding, each weight's bytes included, also the frozen ones."""
        # Without what tells how it came here, and what each call of the tokenizer sets anew.
        config = self._base().config.to_dict() | dict.fromkeys(("_name_or_path", "architectures", "dtype"))
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= dict.fromkeys(("padding", "truncation"))
        return _sha256(digest([self.description(), config, tokenizer]), self.state_dict())

    @classmethod
    def load(cls, folder: Path, base: Path | None = None) -> UserEncoder:
        """Read what ``save`` wrote, ready for ``embed``.

        With LoRA, ``base`` is the folder of the decoder it was trained on: only the update was saved.
        Raises ``EncoderError`` for a folder that is none or damaged, by file and field, and for a ``base``
        that is another decoder or not wanted.
        """
        with _reading(folder / "encoder.json") as file:
            description = _Description.model_validate_json(file.read_bytes())
        if description.lora is None:
            if base is not None:
                raise EncoderError(f"base: {base} given, and {folder.name} has no LoRA; leave base out")
            with _reading(folder / "config.json"):
                config = AutoConfig.from_pretrained(folder)
                decoder = AutoModel.from_config(config, attn_implementation=description.attention)
        elif base is None or not base.is_dir():  # what is no folder would be looked for on a hub
            raise EncoderError(
                f"{folder.name}: holds LoRA weights only, and base is {base or 'missing'}, no folder; give "
                f"{_BASE}"
            )
        else:
            with _reading(base, f"give {_BASE}"):
                decoder = load_decoder(base, description.attention)
            if _sha256("", decoder.state_dict()) != description.base:
                raise EncoderError(
                    f"base: {base} holds other weights than the decoder that {folder.name} was trained on; "
                    f"give {_BASE}"
                )
        name = description.recipe
        if name not in recipes.RECIPES:
            raise EncoderError(
                f"{folder.name}: was trained with recipe {name!r}, which is not registered here"
            )
        with _reading(folder / "encoder.json"):
            recipe = recipes.build(
                name,
                recipes.RECIPES[name].section.model_validate(description.options),
                total_steps=description.total_steps,
                hidden_size=decoder.config.hidden_size,
                max_length=description.max_length,
            )
        with _reading(folder / "tokenizer.json"):
            # AutoTokenizer would choose a class by model type, and with it another way to split text.
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        encoder = cls(
            decoder,
            tokenizer,
            recipe,
            features=description.features,
            lora=description.lora,
            answer_mask=description.answer_mask,
            template=description.template,
            history_days=description.history_days,
            breakdowns=description.breakdowns,
            base=description.base,
        )
        with _reading(folder / "encoder.safetensors") as file:
            encoder.load_trained_state(load_file(file))
        return encoder.eval()


_REMEDY = "give a folder that UserEncoder.save of this version wrote, or train the encoder anew"
_BASE = "the folder of its decoder, a run of stage pretrain"


class _Description(BaseModel):
    """``UserEncoder.description``, as its file must have it."""

    model_config = ConfigDict(strict=True)

    recipe: str
    options: dict[str, Any]
    total_steps: int
    max_length: PositiveInt
    features: PositiveInt | None
    lora: Lora | None
    answer_mask: AnswerMask
    template: Template | None
    history_days: PositiveInt | None
    breakdowns: bool
    base: str | None
    attention: str


@contextmanager
def _reading(file: Path, remedy: str = _REMEDY) -> Iterator[Path]:
    """Whatever a library makes of a missing or damaged ``file`` of an encoder, as ``EncoderError``."""
    try:
        yield file
    except ValidationError as error:
        faults = "; ".join(": ".join(map(str, (*fault["loc"], fault["msg"]))) for fault in error.errors())
        raise EncoderError(f"{file}: {faults}; {remedy}") from None
    except Exception as error:  # tokenizers raises no other kind
        raise EncoderError(f"{file}: missing or damaged ({error}); {remedy}") from error


def _sha256(text: str, state: Mapping[str, Tensor]) -> str:
    """Hex sha256 of ``text`` and of each weight: its name, type, shape and bytes."""
    made = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        made.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        made.update(whole(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


def load_decoder(folder: Path, attention: str) -> PreTrainedModel:
    """The decoder of a Hugging Face folder, without its language-model head, in fp32."""
    return AutoModel.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32, use_safetensors=True
    )


def _with_lora(decoder: PreTrainedModel, lora: Lora, token_ids: list[int]) -> Any:
    """Low-rank updates on the named linear layers, and trainable rows for the template's tags."""
    from peft import LoraConfig, get_peft_model  # slow to import, and only LoRA needs it

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.targets),
        trainable_token_indices={"embed_tokens": token_ids},
    )
    return get_peft_model(decoder, config)


def _prepend(
    prefix: Tensor, hidden: Tensor, valid: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Put the recipe's global token in front of every row."""
    rows = len(hidden)
    return (
        torch.cat([prefix.to(hidden.dtype).expand(rows, 1, -1), hidden], dim=1),
        torch.cat([valid.new_ones(rows, 1), valid], dim=1),
        torch.cat([segments.new_full((rows, 1), recipes.GLOBAL_SEGMENT), segments], dim=1),
    )


def _compute_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype attention runs in: autocast's if it is on, else that of the hidden states."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
