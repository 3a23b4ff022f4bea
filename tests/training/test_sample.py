from pathlib import Path

import numpy as np
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.load import load_config
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data import tokenizer as tokenizers
from dsv3_jax.training.sample import check_sample, sample_text

MIDGET = Path(__file__).parent / "midget.py"


@pytest.fixture(scope="module")
def tokenizer() -> tokenizers.TextTokenizer:
    return tokenizers.train(iter(["words of a text"] * 3), vocab_size=300)


def sampling(prompt: str, num_tokens: int) -> RunConfig:
    """The context is 64 tokens."""
    sets = [f"train.output.sample_prompt={prompt}", f"train.output.sample_tokens={num_tokens}"]
    return load_config(MIDGET, sets)


def test_a_prompt_that_leaves_no_room_is_refused_unless_nothing_is_sampled(tokenizer):
    with pytest.raises(UserError, match=r"sample_prompt has \d\d tokens.*needs 1 to 63"):
        check_sample(sampling("x" * 63, 8), tokenizer)
    check_sample(sampling("x" * 63, 0), tokenizer)
    check_sample(sampling("x" * 62, 8), tokenizer)
    check_sample(sampling("", 8), tokenizer)
    without_bos = tokenizers.TextTokenizer(tokenizer._inner, bos_id=None)
    with pytest.raises(UserError, match="sample_prompt has 0 tokens"):
        check_sample(sampling("", 8), without_bos)


def test_a_sample_ends_where_the_context_does_and_tells_so(tokenizer):
    def generate(cfg, variables, prompts, num_tokens, **_):
        assert len(prompts[0]) + num_tokens <= cfg.max_position
        return np.full((1, num_tokens), tokenizer.encode("x")[0])

    def text(prompt: str, num_tokens: int) -> str | None:
        return sample_text(sampling(prompt, num_tokens), tokenizer, {}, generate, seed=0)

    assert text("x", 3) == "xxxx"
    assert text("x", 0) is None
    assert text("x" * 60, 8) == "x" * 63 + " [3 tokens: the context is full]"
