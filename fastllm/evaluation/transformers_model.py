"""Models of transformers that are not fastllm's GPT: padded batches of sequences of like lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig

from ..data.tokenizer import Tokenizer
from ..errors import UserError
from .scoring import Score, Scored
from .task import Generation

ROWS = 2048  # tokens of a batch, padding included
GPU_ROWS = 16384
ANSWERS = 16  # generated at once


class TransformersModel:
    """Scores and answers with a causal language model of transformers.

    Sequences that differ in their last token alone, such as the letters of MMLU, are computed once. Shared beginnings
    are not: their caches differ from model to model.

    Args:
        model: in eval mode; :func:`fastllm.patch` may have put kernels into it.
        tokenizer: of the model.
        name: for results.
    """

    def __init__(self, model: Any, tokenizer: Tokenizer, name: str) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        config = model.config.get_text_config()
        lengths = (getattr(config, key, None) for key in ("max_position_embeddings", "n_positions", "max_seq_len"))
        self.max_seq_len = next((n for n in lengths if isinstance(n, int) and n > 0), 2048)
        # Not what the folder says of sampling and penalties, which generate() would take.
        model.generation_config = GenerationConfig()
        self.rows = GPU_ROWS if model.device.type == "cuda" else ROWS

    @torch.inference_mode()
    def is_causal(self) -> bool:
        """Whether a token's logits are the same whatever follows it."""
        tokens = torch.tensor([[1, 2, 3], [1, 2, 4]], device=self.model.device) % self.tokenizer.vocab_size
        logits = self.model(tokens, use_cache=False).logits[:, :2]
        rounding = max(1e-5, 2 * torch.finfo(logits.dtype).eps)
        return bool((logits[0] - logits[1]).abs().max() <= rounding * logits.abs().max())

    def plan(self, sequences: Sequence[Scored]) -> int:
        return sum(len(inputs) for inputs in _by_inputs(sequences))

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> Iterator[tuple[int, list[tuple[int, Score]]]]:
        """See :class:`~fastllm.evaluation.scoring.Scorer`; UserError where logits are not finite."""
        groups = _by_inputs(sequences)
        batch: list[tuple[int, ...]] = []
        for inputs in sorted(groups, key=len):
            if batch and (len(batch) + 1) * len(inputs) > self.rows:
                yield sum(map(len, batch)), self._compute(batch, groups, sequences)
                batch = []
            batch.append(inputs)
        if batch:
            yield sum(map(len, batch)), self._compute(batch, groups, sequences)

    def _compute(
        self, batch: list[tuple[int, ...]], groups: dict[tuple[int, ...], list[int]], sequences: Sequence[Scored]
    ) -> list[tuple[int, Score]]:
        device = self.model.device
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(inputs) for inputs in batch], batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor([[len(inputs)] for inputs in batch])
        logits = self.model(tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits
        found = []
        for inputs, row in zip(batch, logits, strict=True):
            least = min(sequences[place].start for place in groups[inputs])
            log_probs = row[least - 1 : len(inputs)].float().log_softmax(-1)
            likeliest = log_probs.argmax(-1).cpu()
            for place in groups[inputs]:
                own, start = sequences[place]
                targets = torch.tensor([*own[start:]])
                part = log_probs[start - least :].gather(1, targets[:, None].to(device))
                total = float(part.double().sum())
                if not np.isfinite(total):
                    raise UserError("the model's logits are not finite: its weights or its dtype are at fault")
                found.append((place, Score(total, bool((likeliest[start - least :] == targets).all()))))
        return found

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], how: Generation) -> Iterator[tuple[int, str]]:
        """See :class:`~fastllm.evaluation.models.Model`."""
        places = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        eos = list(self.tokenizer.eos_ids)
        for first in range(0, len(places), ANSWERS):
            chosen = places[first : first + ANSWERS]
            longest = max(len(prompts[place]) for place in chosen)
            tokens = torch.full((len(chosen), longest), eos[0])
            mask = torch.zeros_like(tokens)
            for row, place in enumerate(chosen):
                tokens[row, longest - len(prompts[place]) :] = torch.tensor(prompts[place])
                mask[row, longest - len(prompts[place]) :] = 1
            answers = self.model.generate(
                tokens.to(self.model.device), attention_mask=mask.to(self.model.device), do_sample=False,
                max_new_tokens=how.max_tokens, eos_token_id=eos, pad_token_id=eos[0],
                stopping_criteria=[self._stopped(longest, how.stop)] if how.stop else None,
            )  # fmt: skip
            for place, answer in zip(chosen, answers[:, longest:].tolist(), strict=True):
                yield place, self._text(answer, how.stop)

    def _text(self, tokens: list[int], stop: Sequence[str]) -> str:
        """Up to the first token that ends a text, and the first stop text."""
        end = next((i for i, token in enumerate(tokens) if token in self.tokenizer.eos_ids), len(tokens))
        text = self.tokenizer.decode(tokens[:end])
        return text[: min((place for place in map(text.find, stop) if place >= 0), default=len(text))]

    def _stopped(self, start: int, stop: Sequence[str]) -> Any:
        def stopped(tokens: Tensor, scores: Any, **_: Any) -> Tensor:
            texts = (self.tokenizer.decode(row) for row in tokens[:, start:].tolist())
            return torch.tensor([any(word in text for word in stop) for text in texts], device=tokens.device)

        return stopped


def _by_inputs(sequences: Sequence[Scored]) -> dict[tuple[int, ...], list[int]]:
    """The places of the sequences by their tokens but the last."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (tokens, _) in enumerate(sequences):
        groups.setdefault((*tokens[:-1],), []).append(place)
    return groups
