"""The small model of the parity check, and the meshes that it is checked on."""

from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.config.check import check
from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.load import override
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import BatchConfig, OptimizerConfig, TrainConfig

ROWS = 48
"""Of a step: a multiple of every mesh's rows, and of micro-batches enough for a pipeline of four."""

MODEL = ModelConfig(
    vocab_size=96,
    model_dim=32,
    num_layers=3,
    num_dense_layers=1,
    ffn_dim=48,
    mla=MLAConfig(num_heads=4, q_latent_dim=16, kv_latent_dim=16, nope_head_dim=8, rope_head_dim=4, v_head_dim=8),
    moe=MoEConfig(num_experts=8, top_k=3, expert_dim=12, num_groups=4, groups_per_token=3),
    mtp_depth=1,
    max_position=64,
    yarn=None,
    init_std=0.1,
    bos_id=0,
    eos_id=1,
)

DEEP = ["model.num_layers=10", "model.num_dense_layers=2", "train.remat=paper"]
"""Blocks enough for eight stages of different loads."""

WIDE = [
    "model.model_dim=128",
    "model.ffn_dim=256",
    "model.mla.q_latent_dim=128",
    "model.mla.kv_latent_dim=128",
    "model.mla.nope_head_dim=48",
    "model.mla.rope_head_dim=16",
    "model.mla.v_head_dim=64",
    "model.moe.expert_dim=128",
    "model.init_std=0.05",
]
"""Tiles of FP8 are whole."""


class Case(NamedTuple):
    """One mesh as `--mesh` takes it, and what else is set."""

    mesh: str
    settings: tuple[str, ...] = ()


_DOCUMENTS = "data.document_mask=true"

CASES = (
    Case("data=2"),
    Case("data=16"),
    Case("data=4,gather=layer", ("train.remat=full",)),
    Case("expert=2"),
    Case("expert=8", ("train.remat=paper",)),
    Case("expert=4,expert_nodes=2"),
    Case("expert=4,expert_nodes=4", ("train.remat=paper",)),
    Case("tensor=2"),
    Case("tensor=4,gather=layer"),
    Case("data=2,expert=2", ("train.batch.micro=12",)),
    Case("data=2,tensor=2", ("train.remat=paper",)),
    Case("expert=2,tensor=2,gather=layer"),
    Case("data=2,expert=2,tensor=2"),
    Case("data=2,expert=4,expert_nodes=2,gather=layer", ("train.remat=paper",)),
    Case("expert=4,capacity=0.5"),
    Case("data=2,expert=4,expert_nodes=2,capacity=0.5", ("train.remat=paper", "train.batch.micro=24")),
    Case("expert=2,tensor=2,capacity=0.5,gather=layer", ("train.remat=full",)),
    Case("data=2,expert=2", (_DOCUMENTS,)),
    Case("data=2,expert=4,expert_nodes=2,tensor=2,capacity=0.75", (_DOCUMENTS, "train.batch.micro=16")),
    Case("data=4,expert=4", ("model.mtp_depth=0",)),
    Case("expert=4,tensor=2,gather=layer", ("model.mtp_depth=0", "train.remat=paper")),
    Case("data=2,expert=2", ("model.mtp_depth=2", _DOCUMENTS, "train.remat=full")),
    Case("data=2,expert=2,tensor=2,gather=layer", ("model.mtp_depth=2", _DOCUMENTS, "train.batch.micro=8")),
    Case("data=2,expert=4,expert_nodes=2", ("model.moe.has_bias=false",)),
    Case("pipe=2,expert=2", ("train.batch.micro=4",)),
    Case("pipe=4,expert=2", ("train.batch.micro=2",)),
    Case("pipe=2,expert=2,schedule=dualpipe", ("train.batch.micro=4",)),
    Case("pipe=4,expert=2,schedule=dualpipe", ("train.batch.micro=2",)),
    Case("pipe=4,expert=2,schedule=one_f_one_b", ("train.batch.micro=2", "train.remat=full")),
    Case("pipe=2,data=2,expert=2,tensor=2", ("train.batch.micro=4",)),
)
"""Pipelines have 12 and 24 micro-batches, enough for steady ticks; their stages have different numbers of layers."""


def configure(mesh: str, settings: Sequence[str] = ()) -> RunConfig:
    """The small run on the mesh that `mesh` describes, such as "data=2,expert=2,gather=layer".

    Raises:
        ConfigError: a mesh or settings that do not fit each other.
    """
    batch = BatchConfig(start=ROWS, full=ROWS, ramp_tokens=0, micro=ROWS)
    optimizer = OptimizerConfig(moment_dtype="float32")
    train = TrainConfig(seq_len=16, batch=batch, optimizer=optimizer, remat="none", loss_chunk_size=8)
    cfg = RunConfig("parity", MODEL, DataConfig(), train)
    pairs = [pair.strip() for pair in mesh.split(",") if pair.strip()]
    for pair in pairs:
        check("=" in pair, f"--mesh {mesh!r}: {pair!r} is not of the form axis=size, such as data=2.")
    given = ["data=1", *pairs]
    size = dict(pair.split("=", 1) for pair in pairs).get("pipe", "1")
    kind = [*(DEEP if size != "1" else []), *(WIDE if "precision=fp8_dsv3" in settings else [])]
    cfg = override(cfg, [*kind, *settings, *(f"parallel.{pair}" for pair in given)])
    check(cfg.parallel.overflow == "rounds", "overflow=drop leaves choices out, which one device does not; use rounds.")
    return cfg
