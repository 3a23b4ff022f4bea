"""The text a trained model writes: `train.output.sample_prompt` continued."""

import itertools
from collections.abc import Callable

import numpy as np

from dsv3_jax.config.check import check
from dsv3_jax.config.run import RunConfig
from dsv3_jax.data.tokenizer import TextTokenizer
from dsv3_jax.typing import Variables

Generate = Callable[..., np.ndarray]
"""`dsv3_jax.serving.generate.generate`, or anything with its signature."""


def check_sample(cfg: RunConfig, tokenizer: TextTokenizer) -> None:
    """Refuses, before training, a prompt that could not be continued after it.

    Raises:
        ConfigError: the prompt has no token, or fills the context of the model.
    """
    output, most = cfg.train.output, cfg.model.max_position - 1
    num_tokens = len(tokenizer.prompt(output.sample_prompt))
    check(
        not output.sample_tokens or 0 < num_tokens <= most,
        f"train.output.sample_prompt has {num_tokens} tokens, and the sample at the end needs 1 to {most} "
        f"(model.max_position={most + 1}); change it, or set train.output.sample_tokens=0.",
    )


def sample_text(
    cfg: RunConfig, tokenizer: TextTokenizer, variables: Variables, generate: Generate, *, seed: int
) -> str | None:
    """The prompt and up to `sample_tokens` tokens, as many as the context has room for; None when that is 0."""
    output = cfg.train.output
    if not output.sample_tokens:
        return None
    prompt = tokenizer.prompt(output.sample_prompt)
    room = cfg.model.max_position - len(prompt)
    ids = generate(
        cfg.model,
        variables,
        [prompt],
        min(output.sample_tokens, room),
        temperature=0.7,
        top_p=0.95,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    new = list(itertools.takewhile(lambda i: i != tokenizer.eos_id, (int(i) for i in ids[0])))
    cut = "" if room >= output.sample_tokens else f" [{room} tokens: the context is full]"
    return output.sample_prompt + tokenizer.decode(new) + cut
