"""DeepSeek-V3: the 671B model with the report's whole training recipe (sections 4.1, 4.2).

    python -m dsv3_jax.planning.params configs/dsv3_671b.py
    python train.py --config configs/dsv3_671b.py --print-config
    python -m dsv3_jax.planning.fit configs/dsv3_671b.py
    python -m dsv3_jax.planning.aot configs/dsv3_671b.py --devices 2048

Expected: 671,026,419,200 parameters in the main model and 11,610,068,224 more in the MTP module, counted without
allocating them. Training it took the report 2048 H800 and 2.66M GPU hours.

Everything is a default of the configuration classes, spelled out here where the report gives a number. Not in the
report, and so a choice: the shape of the batch ramp (linear in tokens), the decay of the parameters' average, AdamW's
epsilon, the micro-batch (one sequence on each of 128 data-parallel ranks). Bias speed and MTP weight switch at the
tokens the report names; documents are packed without a mask between them; a tenth of them is rearranged for
fill-in-the-middle; projections and experts are multiplied in FP8 (`dsv3_jax/precision/README.md`).

The plan is the report's (section 3.2): 16 ranks of a pipeline, experts over 64 devices of 8 nodes, on 2048 devices two
replicas of each. Ranks of one program have room for what any of them needs, so it saves less than the report:
remat="received" in place of "paper", which 141 GB hold and 80 do not. `capacity` and `schedule` are choices.
"""

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig, OptimizerConfig, TrainConfig

TRILLION = 10**12
BILLION = 10**9


def get_config() -> RunConfig:
    """61 layers, 256 experts of which 8 are chosen in at most 4 of 8 groups, one MTP module; 14.8T tokens."""
    train = TrainConfig(
        seq_len=4096,
        total_tokens=14_800 * BILLION,
        lr=LearningRateConfig(
            peak=2.2e-4,
            low=2.2e-5,
            final=7.3e-6,
            warmup_tokens=28_100_000_000,  # 2000 steps, as the ramp below has them
            constant_until_tokens=10 * TRILLION,
            cosine_tokens=4_300 * BILLION,
            low_tokens=333 * BILLION,  # the last 167B run at `final`
        ),
        batch=BatchConfig(start=3072, full=15360, ramp_tokens=469 * BILLION, micro=128),
        optimizer=OptimizerConfig(beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=1.0, moment_dtype="bfloat16"),
        auxiliary=AuxiliaryConfig(
            mtp_weight=0.3,
            mtp_weight_late=0.1,
            mtp_switch_tokens=10 * TRILLION,
            bias_speed=0.001,
            bias_stop_tokens=14_300 * BILLION,
            balance_weight=1e-4,
        ),
        remat="received",
    )
    parallel = ParallelConfig(pipe=16, data=-1, expert=64, expert_nodes=8, schedule="dualpipe_v", capacity=1.25)
    data = DataConfig(fim_rate=0.1, document_mask=False)
    return RunConfig(
        name="dsv3_671b", model=ModelConfig(), data=data, train=train, precision="fp8_dsv3", parallel=parallel
    )
