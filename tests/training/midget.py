"""The smallest run that has every part: for tests of stopping and resuming.

    python train.py --config tests/training/midget.py --run-dir DIR --set data.paths=FOLDER

Expected: 24 steps in a second or two once compiled.
"""

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig, OutputConfig, TrainConfig
from tests.small import make_config

SEQ_LEN = 16
STEPS = 24


def get_config() -> RunConfig:
    """The shared small model, two rows a micro-batch; the batch grows from two rows to four."""
    model = make_config(vocab_size=300, num_layers=2, yarn=None, init_std=0.1)
    tokens = STEPS * 4 * SEQ_LEN
    train = TrainConfig(
        seq_len=SEQ_LEN,
        total_tokens=tokens - 8 * 2 * SEQ_LEN,
        lr=LearningRateConfig(1e-2, 1e-3, 1e-4, tokens // 10, tokens // 2, tokens // 4, tokens // 8),
        batch=BatchConfig(start=2, full=4, ramp_tokens=2 * 8 * 2 * SEQ_LEN, micro=2),  # four rows from half-way on
        auxiliary=AuxiliaryConfig(bias_speed=0.01, mtp_switch_tokens=tokens // 2, bias_stop_tokens=tokens * 3 // 4),
        output=OutputConfig(
            eval_every=10, eval_batches=1, checkpoint_every=5, keep_checkpoints=2, tensorboard=False, sample_tokens=0
        ),
        ema_decay=0.9,
        ema_every=2,
        remat="none",
        loss_chunk_size=8,
    )
    return RunConfig(name="midget", model=model, data=DataConfig(prefetch_batches=2), train=train)
