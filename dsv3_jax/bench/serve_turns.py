"""Tokens a second of generate, the engine, our server and peers, which take turns."""

import asyncio
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dsv3_jax.bench.goals import Line, at_least, at_most
from dsv3_jax.bench.load_client import Target, find, run
from dsv3_jax.bench.peer_client import Llama, has_module
from dsv3_jax.bench.servers import free_port, our_server, server
from dsv3_jax.bench.timing import Stopwatch, median_ratio, take_turns
from dsv3_jax.bench.workload import Request, requests
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.serving import ServingConfig
from dsv3_jax.progress import progress
from dsv3_jax.serving.engine import Engine
from dsv3_jax.serving.generate import generate
from dsv3_jax.serving.params import SamplingParams
from dsv3_jax.typing import Variables

_PROMPT, _NEW = 32, 128
_PAIR, _PAIR_ROUNDS = ("engine top-p batch 8", "engine batch 8"), 3
"""They differ by less than two runs of either, so they take further turns side by side, so many a round."""
Programs = dict[str, Callable[[], float]]


@dataclasses.dataclass(frozen=True)
class Peers:
    """What else serves the same weights: an interpreter with transformers, and the folder it reads."""

    python: str
    folder: Path


def measure(
    cfg: RunConfig, variables: Variables, folder: Path, *, rounds: int, peers: Peers | None
) -> tuple[list[Line], dict[str, list[float]]]:
    """The lines on throughput, best of `rounds`, and the seconds of every program in every round.

    Args:
        variables: those of `folder`, which our server reads.
    """
    prompts = requests(
        np.random.default_rng(0), 32, vocab_size=cfg.model.vocab_size, max_length=512, lengths=(_PROMPT, _NEW)
    )
    with contextlib.ExitStack() as stack:
        engine = stack.enter_context(Engine(cfg.model, variables, ServingConfig(max_num_seqs=32)))
        invariant = stack.enter_context(Engine(cfg.model, variables, ServingConfig(batch_invariant=True)))
        programs = _in_process(cfg, variables, engine, invariant, prompts)
        ours = stack.enter_context(our_server(folder))
        target, _ = asyncio.run(find(ours.url, model=None, key=None, is_plain=False))
        programs |= {f"server batch {count}": _load(target, prompts[:count]) for count in (1, 8)}
        if peers is not None:
            programs |= _of_peers(peers, folder, prompts, stack)
        advance = stack.enter_context(progress("in turns", len(programs) * (rounds + 1) + 2 * _PAIR_ROUNDS * rounds))
        programs = {name: _advancing(program, advance) for name, program in programs.items()}
        take_turns(programs, rounds=1)  # compiles
        with _step_thread_time() as spent:
            engine.generate(_ids(prompts[:8]), _greedy(_NEW))
        memory = _memory_line(engine)
        seconds = take_turns(programs, rounds=rounds)
        pair = take_turns({name: programs[name] for name in _PAIR}, rounds=_PAIR_ROUNDS * rounds)
    lines = _lines(seconds, host_ms=1e3 * spent["seconds"] / _NEW)
    return [*lines, _pair_line(pair), memory], seconds


def _in_process(
    cfg: RunConfig, variables: Variables, engine: Engine, invariant: Engine, prompts: list[Request]
) -> Programs:
    def generating(count: int) -> Callable[[], float]:
        ids = np.array(_ids(prompts[:count]))
        return lambda: _timed(lambda: generate(cfg.model, variables, ids, _NEW))

    def serving(engine: Engine, count: int, params: SamplingParams) -> Callable[[], float]:
        return lambda: _timed(lambda: engine.generate(_ids(prompts[:count]), params))

    greedy, top_p = _greedy(_NEW), dataclasses.replace(_greedy(_NEW), temperature=1.0, top_p=0.9, seed=0)
    return {
        **{f"generate batch {count}": generating(count) for count in (1, 8)},
        **{f"engine batch {count}": serving(engine, count, greedy) for count in (1, 8, 16, 32)},
        "engine top-p batch 8": serving(engine, 8, top_p),
        **{f"engine batch-invariant batch {count}": serving(invariant, count, greedy) for count in (1, 8)},
    }


def _of_peers(peers: Peers, folder: Path, prompts: list[Request], stack: contextlib.ExitStack) -> Programs:
    """What the interpreter has: `transformers serve` on the folder, and llama.cpp in a process of its own."""
    programs: Programs = {}
    if has_module(peers.python, "transformers.cli.serve"):
        target = stack.enter_context(_transformers(peers))
        programs |= {f"transformers serve batch {count}": _load(target, prompts[:count]) for count in (1, 8)}
    if has_module(peers.python, "llama_cpp, gguf, safetensors"):
        file = peers.folder.with_suffix(".gguf")
        llama = stack.enter_context(Llama(peers.python, folder, file, threads=len(os.sched_getaffinity(0))))
        for count in (1, 8):
            rows = _ids(prompts[:count])
            programs[f"llama.cpp batch {count}"] = lambda rows=rows: llama.generate(rows, _NEW)[0]
    check(bool(programs), f"--peer {peers.python}: has neither transformers[serving] nor llama_cpp and gguf; give one.")
    return programs


def _memory_line(engine: Engine) -> Line:
    """The most that a step's program holds beside its arguments: a copy of the pool would be more than all of it."""
    runner = engine._runner
    steps = [program for program in runner._steps() if not program.name.startswith("sample")]
    found: list[Any] = [program.compile().memory_analysis() for program in steps]
    most = max(memory.temp_size_in_bytes for memory in found)
    return at_most("temporary memory of a compiled step, of the pool", 100 * most / runner._pages.nbytes, 10.0, "%")


def _lines(seconds: Mapping[str, list[float]], *, host_ms: float | None) -> list[Line]:
    rate = {name: int(name.rpartition(" ")[2]) * _NEW / min(times) for name, times in seconds.items()}
    lines = [Line(f"{name}, {_PROMPT} + {_NEW} tokens", value, "tokens/s") for name, value in rate.items()]
    engine, server = rate["engine batch 8"], rate["server batch 8"]
    lines += [
        at_least("engine over generate, batch 8", engine / rate["generate batch 8"], 0.85, "times"),
        at_least("engine, 16 sequences over 8", rate["engine batch 16"] / engine, 1.2, "times"),
        at_least("engine, 32 sequences over 8", rate["engine batch 32"] / engine, 1.5, "times"),
        at_least("server with 8 streaming clients over engine", server / engine, 0.75, "times"),
    ]
    for count in (1, 8):
        cost = rate[f"engine batch {count}"] / rate[f"engine batch-invariant batch {count}"]
        lines.append(Line(f"a token with --batch-invariant over one without, batch {count}", cost, "times"))
    if host_ms is not None:
        lines.append(at_most("processor time of the step thread, a step at batch 8", host_ms, 1.5, "ms"))
    for peer, at_1, at_8 in (("transformers serve", 3.0, 5.0), ("llama.cpp", 1.0, 1.0)):
        for count, goal in ((1, at_1), (8, at_8)):
            theirs = rate.get(f"{peer} batch {count}")
            if theirs is not None:
                ours = rate[f"server batch {count}"]
                lines.append(at_least(f"server over {peer}, batch {count}", ours / theirs, goal, "times"))
    return lines


def _pair_line(seconds: Mapping[str, list[float]]) -> Line:
    ratio = median_ratio(*(seconds[name] for name in _PAIR))
    return at_most("a token by top-p over one by greed, batch 8, median in turns", ratio, 1.1, "times")


def _load(target: Target, prompts: list[Request]) -> Callable[[], float]:
    """As many streaming clients as prompts, one request each."""

    def program() -> float:
        answers, errors, seconds = asyncio.run(run(target, prompts, concurrency=len(prompts)))
        if errors or any(answer.num_tokens != _NEW for answer in answers):
            lengths = sorted({answer.num_tokens for answer in answers})
            raise UserError(f"{target.model}: {errors[:1]} answers of {lengths} tokens where {_NEW} were asked for.")
        return seconds

    return program


@contextlib.contextmanager
def _transformers(peers: Peers) -> Any:
    """`transformers serve` on the folder, as what clients talk to."""
    port = free_port()
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [peers.python, "-m", "transformers.cli.transformers", "serve", str(peers.folder), *address]
    with server(command, port=port, ready="/health", extra={"HF_HUB_OFFLINE": "1"}) as running:
        yield asyncio.run(find(running.url, model=str(peers.folder), key=None, is_plain=True))[0]


@contextlib.contextmanager
def _step_thread_time() -> Any:
    """`{"seconds": processor time of the engine's step thread}`, after the block.

    The device's own threads compute, so this is what the host does between steps.
    """
    thread = next(thread for thread in threading.enumerate() if thread.name == "engine steps")
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    spent = {"seconds": -time.clock_gettime(clock)}
    yield spent
    spent["seconds"] += time.clock_gettime(clock)


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_tokens, ignore_eos=True)


def _ids(prompts: list[Request]) -> list[list[int]]:
    return [list(request.prompt) for request in prompts]


def _timed(work: Callable[[], Any]) -> float:
    watch = Stopwatch()
    work()
    return watch.lap()


def _advancing(program: Callable[[], float], advance: Callable[[int], None]) -> Callable[[], float]:
    def run_once() -> float:
        seconds = program()
        advance(1)
        return seconds

    return run_once
