"""The same model in transformers, timed on request. Runs under another Python, which has torch and transformers.

    PYTHON peer.py        (started by `peer_client.Peer`)

Speaks JSON lines. First line in: {"config": config.json as a dict, "batch": B, "seq_len": T, "threads": n}; out: what
was built. Then one answer {"seconds": …} for each request: {"do": "train"} one step of AdamW with zero_grad, forward
with labels and backward; {"do": "prefill", "tokens": T} the forward pass of one prompt that fills a cache;
{"do": "decode", "batch": B, "prompt": P, "new": n} greedy `generate`.
"""

import importlib
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    """Builds the model, then answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints goes to stderr, not between the answers
    given = json.loads(sys.stdin.readline())
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    config = transformers.DeepseekV3Config(**given["config"])
    model = transformers.DeepseekV3ForCausalLM._from_config(
        config, dtype=torch.float32, attn_implementation="sdpa", experts_implementation="grouped_mm"
    )
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    requests = {
        "train": Training(torch, model, config.vocab_size, given["batch"], given["seq_len"]),
        "prefill": lambda tokens: prefill(torch, model, config.vocab_size, tokens),
        "decode": lambda batch, prompt, new: decode(torch, model, config.vocab_size, batch, prompt, new),
    }
    built = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(built), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps({"seconds": requests[request.pop("do")](**request)}), file=answers)


class Training:
    """One training step a call, on the same random batch."""

    def __init__(self, torch: Any, model: Any, vocab_size: int, batch: int, seq_len: int) -> None:
        self.model = model
        self.ids = torch.randint(0, vocab_size, (batch, seq_len))
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def __call__(self) -> float:
        """Seconds of zero_grad, forward, backward and update."""
        self.model.train()
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def prefill(torch: Any, model: Any, vocab_size: int, tokens: int) -> float:
    """Seconds of a forward pass over one prompt, with a cache and the last position's logits."""
    model.eval()
    ids = torch.randint(2, vocab_size, (1, tokens))
    with torch.inference_mode():
        start = time.perf_counter()
        model(input_ids=ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start


def decode(torch: Any, model: Any, vocab_size: int, batch: int, prompt: int, new: int) -> float:
    """Seconds of greedy generation of `new` tokens after `prompt` tokens, prefill included."""
    model.eval()
    ids = torch.randint(2, vocab_size, (batch, prompt))
    with torch.inference_mode():
        start = time.perf_counter()
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            use_cache=True,
        )
        return time.perf_counter() - start


if __name__ == "__main__":
    main()
