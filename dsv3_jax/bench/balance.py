"""Does the router's bias balance the experts? The same skewed start trained with it and without it.

    python -m dsv3_jax.bench.balance                    a table, and balance.png
    python -m dsv3_jax.bench.balance --json             one JSON object

All tokens share a direction in the embedding, and a few experts answer to it: at first every token goes to them.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config
from dsv3_jax.config.paths import user_path
from dsv3_jax.config.run import RunConfig
from dsv3_jax.config.train import BatchConfig, LearningRateConfig
from dsv3_jax.interrupt import StopRequest, run_program
from dsv3_jax.training.metrics import load_ratio
from dsv3_jax.training.plot import smooth
from dsv3_jax.training.run import open_run, steps
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import make_step

WINDOW = 20
"""Steps whose load is added up before max/mean is taken, so that the noise of one small batch does not count."""


def skewed(state: TrainState, *, num_favoured: int, strength: float) -> TrainState:
    """`state` with the first experts of every main router favoured by all tokens alike.

    Every embedding gets the same vector of signs (as large as its own entries), and the favoured experts' centroids
    point along it, so that their logits start about `strength` above the others'.
    """
    params: Any = jax.tree.map(lambda leaf: leaf, state.params)
    embed = params["embed"]["w"]
    dim = embed.shape[1]
    signs = jnp.where(jax.random.bernoulli(jax.random.key(1), shape=(dim,)), 1.0, -1.0).astype(embed.dtype)
    router = params["moe_layers"]["moe"]["router"]["w"]
    pull = (strength / (0.7 * dim)) * signs.astype(router.dtype)
    params["embed"]["w"] = embed + embed.std() * signs[None, :]
    favoured = jnp.arange(router.shape[2]) < num_favoured
    params["moe_layers"]["moe"]["router"]["w"] = jnp.where(favoured, router + pull[None, :, None], router)
    return state._replace(params=params)


def config_of(cfg: RunConfig, data_dir: Path, *, steps: int, rows: int, bias_speed: float) -> RunConfig:
    """`cfg` for `steps` steps of `rows` sequences: a short warm-up, then the peak rate, and one speed of the bias."""
    tokens = steps * rows * cfg.train.seq_len
    peak = cfg.train.lr.peak
    lr = LearningRateConfig(peak, peak, peak, warmup_tokens=tokens // 10, constant_until_tokens=tokens)
    auxiliary = dataclasses.replace(cfg.train.auxiliary, bias_speed=bias_speed, bias_stop_tokens=tokens)
    batch = BatchConfig(start=rows, full=rows, ramp_tokens=0, micro=rows)
    how = {"lr": lr, "auxiliary": auxiliary, "batch": batch, "total_tokens": tokens, "ema_decay": 0.0}
    data = dataclasses.replace(cfg.data, cache_dir=str(data_dir))
    return dataclasses.replace(cfg, data=data, train=dataclasses.replace(cfg.train, **how))


def loads(cfg: RunConfig, run_dir: Path) -> np.ndarray:
    """Tokens of each expert in each step, int[steps, L, E], for the layers of the main model, from a skewed start."""
    with StopRequest() as stop, open_run(cfg, run_dir, log=_to_stderr) as run:  # standard output is for the results
        run.state = skewed(run.state, num_favoured=cfg.model.moe.top_k, strength=3.0)
        taken = steps(run, make_step(cfg), stop=stop)
        return np.stack([np.asarray(one.report.terms.load[: cfg.model.num_moe_layers]) for one in taken])


def ratios(load: np.ndarray) -> np.ndarray:
    """max/mean load of every layer over the last `WINDOW` steps, float[steps, L]."""
    steps, layers, experts = load.shape
    flat = load.reshape(steps, -1).T.astype(float)
    summed = np.stack([smooth(row, WINDOW) for row in flat], axis=1).reshape(steps, layers, experts)
    return load_ratio(summed)


def compare(cfg: RunConfig, folder: Path, *, steps: int, rows: int, bias_speed: float) -> dict[str, np.ndarray]:
    """`ratios` of both runs, by name. They leave their data in `folder`, and nothing else that is read again."""
    found = {}
    for name, speed in {"with bias update": bias_speed, "without": 0.0}.items():
        arm = config_of(cfg, folder / "data", steps=steps, rows=rows, bias_speed=speed)
        found[name] = ratios(loads(arm, folder / name.replace(" ", "_")))
    return found


def plot(path: Path, found: dict[str, np.ndarray]) -> None:
    """Writes a PNG: one panel, a colour a run, a line a layer."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    for color, (name, ratio) in zip(("C0", "C3"), found.items(), strict=True):
        for layer in range(ratio.shape[1]):
            label = f"{name}: ends at {ratio[-1].max():.2f}" if layer == 0 else None
            panel.plot(ratio[:, layer], color=color, alpha=0.9 - 0.25 * layer, label=label)
    panel.axhline(1.0, color="0.6", linewidth=1.0)
    panel.set_title("Expert load from a skewed start (each line a layer)")
    panel.set_xlabel("optimizer step")
    panel.set_ylabel(f"busiest expert / mean, over {WINDOW} steps")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    figure.savefig(path, dpi=110)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for what the user can fix."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.bench.balance", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_config_arguments(parser, default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=4, help="sequences a step")
    parser.add_argument("--bias-speed", type=float, default=0.01)
    parser.add_argument("--run-dir", help="store the prepared data here")
    parser.add_argument("--out", default="balance.png")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        check(given.steps > 0, f"--steps {given.steps} must be at least 1.")
        check(0 <= given.bias_speed < math.inf, f"--bias-speed {given.bias_speed} must be 0 or more, and finite.")
        cfg = load_config(given.config, given.set)
        with tempfile.TemporaryDirectory() as temporary:
            run_dir = user_path(given.run_dir or temporary)
            found = compare(cfg, run_dir, steps=given.steps, rows=given.rows, bias_speed=given.bias_speed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    plot(user_path(given.out), found)
    result = {name: {"start": _row(ratio[0]), "end": _row(ratio[-1])} for name, ratio in found.items()}
    if given.json:
        print(json.dumps(result))
        return 0
    print(f"{'busiest expert / mean':24}{'start':>10}{'end':>10}   (worst layer, {given.steps} steps)")
    for name, ends in result.items():
        print(f"{name:24}{max(ends['start']):10.2f}{max(ends['end']):10.2f}")
    print(f"picture {given.out}")
    return 0


def _row(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]


if __name__ == "__main__":
    run_program(main)
