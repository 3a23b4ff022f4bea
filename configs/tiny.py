"""The demo: a small DeepSeek-V3 that learns Python from the standard library's own sources.

    python train.py --config configs/tiny.py --run-dir runs/tiny      (or: make train)

Expected (one run; its time on idle cores is not measured): 1.59 bits per byte on held-out files; on
those `gzip -9` needs 2.12 and `xz -9` 1.98 file by file, `xz -9` 1.73 over all of them joined (sources of Python 3.13;
other versions split differently). The training loss falls throughout: its mean over 200 steps never rises by more than
0.03 nats (over 50 steps by 0.17, no more than the noise of batches of 2048 tokens). Expert load settles after about
0.25M tokens. The model is too small to write programs: the sample has the look of Python, not its sense.
"""

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig, OutputConfig, TrainConfig

TOKENS = 2_000_000


def get_config() -> RunConfig:
    """The report's recipe in small: all parts of the model, the same five phases, a run of minutes."""
    model = ModelConfig(
        vocab_size=4096,
        model_dim=160,
        num_layers=3,
        num_dense_layers=1,
        ffn_dim=448,
        mla=MLAConfig(
            num_heads=4, q_latent_dim=80, kv_latent_dim=64, nope_head_dim=32, rope_head_dim=16, v_head_dim=32
        ),
        moe=MoEConfig(num_experts=16, num_shared_experts=1, top_k=2, expert_dim=96, num_groups=4, groups_per_token=2),
        mtp_depth=1,
        max_position=1024,
        yarn=None,
        init_std=0.05,
    )
    train = TrainConfig(
        seq_len=256,
        total_tokens=TOKENS,
        lr=LearningRateConfig(
            peak=4e-3,
            low=4e-4,
            final=2e-4,
            warmup_tokens=TOKENS * 4 // 100,
            constant_until_tokens=TOKENS * 40 // 100,
            cosine_tokens=TOKENS * 52 // 100,
            low_tokens=TOKENS * 5 // 100,
        ),
        batch=BatchConfig(start=8, full=8, ramp_tokens=0, micro=8),
        auxiliary=AuxiliaryConfig(
            mtp_switch_tokens=TOKENS * 67 // 100, bias_speed=0.01, bias_stop_tokens=TOKENS * 97 // 100
        ),
        output=OutputConfig(eval_every=200, eval_batches=24, checkpoint_every=200, keep_checkpoints=2),
        ema_decay=0.95,
        ema_every=4,
        remat="paper",
        loss_chunk_size=64,
    )
    return RunConfig(name="tiny", model=model, data=DataConfig(), train=train)
