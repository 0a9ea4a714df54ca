"""The tokenizer of a GGUF file: a byte-level BPE, its special tokens and the chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..data.chat_template import ChatTemplate
from ..data.pieces import GPT2_SPLIT, LLAMA3_SPLIT, O200K_SPLIT, QWEN_SPLIT, SMOLLM_SPLIT
from ..data.tokenizer import Tokenizer
from ..data.tokenizer_file import MOST_TOKENS, parse_tokenizer
from ..errors import UserError
from ..input_files import Keys, one_line, shown
from .header import Header

PREFIX = "tokenizer.ggml."

# llama.cpp's names of pre-tokenizers, and the patterns that split a text, one after the other.
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", GPT2_SPLIT, r"\p{N}+", "[0-9][0-9][0-9]")
SPLITS: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "gpt-2": (GPT2_SPLIT,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "codeshell"), (SMOLLM_SPLIT,)),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "smaug-bpe"), (LLAMA3_SPLIT,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), (QWEN_SPLIT,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (O200K_SPLIT,)),
}
# Those whose words that are tokens are not merged, and whose texts begin with BOS unless the file says otherwise.
_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral")

# The kinds of tokens in tokenizer.ggml.token_type.
CONTROL, USER_DEFINED = 3, 4
# Control tokens that end an answer, whatever else the file says.
END_TOKENS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>", "</s>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip


def read_tokenizer(header: Header) -> Tokenizer:
    """The tokenizer of the file; UserError where it has none, or one of another kind."""
    path, keys = header.path, header.keys(PREFIX)
    kind = keys.values.get("model")
    if kind is None:
        raise UserError(f"{path} has no tokenizer: {PREFIX}model is not there")
    if kind != "gpt2":
        raise UserError(f"{path}: {PREFIX}model is {shown(kind)}; fastllm reads gpt2, which is a byte-level BPE")
    pre = keys.string("pre", "default")
    if pre not in SPLITS:
        raise UserError(f"{path}: {PREFIX}pre is {shown(pre)}; fastllm knows {', '.join(SPLITS)}")
    tokens = _strings(keys, "tokens")
    if not 1 <= len(tokens) <= MOST_TOKENS:
        raise UserError(f"{path}: {PREFIX}tokens has {len(tokens):,} tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise UserError(f"{path}: {PREFIX}tokens has {shown(twice)} twice")
    ids = {name: _token_id(keys, name, len(tokens)) for name in _NAMED}
    kinds = _kinds(keys, len(tokens), {ids[name] for name in ("bos", "eos", "eot", "eom")} - {None})
    ends = [ids["eos"], ids["eot"], ids["eom"]]
    ends += [vocab[token] for token in END_TOKENS if token in vocab and kinds[vocab[token]] == CONTROL]
    eos_ids = tuple(dict.fromkeys(token for token in ends if token is not None))
    if not eos_ids:
        raise UserError(f"{path}: {PREFIX}eos_token_id is not there, nor a token that is known to end a text")
    split = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in SPLITS[pre]]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": tokens[i], **flags, "special": bool(kinds[i] == CONTROL)}
            for i in np.flatnonzero((kinds == CONTROL) | (kinds == USER_DEFINED)).tolist()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, byte_level]},
        "post_processor": _around(keys, tokens, ids, pre),
        "decoder": byte_level,
        "model": {
            "type": "BPE", "vocab": vocab, "merges": _merges(keys), "ignore_merges": pre in _LLAMA3,
            "fuse_unk": False, "byte_fallback": False,
        },
    }  # fmt: skip
    tokenizer = Tokenizer(parse_tokenizer(json.dumps(content).encode(), Path(f"{path} (tokenizer.ggml)")), eos_ids)
    source = header.metadata.get("tokenizer.chat_template")
    if source is not None and not isinstance(source, str):
        raise UserError(f"{path}: tokenizer.chat_template must be a text, it is {shown(source)}")
    if source is not None:
        texts = {f"{name}_token": tokens[i] for name in ("bos", "eos", "unk", "pad") if (i := ids[name]) is not None}
        tokenizer.chat_template = ChatTemplate(source, texts)
    return tokenizer


# Keys of tokens.
_NAMED = {
    "bos": "bos_token_id", "eos": "eos_token_id", "eot": "eot_token_id", "eom": "eom_token_id",
    "unk": "unknown_token_id", "pad": "padding_token_id",
}  # fmt: skip


def _token_id(keys: Keys, name: str, count: int) -> int | None:
    key = _NAMED[name]
    value = keys.values.get(key)
    if value is None or value in (2**32 - 1, -1):  # none, as llama.cpp writes it
        return None
    return keys.integer(key, least=0, most=count - 1)


def _kinds(keys: Keys, count: int, special: set[Any]) -> np.ndarray:
    """What kind of token each is; in a file that doesn't say so, ``special`` ones alone are control tokens."""
    kinds = keys.values.get("token_type")
    if kinds is None:
        return np.array([CONTROL if i in special else 1 for i in range(count)])
    if not isinstance(kinds, np.ndarray) or kinds.dtype.kind not in "iu" or len(kinds) != count:
        raise UserError(f"{keys.path}: {PREFIX}token_type must be {count} whole numbers, one for each token")
    return kinds


def _around(keys: Keys, tokens: list[str], ids: dict[str, int | None], pre: str) -> dict[str, Any] | None:
    """What goes before and after an encoded text."""
    wanted = {"bos": keys.boolean("add_bos_token", pre in _LLAMA3), "eos": keys.boolean("add_eos_token")}
    for name, add in wanted.items():
        if add and ids[name] is None and f"add_{name}_token" in keys.values:
            raise UserError(f"{keys.path}: {PREFIX}add_{name}_token is true, but there is no {_NAMED[name]}")
    used = {name: i for name, add in wanted.items() if add and (i := ids[name]) is not None}
    if not used:
        return None
    text = {"Sequence": {"id": "A", "type_id": 0}}
    special = {name: {"SpecialToken": {"id": tokens[i], "type_id": 0}} for name, i in used.items()}
    parts = [*([special["bos"]] if "bos" in used else []), text, *([special["eos"]] if "eos" in used else [])]
    return {
        "type": "TemplateProcessing", "single": parts, "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in used.values()},
    }  # fmt: skip


def _merges(keys: Keys) -> list[list[str]]:
    merges = [merge.split(" ") for merge in _strings(keys, "merges")]
    for number, merge in enumerate(merges):
        if len(merge) != 2 or not all(merge):
            raise UserError(f"{keys.path}: {PREFIX}merges, number {number}, is no pair: {one_line(' '.join(merge))!r}")
    return merges


def _strings(keys: Keys, key: str) -> list[str]:
    values = keys.values.get(key)
    if not isinstance(values, list):
        raise UserError(f"{keys.path}: {PREFIX}{key} must be a list of strings, it is {shown(values)}")
    return values
