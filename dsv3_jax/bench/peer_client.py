"""Starts the peer model in another Python and asks it to do work."""

import contextlib
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv3_jax.config.check import UserError
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.hf_config import to_hf


class Worker:
    """A process that speaks JSON lines; it sleeps between requests.

    Args:
        hint: what it needs, for the error when it ends.
    """

    def __init__(self, command: Sequence[str], *, hint: str) -> None:
        self._hint = hint
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            raise UserError(f"--peer {command[0]}: cannot be started ({error.strerror}); give a Python.") from error

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """The answer to a request; without one, the next line that comes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            if request is not None:
                self._process.stdin.write(json.dumps(request) + "\n")
                self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise UserError(f"the peer process ended (see above); {self._hint}.")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:  # in the middle of a request
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


class Peer(Worker):
    """A running `peer.py`: the shape of `cfg` in transformers' DeepseekV3ForCausalLM, float32.

    `built` holds parameters and versions.
    """

    def __init__(self, python: str, cfg: ModelConfig, *, batch: int, seq_len: int, threads: int) -> None:
        config = to_hf(cfg, "float32")
        ours_only = ("architectures", "model_type", "auto_map", "quantization_config", "transformers_version")
        request = {
            "config": {key: value for key, value in config.items() if key not in ours_only},
            "batch": batch,
            "seq_len": seq_len,
            "threads": threads,
        }
        script = str(Path(__file__).with_name("peer.py"))
        super().__init__([python, script], hint="--peer needs a Python with torch and transformers 5")
        try:
            self.built = self.ask(request)
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def seconds(self, do: str, **sizes: int) -> float:
        """How long the peer took for one request ("train", "prefill", "decode"; see `peer.py`)."""
        return float(self.ask({"do": do, **sizes})["seconds"])


class Llama(Worker):
    """A running `peer_llamacpp.py` on the float32 weights of an official folder; `version` is that of llama_cpp."""

    def __init__(self, python: str, folder: Path, file: Path, *, threads: int) -> None:
        script = str(Path(__file__).with_name("peer_llamacpp.py"))
        hint = "llama.cpp needs a Python with llama_cpp, gguf and safetensors"
        super().__init__([python, script, str(folder), str(file), str(threads)], hint=hint)
        try:
            self.version = str(self.ask()["version"])
        except UserError:
            self.close()
            raise

    def __enter__(self) -> "Llama":
        return self

    def generate(self, prompts: list[list[int]], new: int) -> tuple[float, list[int]]:
        """Seconds of greedily generating `new` tokens behind each prompt, and the first row's."""
        found = self.ask({"prompts": prompts, "new": new})
        return float(found["seconds"]), found["tokens"]


def has_module(python: str, module: str) -> bool:
    """Whether an interpreter can import a module."""
    try:
        return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0
    except OSError as error:
        raise UserError(f"--peer {python}: cannot be started ({error.strerror}); give a Python.") from error
