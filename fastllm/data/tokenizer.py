"""A byte-level BPE tokenizer (Hugging Face ``tokenizers``)."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from ..errors import UserError
from ..files import write_atomic
from ..input_files import one_line
from .chat_template import ChatTemplate
from .pieces import DIGITS, Cutter, split_pattern
from .progress import Progress, interruptible, progress
from .tokenizer_file import read_tokenizer
from .tokenizer_sample import Sample

EOS_TOKEN = "<|endoftext|>"  # before and after each document, and where generation stops
EOS_TOKENS = (EOS_TOKEN, "<|end_of_text|>", "</s>", "<｜end▁of▁sentence｜>")  # Llama 3's, Mistral's, DeepSeek's
BATCH = 2**20  # characters that are encoded at a time

# Special tokens that a chat needs: ChatML's, and more that later training may give a meaning.
END_OF_TURN = "<|im_end|>"
CHAT_TOKENS = ("<|im_start|>", END_OF_TURN, *(f"<|reserved_{n}|>" for n in range(13)))


class Tokenizer:
    """Text to token ids and back, exactly: every text is a sequence of bytes, and all 256 bytes are tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, eos_ids: tuple[int, ...] = ()) -> None:
        """``eos_ids``: tokens that end a text, by default EOS_TOKEN. The first also begins a text without a prompt."""
        self.backend = backend
        self.backend.encode_special_tokens = True  # "<|endoftext|>" in a text is text
        self.eos_ids: tuple[int, ...] = eos_ids or (_id_of(backend, EOS_TOKEN),)
        self.eos_id: int = self.eos_ids[0]
        self.vocab_size: int = max(backend.get_vocab().values(), default=-1) + 1  # some leave ids out
        self.chat_template: ChatTemplate | None = None  # how a chat becomes a prompt, where the model knows chats
        self._with_prefix: dict[bytes, tuple[int, ...]] = {}
        self._special = {t: added.content.encode() for t, added in backend.get_added_tokens_decoder().items()}

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, *, digits: int = 3, chat: bool = False, characters: int = 0
    ) -> Tokenizer:
        """Train on ``texts``, which are read once. The vocabulary is smaller where they have too few merges.

        Memory doesn't grow with the text: of one with very many different words an evenly spaced sample is used.

        Args:
            texts: any number of them.
            vocab_size: tokens, with 256 bytes and the special ones.
            digits: that a token has at most, 1 to 3.
            chat: reserve CHAT_TOKENS.
            characters: how many the texts have, where known, for the display.

        Raises:
            UserError: ``vocab_size`` is too small, or a text has a lone surrogate.
        """
        special = [EOS_TOKEN, *(CHAT_TOKENS if chat else ())]
        if vocab_size < 256 + len(special):
            names = EOS_TOKEN + f" and {len(CHAT_TOKENS)} for chats" * chat
            raise UserError(
                f"a tokenizer has at least {256 + len(special)} tokens (256 bytes and {names}), not {vocab_size}"
            )
        if digits not in DIGITS:
            raise UserError(f"a token has at most 1, 2 or 3 digits, not {digits}")
        backend = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(split_pattern(digits)), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        backend.decoder = decoders.ByteLevel()
        with progress("tokenizer: words", 2 * characters) as bar:
            sample = Sample(Cutter(backend))
            for size in sample.add(texts):
                bar.advance(size)
            trainer = trainers.BpeTrainer(
                vocab_size=min(vocab_size, 256 + len(special) + 4 * sample.characters),  # the library allocates them
                special_tokens=special,
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            )
            interrupted, merging = threading.Event(), threading.Event()
            pieces = _until(sample, bar, interrupted, merging)
            interruptible(partial(backend.train_from_iterator, pieces, trainer), bar.advance, interrupted, merging)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, eos_ids: tuple[int, ...] = ()) -> Tokenizer:
        """The tokenizer in a tokenizer.json. Truncation, padding and dropout that the file asks for stay off.

        ``eos_ids``: see :class:`Tokenizer`; without them the file must have one of EOS_TOKENS.
        """
        backend = read_tokenizer(path)
        if not eos_ids:
            known = [token for token in map(backend.token_to_id, EOS_TOKENS) if token is not None]
            if not known:
                raise UserError(f"the tokenizer {path} has no token {EOS_TOKEN}, nor {', '.join(EOS_TOKENS[1:])}")
            eos_ids = (known[0],)
        return cls(backend, eos_ids)

    def save(self, path: str | Path) -> None:
        write_atomic(path, self.backend.to_str(pretty=True).encode())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary and merges, in hexadecimal: the tokens that a model was trained on.

        Other settings and the form of the file don't change it.
        """
        merges = json.loads(self.backend.to_str())["model"].get("merges", [])
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]  # older files: "a b"
        vocabulary = sorted(self.backend.get_vocab().items())
        return hashlib.sha256(json.dumps([vocabulary, pairs]).encode()).hexdigest()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of ``text``. Special tokens in it are text.

        Args:
            text: TypeError where it has a lone surrogate.
            add_special_tokens: those that the tokenizer's post-processor puts around a text, such as Llama's BOS.
        """
        encode = partial(self.backend.encode, add_special_tokens=add_special_tokens)
        try:
            return [i for piece in self._cutter.cut(text) for i in encode(piece).ids]
        except (TypeError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # where the library panics
            raise UserError(f"the tokenizer can't encode the text: {one_line(error)}") from None

    def encode_with_special(self, text: str) -> list[int]:
        """The ids of ``text``, in which the text of a special token is that token. Nothing is put around them."""
        ids: list[int] = []
        for part in self.split_special(text):
            ids += [part] if isinstance(part, int) else self.encode(part, add_special_tokens=False)
        return ids

    def split_special(self, text: str) -> Iterator[int | str]:
        """The special tokens in ``text``, and the text between them."""
        end = 0
        for found in self._special_pattern.finditer(text):
            token, added = self.special_tokens[found[0]]
            before = text[end : found.start()]
            if before := before.rstrip() if added.lstrip else before:
                yield before
            yield token
            end = found.end()
            while added.rstrip and end < len(text) and text[end].isspace():
                end += 1
        if end < len(text):
            yield text[end:]

    @cached_property
    def special_tokens(self) -> dict[str, tuple[int, tokenizers.AddedToken]]:
        """The special tokens by their texts."""
        added = self.backend.get_added_tokens_decoder().items()
        return {entry.content: (token, entry) for token, entry in added if entry.special and entry.content}

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def encode_batch(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each text, on all cores."""
        ids: list[np.ndarray] = []  # of a text that other pieces are left of
        for piece, last in self.encode_pieces(texts):
            ids.append(piece)
            if last:
                yield np.concatenate(ids) if len(ids) > 1 else ids[0]
                ids = []

    def encode_pieces(self, texts: Iterable[str]) -> Iterator[tuple[np.ndarray, bool]]:
        """The ids of each text, in pieces, and whether each is the last of its text. Long texts take no more memory."""
        with ThreadPoolExecutor(1) as pool:  # a batch is encoded while the one before is taken apart
            running: tuple[list[bool], Future[list[tokenizers.Encoding]]] | None = None
            for batch in self._batches(texts):
                following = [last for _, last in batch], pool.submit(self._encode_batch, [piece for piece, _ in batch])
                if running:
                    yield from _ids(*running)
                running = following
            if running:
                yield from _ids(*running)

    def _encode_batch(self, pieces: list[str]) -> list[tokenizers.Encoding]:
        """What the library makes of the pieces, which takes 100 times the memory of the ids."""
        try:
            return self.backend.encode_batch_fast(pieces)
        except TypeError:
            raise
        except BaseException as error:  # where the library panics
            raise UserError(f"the tokenizer can't encode a text: {one_line(error)}") from None

    def _batches(self, texts: Iterable[str]) -> Iterator[list[tuple[str, bool]]]:
        """The pieces of ``texts``, some BATCH characters at a time, and whether each is the last of its text."""
        batch, size = [], 0
        for text in texts:
            for start, stop in self._cutter.spans(text):
                batch.append((text[start:stop], stop == len(text)))
                size += stop - start
                if size >= BATCH or len(batch) >= 1024:
                    yield batch
                    batch, size = [], 0
        yield batch

    @cached_property
    def _cutter(self) -> Cutter:
        return Cutter(self.backend)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, ids)).decode(errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of a token; none for an id without a token, because models round their vocabulary up."""
        if token in self._special:
            return self._special[token]
        text = self.backend.id_to_token(token) or ""
        try:
            return bytes(BYTE_OF[c] for c in text)
        except KeyError:  # the library's decoder takes such a token for plain text
            return text.encode()

    def with_prefix(self, prefix: bytes) -> tuple[int, ...]:
        """The tokens that begin with ``prefix`` and are longer."""
        if prefix not in self._with_prefix:  # it takes 0.2 seconds
            tokens = ((t, self.token_bytes(t)) for t in range(self.vocab_size))
            found = (t for t, text in tokens if text.startswith(prefix) and len(text) > len(prefix))
            self._with_prefix[prefix] = tuple(found)
        return self._with_prefix[prefix]

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Tokens that no text is encoded to."""
        added = self.backend.get_added_tokens_decoder().items()
        return frozenset(token for token, entry in added if entry.special)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text of each token, int64 ``[vocab_size]``; 0 for the end-of-text token."""
        return np.array([0 if t == self.eos_id else len(self.token_bytes(t)) for t in range(self.vocab_size)])


def _ids(lasts: list[bool], encodings: Future[list[tokenizers.Encoding]]) -> Iterator[tuple[np.ndarray, bool]]:
    for encoding, last in zip(encodings.result(), lasts, strict=True):
        yield np.array(encoding.ids, np.uint32), last


def _until(sample: Sample, bar: Progress, interrupted: threading.Event, merging: threading.Event) -> Iterator[str]:
    """The pieces of ``sample``. Raises KeyboardInterrupt once ``interrupted`` is set; sets ``merging`` at the end."""
    # The library asks for 256 pieces ahead, and works on them before it looks at what was raised.
    for piece in sample.pieces():
        if interrupted.is_set():
            raise KeyboardInterrupt
        yield piece
        bar.advance(len(piece))
    sample.blocks.clear()
    bar.enter("tokenizer: merges")
    merging.set()


def _id_of(backend: tokenizers.Tokenizer, token: str) -> int:
    found = backend.token_to_id(token)
    if found is None:
        raise UserError(f"the tokenizer has no token {token}")
    return found


def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes are themselves, the others are characters from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF = _byte_of()
