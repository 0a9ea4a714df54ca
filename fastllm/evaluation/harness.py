"""The model "fastllm" of lm-evaluation-harness, for the tasks that fastllm does not have itself.

    python -m fastllm.evaluation.harness --model fastllm --model_args pretrained=MODEL --tasks ifeval

is the harness's own command line, which knows that model; ``lm_eval.simple_evaluate(model=FastllmLM("MODEL"), …)`` is
the same from Python.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..hardware import compute_dtype
from .models import Model, load_model
from .perplexity import windows
from .scoring import Scored
from .task import Generation

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError:
    raise UserError("lm-evaluation-harness is not installed: pip install lm-eval") from None

MAX_TOKENS = 256  # of an answer, where a task says nothing


@register_model("fastllm")
class FastllmLM(TemplateLM):
    """A model of fastllm, as lm-evaluation-harness calls models.

    Args:
        pretrained: a run folder, a GGUF file, or a Hugging Face folder.
        dtype: of the weights; "auto": bfloat16 where the device multiplies it.
        device: None: a GPU where there is one.
        max_length: tokens that the model sees; None: its own limit.
        others: what the harness passes to every model, such as ``batch_size``, is without effect.
    """

    def __init__(
        self, pretrained: str | Model, *, dtype: str = "auto", device: str | None = None, max_length: int | None = None,
        **others: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        cuda = torch.cuda.is_available()  # the harness asks for it by default
        self._device = torch.device(device if device and (cuda or "cuda" not in device) else "cuda" if cuda else "cpu")
        if isinstance(pretrained, str):
            chosen = compute_dtype(self._device) if dtype == "auto" else getattr(torch, dtype)
            pretrained = load_model(Path(pretrained), self._device, chosen)
        self.model = pretrained
        self.tokenizer = pretrained.tokenizer
        self.max_length = min(max_length or pretrained.max_seq_len, pretrained.max_seq_len)
        self._templated = False

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What comes before the first token of a text."""
        return (self.model.tokenizer.encode("") or [self.eot_token_id])[0]

    @property
    def tokenizer_name(self) -> str:
        return self.model.tokenizer.fingerprint

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        if self._templated:
            return tokenizer.encode_with_special(string)
        return tokenizer.encode(string, add_special_tokens=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str:
        template = self.model.tokenizer.chat_template
        return template.source if template is not None and chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        template = self.model.tokenizer.chat_template
        if template is None:
            raise UserError(f"{self.model.name} has no chat template: it was not trained to chat")
        self._templated = True  # from now on prompts are texts with control tokens
        return template.render(chat_history, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        sequences = []
        for _, context, continuation in requests:
            tokens = [*context, *continuation][-self.max_length - 1 :]  # cut off on the left, as the harness does
            sequences.append(Scored(tokens, max(len(tokens) - len(continuation), 1)))
        found = self._scores(sequences)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        parts, owner = [], []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            found = [*windows(tokens, [self.prefix_token_id], self.max_length, self.max_length)] if tokens else []
            parts += found
            owner += [place] * len(found)
        totals = [0.0] * len(requests)
        for place, (log_prob, _) in zip(owner, self._scores(parts), strict=True):
            totals[place] += log_prob
        return totals

    def _scores(self, sequences: Sequence[Scored]) -> list[tuple[float, bool]]:
        scores = {place: (*score,) for _, found in self.model.score(sequences) for place, score in found}
        return [scores[place] for place in range(len(sequences))]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = [""] * len(requests)
        kinds: dict[Generation, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            kinds[_generation(request.args[1])].append(place)
        for how, places in kinds.items():
            room = self.max_length - how.max_tokens
            if room < 1:
                raise UserError(f"answers of {how.max_tokens} tokens leave no room in a context of {self.max_length}")
            prompts = [self.tok_encode(requests[place].args[0])[-room:] for place in places]
            for i, text in self.model.generate([p or [self.prefix_token_id] for p in prompts], how):
                answers[places[i]] = text
                self.cache_hook.add_partial("generate_until", requests[places[i]].args, text)
        return answers


def _generation(options: dict[str, Any]) -> Generation:
    if options.get("do_sample") and options.get("temperature", 1.0) > 0:
        raise UserError("the model fastllm answers with the most likely tokens: this task asks for samples")
    stop = options.get("until") or ()
    most = next(
        (options[key] for key in ("max_gen_toks", "max_new_tokens", "max_tokens") if options.get(key)), MAX_TOKENS
    )
    return Generation(max_tokens=int(most), stop=(stop,) if isinstance(stop, str) else tuple(stop))


if __name__ == "__main__":
    import sys

    import lm_eval.models  # noqa: F401  # registers the harness's own, which it does only where there are none
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"fastllm: error: {error}")
