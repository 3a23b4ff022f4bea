"""A 29 M-parameter model for measuring speed on a laptop: the shape that the CPU comparison with transformers uses.

    python -m dsv3_jax.bench.train configs/bench_30m.py
    python -m dsv3_jax.bench.decode configs/bench_30m.py
    python train.py --config configs/bench_30m.py --run-dir runs/bench_30m      (it trains, too)

Expected: 29,258,576 parameters; speeds are in the README. Trained for all its tokens it needs hours on a laptop.
"""

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig, OutputConfig, TrainConfig

TOKENS = 20_000_000


def get_config() -> RunConfig:
    """Six layers, 16 experts of which 4 are chosen, no MTP; rows of 512 tokens, four at a time."""
    model = ModelConfig(
        vocab_size=8192,
        model_dim=384,
        num_layers=6,
        num_dense_layers=1,
        ffn_dim=1024,
        mla=MLAConfig(
            num_heads=6, q_latent_dim=192, kv_latent_dim=128, nope_head_dim=64, rope_head_dim=32, v_head_dim=64
        ),
        moe=MoEConfig(num_experts=16, num_shared_experts=1, top_k=4, expert_dim=192, num_groups=4, groups_per_token=2),
        mtp_depth=0,
        max_position=2048,
        yarn=None,
        init_std=0.02,
    )
    train = TrainConfig(
        seq_len=512,
        total_tokens=TOKENS,
        lr=LearningRateConfig(
            peak=1e-3,
            low=1e-4,
            final=3e-5,
            warmup_tokens=TOKENS // 50,
            constant_until_tokens=TOKENS * 68 // 100,
            cosine_tokens=TOKENS * 29 // 100,
            low_tokens=TOKENS * 2 // 100,
        ),
        batch=BatchConfig(start=4, full=16, ramp_tokens=TOKENS // 30, micro=4),
        auxiliary=AuxiliaryConfig(bias_stop_tokens=TOKENS * 97 // 100),
        output=OutputConfig(eval_every=500, eval_batches=32, checkpoint_every=500),
        ema_every=10,
        ema_decay=0.99,
        remat="none",
        loss_chunk_size=128,
    )
    return RunConfig(name="bench_30m", model=model, data=DataConfig(), train=train)
