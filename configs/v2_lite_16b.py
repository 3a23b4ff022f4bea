"""DeepSeek-V2-Lite, 15.7B parameters of which 2.4B work on a token: the size of the report's ablations.

    python -m dsv3_jax.planning.params configs/v2_lite_16b.py
    python train.py --config configs/v2_lite_16b.py --run-dir DIR --set data.paths=/my/texts data.tokenizer=t.json

Expected: 15,706,484,224 parameters; at least 250 GB of device memory for parameters, gradients and moments, so no
single device trains it. The shape is the released one (softmax scores, no bias, no MTP). The report's ablations at
this size ran for 1.33T tokens (section 4.5); the five phases are the report's, in proportion to that. The peak rate,
the batch and the weight of the balance loss, which here has no bias to help it, are not in the report.
"""

from dsv3_jax.config.data import DataConfig
from dsv3_jax.config.model import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import AuxiliaryConfig, BatchConfig, LearningRateConfig, OptimizerConfig, TrainConfig

TOKENS = 1_330_000_000_000


def get_config() -> RunConfig:
    """27 layers, the first dense, 64 experts of which 6 are chosen, 2 shared; a full query matrix."""
    model = ModelConfig(
        vocab_size=102400,
        model_dim=2048,
        num_layers=27,
        num_dense_layers=1,
        ffn_dim=10944,
        mla=MLAConfig(
            num_heads=16, q_latent_dim=None, kv_latent_dim=512, nope_head_dim=128, rope_head_dim=64, v_head_dim=128
        ),
        moe=MoEConfig(
            num_experts=64,
            num_shared_experts=2,
            top_k=6,
            expert_dim=1408,
            num_groups=1,
            groups_per_token=1,
            score="softmax",
            normalize_weights=False,
            has_bias=False,
            scale=1.0,
        ),
        mtp_depth=0,
        yarn=YarnConfig(mscale=0.707, mscale_all_dim=0.707),
        bos_id=100000,
        eos_id=100001,
    )
    train = TrainConfig(
        seq_len=4096,
        total_tokens=TOKENS,
        lr=LearningRateConfig(
            peak=4.2e-4,
            low=4.2e-5,
            final=1.4e-5,
            warmup_tokens=2000 * 4608 * 4096,
            constant_until_tokens=TOKENS * 10_000 // 14_800,
            cosine_tokens=TOKENS * 4_300 // 14_800,
            low_tokens=TOKENS * 333 // 14_800,
        ),
        batch=BatchConfig(start=4608, full=4608, ramp_tokens=0, micro=512),
        optimizer=OptimizerConfig(moment_dtype="bfloat16"),
        auxiliary=AuxiliaryConfig(balance_weight=1e-3),
    )
    return RunConfig(name="v2_lite_16b", model=model, data=DataConfig(), train=train, precision="mixed")
