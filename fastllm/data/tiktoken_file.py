"""tiktoken's rank files as Hugging Face's tokenizer.json.

A rank file has a line for each token, its bytes in base64 and its rank. tiktoken joins, again and again, the two
neighbours in a word that make the token of the lowest rank. Hugging Face's BPE joins pairs in the order of a list. So
the list has every pair of tokens that make up a token, in the order of the ranks of what they make.
"""

from __future__ import annotations

import base64
import binascii
import json
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from ..errors import UserError, did_you_mean
from ..input_files import read_bytes, shown
from .pieces import GPT2_SPLIT, LLAMA3_SPLIT, O200K_SPLIT
from .tokenizer import BYTE_OF, EOS_TOKEN, Tokenizer
from .tokenizer_file import FILE_LIMIT, MOST_TOKENS

# How each of OpenAI's encodings splits text, and its special tokens where the rank file is OpenAI's own, by its length.
PATTERNS = {"r50k": GPT2_SPLIT, "p50k": GPT2_SPLIT, "cl100k": LLAMA3_SPLIT, "o200k": O200K_SPLIT}
FIM = ("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
SPECIAL = {
    ("r50k", 50256): {EOS_TOKEN: 50256},
    ("p50k", 50280): {EOS_TOKEN: 50256},  # an id that the ranks leave out
    ("cl100k", 100256): {
        EOS_TOKEN: 100257,
        **dict(zip(FIM, range(100258, 100261), strict=True)),
        "<|endofprompt|>": 100276,
    },
    ("o200k", 199998): {EOS_TOKEN: 199999, "<|endofprompt|>": 200018},
}
LONGEST = 512  # bytes of a token: finding the pairs takes their number for each token


def convert_tiktoken(path: str | Path, pattern: str, special: dict[str, int] | None = None) -> Tokenizer:
    """The tokenizer of a rank file, with the ids that tiktoken gives.

    Args:
        path: the file: lines of a token in base64 and its rank.
        pattern: how text is split into words: r50k, p50k, cl100k or o200k.
        special: special tokens and their ids, EOS_TOKEN among them; by default OpenAI's own, and in a file of another
            length EOS_TOKEN behind the largest rank.

    Raises:
        UserError: the file is no rank file, or lacks one of the 256 bytes.
    """
    if pattern not in PATTERNS:
        raise UserError(f"there is no pattern {pattern!r}{did_you_mean(pattern, PATTERNS)}")
    ranks = read_ranks(path)
    if special is None:
        special = SPECIAL.get((pattern, len(ranks)), {EOS_TOKEN: max(ranks.values()) + 1})
    taken = set(ranks.values())
    for token, number in special.items():
        if number in taken:
            raise UserError(f"{path}: the special token {token} has the id {number} of another token")
        taken.add(number)
    letters = {byte: letter for letter, byte in BYTE_OF.items()}
    text = {token: "".join(map(letters.__getitem__, token)) for token in ranks}
    vocab = {text[token]: rank for token, rank in ranks.items()}
    merges = [(text[a], text[b]) for a, b in _merges(ranks)]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(PATTERNS[pattern]), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(_with_special(backend, special))


def _with_special(backend: tokenizers.Tokenizer, special: dict[str, int]) -> tokenizers.Tokenizer:
    """The library numbers added tokens itself; a file may give them any ids."""
    content = json.loads(backend.to_str())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    in_order = sorted(special.items(), key=lambda item: item[1])
    content["added_tokens"] = [{"id": number, "content": token, **flags} for token, number in in_order]
    content["model"]["vocab"] |= special
    return tokenizers.Tokenizer.from_str(json.dumps(content))


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """The tokens of a rank file and their ranks."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    for number, line in enumerate(read_bytes(path, FILE_LIMIT, "the ranks ").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            encoded, digits = line.split()
            token, rank = base64.b64decode(encoded, validate=True), int(digits)
        except (ValueError, binascii.Error):
            raise UserError(f"{path}, line {number:,}, is not a token in base64 and its rank: {shown(line)}") from None
        if not token or len(token) > LONGEST or not 0 <= rank < MOST_TOKENS or token in ranks or rank in taken:
            raise UserError(f"{path}, line {number:,}: the token {shown(token)} or its rank {rank} can't be used")
        ranks[token] = rank
        taken.add(rank)
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path} is no complete rank file: it has no token for the byte {missing[0]}")
    return ranks


def _merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Every pair of tokens that make up a token, by the ranks of that, of the first and of the second."""
    found = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:n], token[n:]) for n in range(1, len(token))]
        pairs = [(a, b) for a, b in pairs if a in ranks and b in ranks]
        found += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found
