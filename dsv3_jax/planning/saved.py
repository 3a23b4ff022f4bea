"""Bytes of the tensors that a layer saves for its backward pass, as a closed table of sizes.

`memory.py` reads the same off a trace of the layer, which takes a second; this takes none, and counts what an exchange
between experts receives as well. A test compares the two.
"""

from typing import Any, NamedTuple

from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.parallel.axes import EXPERTS, ROWS, TENSOR
from dsv3_jax.parallel.mesh import size_of
from dsv3_jax.parallel.room import room_for
from dsv3_jax.precision.fp8_experts import BLOCK_ROWS
from dsv3_kernels.routed_experts.plan import FEW_TOKENS, block_size_for, num_blocks

INPUT = "(input of the layer)"
TILE = 128
"""Elements that share a scale in FP8 and in E5M6."""


class Hop(NamedTuple):
    """One exchange of tokens between experts' peers."""

    tokens: int
    """That a device has before it."""
    peers: int
    room: int
    """Tokens to each of them at a time."""

    @property
    def received(self) -> int:
        """Tokens that a device has after it."""
        return self.peers * self.room


class Work(NamedTuple):
    """What one device works on in one micro-batch."""

    tokens: int
    hops: tuple[Hop, ...]
    """On the way to the experts, the outermost first; none where nothing is exchanged."""
    pairs: int
    """(token, expert) pairs that its experts have room for."""
    experts: int
    """Of them it has so many."""
    has_rounds: bool
    """What finds no room is sent, and computed, in further rounds."""
    sharers: int = 1
    """Devices that share heads and widths."""

    @property
    def received(self) -> int:
        """Tokens that arrive at its experts."""
        return self.hops[-1].received if self.hops else self.tokens


def work_of(cfg: RunConfig, mesh: Any) -> Work:
    """Of a run on a mesh, anything whose `shape` maps axes to sizes."""
    moe, parallel = cfg.model.moe, cfg.parallel
    tokens = cfg.train.batch.micro // size_of(mesh, ROWS) * cfg.train.seq_len
    nodes, peers = (mesh.shape[axis] for axis in EXPERTS)
    if nodes * peers == 1:
        return Work(tokens, (), tokens * moe.top_k, moe.num_experts, has_rounds=False, sharers=mesh.shape[TENSOR])
    room = room_for(tokens, moe, nodes=nodes, peers=peers, capacity=parallel.capacity)
    passing = nodes * room.node if nodes > 1 else tokens
    hops = (Hop(tokens, nodes, room.node),) * (nodes > 1) + (Hop(passing, peers, room.expert),) * (peers > 1)
    has_rounds = parallel.overflow == "rounds" and parallel.capacity is not None
    return Work(tokens, hops, room.choices, moe.num_experts // (nodes * peers), has_rounds, mesh.shape[TENSOR])


def saved_by_layer(model: ModelConfig, precision: str, work: Work, *, is_moe: bool) -> dict[str, int]:
    """Bytes by the names of `model.layers.PAPER`, and of the layer's input."""
    mla, wide = model.mla, 4 if precision == "float32" else 2
    is_fp8 = precision == "fp8_dsv3"
    attended = mla.num_heads * mla.v_head_dim // work.sharers
    of_token = {
        INPUT: model.model_dim * wide,
        "mla_q_down": (mla.q_latent_dim or 0) * wide,
        "mla_kv_down": (mla.kv_latent_dim + mla.rope_head_dim) * wide,
        "mla_attended": 3 * attended // 2 + _scales(attended) if is_fp8 else attended * wide,
        "mla_added": model.model_dim * wide,
    }
    width = model.moe.num_shared_experts * model.moe.expert_dim if is_moe else model.ffn_dim
    of_token["ffn_gate_up"] = _wide_or_fp8(2 * width // work.sharers, wide, is_fp8)
    if not is_moe:
        return {name: work.tokens * size for name, size in of_token.items()}
    of_token["router_logits"] = 4 * model.moe.num_experts
    return {name: work.tokens * size for name, size in of_token.items()} | _experts(model, wide, is_fp8, work)


def rows_of(work: Work, *, is_fp8: bool) -> tuple[int, int]:
    """Rows that a device's experts multiply, blocks filled up, and how many blocks they are."""
    if not is_fp8 and not work.hops and work.tokens <= FEW_TOKENS:
        blocks = min(work.experts, work.pairs)
        return blocks * work.tokens, blocks
    block = BLOCK_ROWS if is_fp8 else block_size_for(work.pairs, work.experts)
    blocks = num_blocks(work.pairs, work.experts, block)
    return blocks * block, blocks


def _experts(model: ModelConfig, wide: int, is_fp8: bool, work: Work) -> dict[str, int]:
    rows, blocks = rows_of(work, is_fp8=is_fp8)
    K, D = model.moe.top_k, model.model_dim
    plan, received = 4 * (work.received * K + 2 * rows + blocks), 0
    payload = D - (-D // TILE) if is_fp8 else D * wide
    in_parts = work.has_rounds and work.pairs < work.received * min(K, work.experts)
    for index, hop in enumerate(work.hops):
        following = work.hops[index + 1] if index + 1 < len(work.hops) else None
        plan += 4 * (hop.tokens * min(K, hop.peers) + 2 * hop.received + hop.peers)
        in_rounds = work.has_rounds and hop.room < hop.tokens
        plan += 4 * in_rounds
        # A further round of the hop inside takes what arrived here again.
        again = in_parts if following is None else work.has_rounds and following.room < following.tokens
        received += hop.received * ((payload + 4 * K) * (following is None or again) + 4 * K * again)
    sizes = {"experts_plan": plan + 4 * in_parts, "experts_received": received}
    return sizes | {"experts_gate_up": rows * _wide_or_fp8(2 * model.moe.expert_dim // work.sharers, wide, is_fp8)}


def _wide_or_fp8(width: int, wide: int, is_fp8: bool) -> int:
    return width + _scales(width) if is_fp8 else width * wide


def _scales(width: int) -> int:
    """A float32 for each tile of a row."""
    return 4 * -(-width // TILE)
