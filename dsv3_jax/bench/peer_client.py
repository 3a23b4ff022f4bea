"""Starts the peer model in another Python and asks it to do work."""

import contextlib
import json
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv3_jax.config.check import UserError
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.interop.hf_config import to_hf


class Peer:
    """A running `peer.py`: the shape of `cfg` in transformers' DeepseekV3ForCausalLM, float32.

    `built` holds parameters and versions. The process sleeps between requests.
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
        try:
            self._process = subprocess.Popen(
                [python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
            )
        except OSError as error:
            raise UserError(f"--peer {python}: cannot be started ({error.strerror}); give a Python.") from error
        try:
            self.built = self._ask(request)
        except UserError:
            self._close()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def seconds(self, do: str, **sizes: int) -> float:
        """How long the peer took for one request ("train", "prefill", "decode"; see `peer.py`)."""
        return float(self._ask({"do": do, **sizes})["seconds"])

    def _close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        answer = ""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        if not answer:
            raise UserError("the peer process ended (see above); --peer needs a Python with torch and transformers 5.")
        return json.loads(answer)
