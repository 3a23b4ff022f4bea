"""The server that hostile clients meet: a small model, what it answers, and how its process fares."""

import contextlib
import json
import random
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from dsv3_jax.bench.hostile_acts import Known
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig
from dsv3_jax.data import tokenizer
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.model.params import init
from dsv3_jax.serving.generate import generate

SMALL = ModelConfig(
    vocab_size=512,
    model_dim=64,
    num_layers=2,
    num_dense_layers=1,
    ffn_dim=96,
    mla=MLAConfig(num_heads=2, q_latent_dim=32, kv_latent_dim=32, nope_head_dim=16, rope_head_dim=16, v_head_dim=16),
    moe=MoEConfig(num_experts=8, num_shared_experts=1, top_k=2, expert_dim=32, num_groups=2, groups_per_token=1),
    mtp_depth=0,
    max_position=512,
    yarn=None,
    init_std=0.3,
)
_LENGTHS = (1, 2, 17, 63, 64, 65, 100, 128, 190)
_NEW = 24


def export_small(folder: Path) -> list[Known]:
    """Writes a small model of random weights with a tokenizer of fewer tokens; returns greedy answers by generate."""
    variables = init(SMALL, jax.random.key(0), dtype=jnp.float32)
    words = (f"number {n} and number {n * n} make {n + n * n}.\n" for n in range(200))
    file = folder.parent / "tokenizer.json"
    file.write_text(tokenizer.train(words, vocab_size=400).to_json(), encoding="utf-8")
    save_pretrained(folder, SMALL, variables, dtype="float32", tokenizer=file)
    prompts = known_prompts(np.random.default_rng(0), SMALL.vocab_size)
    answers = generate(SMALL, variables, prompts, _NEW)
    return [Known(tuple(prompt), {}, tuple(answer.tolist())) for prompt, answer in zip(prompts, answers, strict=True)]


def known_prompts(rng: np.random.Generator, vocab_size: int) -> list[list[int]]:
    """Prompts of many lengths; some begin as others do, so that they meet in the prefix cache."""
    prompts = [rng.integers(0, vocab_size, length).tolist() for length in _LENGTHS]
    return prompts + [prompts[-1][:length] + prompts[2] for length in (64, 127, 128)]


def sampled(prompts: list[list[int]]) -> list[Known]:
    """Requests that draw with seeds; their answers are what the server gives first."""
    choose = random.Random(0)
    return [
        Known(tuple(prompt), {"temperature": 1.0, "top_p": choose.choice([1.0, 0.8]), "seed": number}, (0,) * _NEW)
        for number, prompt in enumerate(prompts)
    ]


def greedy(prompts: list[list[int]]) -> list[Known]:
    """The same without drawing."""
    return [Known(tuple(prompt), {}, (0,) * _NEW) for prompt in prompts]


def busy(url: str) -> tuple[float, float] | None:
    """Requests that run or wait, and the share of pages that they hold, as /metrics has them; None without."""
    with urllib.request.urlopen(url.removesuffix("/v1") + "/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        found = {sample.name.partition(":")[2]: sample.value for family in families for sample in family.samples}
    if "kv_cache_usage_perc" not in found:
        return None
    return found["num_requests_running"] + found["num_requests_waiting"], found["kv_cache_usage_perc"]


@contextlib.contextmanager
def health(host: str, port: int) -> Iterator[dict[str, Any]]:
    """Asks for /health all the while; after the block, what `health_probe` found."""
    script = Path(__file__).with_name("health_probe.py")
    probe = subprocess.Popen(
        [sys.executable, str(script), host, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = {}
    try:
        yield found
        found |= json.loads(probe.communicate(timeout=30)[0])
    finally:
        if probe.poll() is None:
            probe.kill()
            probe.communicate()


@contextlib.contextmanager
def resident_memory(process_id: int, period_s: float = 0.5) -> Iterator[list[int]]:
    """Bytes that the process holds in memory, again and again; empty where /proc does not say."""
    status, over, seen = Path(f"/proc/{process_id}/status"), threading.Event(), []

    def watch() -> None:
        while not over.wait(period_s) and status.exists():
            lines = status.read_text().splitlines()
            seen.extend(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def growth(seen: list[int], *, settled: float) -> float:
    """How much larger the end is than what came right behind the first `settled` share: largest over largest."""
    part = max(1, len(seen) // 10)
    first = int(settled * len(seen))
    return max(seen[-part:]) / max(seen[first : first + part]) - 1
