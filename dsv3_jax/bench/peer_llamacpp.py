"""The same weights in llama.cpp, timed on request. Runs under another Python: with llama_cpp, gguf and safetensors.

    PYTHON peer_llamacpp.py FOLDER MODEL.gguf THREADS        (started by `peer_client.Llama`)

Writes the official folder's float32 weights as MODEL.gguf, loads that, and speaks JSON lines: first {"version": …},
then for each {"prompts": ids[B][T], "new": n} one {"seconds": …, "tokens": ids of the first row}. Greedy decoding of
all rows in one batch, prefill included.
"""

import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_OF_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{part}_proj.weight": f"ffn_{part}.weight" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj.weight": f"ffn_{part}_shexp.weight" for part in ("gate", "up", "down")},
}
_OF_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def main() -> None:
    """Converts, loads, then answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what the library prints goes to stderr, not between the answers
    folder, file, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    convert(folder, file)
    library: Any = importlib.import_module("llama_cpp")
    model = Llama(library.llama_cpp, file, threads)
    print(json.dumps({"version": library.__version__}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(model.generate(np.array(request["prompts"]), request["new"])), file=answers)


def convert(folder: Path, file: Path) -> None:
    """An official folder without YaRN and MTP as a file of llama.cpp's "deepseek2", without a vocabulary."""
    gguf: Any = importlib.import_module("gguf")
    config = json.loads((folder / "config.json").read_bytes())
    if config.get("rope_scaling"):
        raise SystemExit("rope_scaling is not converted; measure a configuration without YaRN.")
    writer = gguf.GGUFWriter(file, "deepseek2")
    _write_config(writer, config)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    for name, tensor in _tensors(folder, config):
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """A loaded model."""

    def __init__(self, library: Any, file: Path, threads: int) -> None:
        self._library, self._threads = library, threads
        self._silent = library.llama_log_callback(lambda level, text, data: None)
        library.llama_log_set(self._silent, None)
        library.llama_backend_init()
        params = library.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = library.llama_model_load_from_file(str(file).encode(), params)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {file}.")
        self._vocab_size = library.llama_vocab_n_tokens(library.llama_model_get_vocab(self._model))

    def generate(self, prompts: np.ndarray, new: int) -> dict[str, Any]:
        """Seconds of greedily generating `new` tokens behind each row, and the first row's."""
        B, T = prompts.shape
        context = self._context(B, T + new)
        batch = self._library.llama_batch_init(B * T, 0, 1)
        start = time.perf_counter()
        rows = [(prompts[b, t], t, b, t == T - 1) for b in range(B) for t in range(T)]
        tokens = self._step(context, batch, rows, [(b + 1) * T - 1 for b in range(B)])
        first = [tokens[0]]
        for position in range(T, T + new - 1):
            rows = [(tokens[b], position, b, True) for b in range(B)]
            tokens = self._step(context, batch, rows, range(B))
            first.append(tokens[0])
        seconds = time.perf_counter() - start
        self._library.llama_batch_free(batch)
        self._library.llama_free(context)
        return {"seconds": seconds, "tokens": first}

    def _context(self, num_rows: int, length: int) -> Any:
        params = self._library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = num_rows * (length + 8), num_rows
        params.n_batch = params.n_ubatch = max(512, num_rows * length)  # the prompts go through at once
        params.n_threads = params.n_threads_batch = self._threads
        params.no_perf = True
        return self._library.llama_init_from_model(self._model, params)

    def _step(self, context: Any, batch: Any, rows: Sequence[Any], wanted: Sequence[int]) -> list[int]:
        """The likeliest next token behind each of the `wanted` ones of (token, position, sequence, has logits)."""
        batch.n_tokens = len(rows)
        for place, (token, position, sequence, has_logits) in enumerate(rows):
            batch.token[place], batch.pos[place] = int(token), position
            batch.n_seq_id[place], batch.logits[place] = 1, has_logits
            batch.seq_id[place][0] = sequence
        if self._library.llama_decode(context, batch):
            raise SystemExit("llama_decode failed.")
        shape = (self._vocab_size,)
        logits = [np.ctypeslib.as_array(self._library.llama_get_logits_ith(context, place), shape) for place in wanted]
        return [int(row.argmax()) for row in logits]


def _write_config(writer: Any, config: dict[str, Any]) -> None:
    C, R = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)  # the latent is one key and value for all heads
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(R)
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(C)
    writer.add_key_length(C + R)
    writer.add_value_length(C)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + R)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_tokenizer_model("none")


def _tensors(folder: Path, config: dict[str, Any]) -> list[tuple[str, np.ndarray]]:
    """llama.cpp's name of each tensor, experts of a layer in one, the latent's up-projection in two."""
    numpy_format: Any = importlib.import_module("safetensors.numpy")
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= numpy_format.load_file(file)
    found = [(theirs, stored[name]) for name, theirs in _OF_MODEL.items()]
    H, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for layer in range(config["num_hidden_layers"]):
        here, there = f"model.layers.{layer}.", f"blk.{layer}."
        found += [(there + theirs, stored[here + name]) for name, theirs in _OF_LAYER.items() if here + name in stored]
        up = stored[here + "self_attn.kv_b_proj.weight"].reshape(H, -1, config["kv_lora_rank"])
        found.append((there + "attn_k_b.weight", up[:, :nope].swapaxes(1, 2)))
        found.append((there + "attn_v_b.weight", up[:, nope:]))
        if layer < config["first_k_dense_replace"]:
            continue
        for part in ("gate", "up", "down"):
            experts = range(config["n_routed_experts"])
            rows = [stored[f"{here}mlp.experts.{expert}.{part}_proj.weight"] for expert in experts]
            found.append((f"{there}ffn_{part}_exps.weight", np.stack(rows)))
    return found


if __name__ == "__main__":
    main()
