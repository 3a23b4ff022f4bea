"""Does training in FP8 lose anything? One model trained in several precisions, from the same seeds and data.

    python -m dsv3_jax.bench.precision configs/tiny.py --steps 1000 --out runs/precision
    python -m dsv3_jax.bench.precision configs/tiny.py --seeds 0 1 2 --arms bf16 fp8_dsv3           only these, for now

A seed chooses the first weights and the order of the data. Each arm is a run in OUT/seedN/ARM with checkpoints: the
same command continues it. At the end: a table, and OUT/loss_error.png, of each arm's loss against that of bf16 from the
same seeds. Arms and seeds trained by earlier commands into OUT are compared as well if they have the same
configuration, code and data (OUT/seedN/ARM/made_by.json); others are refused or left out, by name.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from dsv3_jax.bench.machine import describe
from dsv3_jax.bench.made_by import describe_source, read_data, record, why_not
from dsv3_jax.bench.precision_errors import BASE, read_losses, seeds_in, summary, table
from dsv3_jax.bench.precision_plot import plot
from dsv3_jax.bench.timing import Stopwatch
from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import load_config, to_dict
from dsv3_jax.config.paths import user_path
from dsv3_jax.config.run import RunConfig
from dsv3_jax.interrupt import Stopped, StopRequest, leave
from dsv3_jax.model.functions import Functions, fp8_functions, functions_for
from dsv3_jax.output import dependable_output
from dsv3_jax.training.host_memory import keep_freed_memory
from dsv3_jax.training.log import METRICS, RunLog, read_rows
from dsv3_jax.training.metrics import Speed, metrics_row
from dsv3_jax.training.run import Run, open_run, steps
from dsv3_jax.training.state import TrainState
from dsv3_jax.training.step import make_step

TRACES = (METRICS, "checkpoints")
"""What lies in a folder that something was trained into."""


class Arm(NamedTuple):
    """One way to train. `precision` rules the state (masters, moments), `functions` the arithmetic.

    `jitter`: relative size of a random change of the first weights. As training is chaotic, an arm that differs from
    another by nothing but a tiny jitter shows what part of a difference is chance.
    """

    label: str
    precision: Literal["float32", "mixed", "fp8_dsv3"]
    functions: Functions
    jitter: float = 0.0


ARMS: Mapping[str, Arm] = {
    "float32": Arm("float32", "float32", functions_for("float32")),
    BASE: Arm("bf16 (mixed)", "mixed", functions_for("mixed")),
    "bf16_again": Arm("bf16 from weights 1e-6 away: chance", "mixed", functions_for("mixed"), jitter=1e-6),
    "fp8_dsv3": Arm("FP8 (fp8_dsv3)", "fp8_dsv3", functions_for("fp8_dsv3")),
    "fp8_block_gradients": Arm(
        "FP8, gradients in 128x128 blocks",
        "fp8_dsv3",
        fp8_functions(gradient_tile=(128, 128)),
    ),
}


def config_of(cfg: RunConfig, arm: Arm, *, seed: int, steps: int, data_dir: Path) -> RunConfig:
    """`cfg` for one arm: its precision, the seed, `steps` steps, tokenised data shared by all arms, no average."""
    tokens = steps * cfg.train.batch.full * cfg.train.seq_len
    output = dataclasses.replace(cfg.train.output, checkpoint_every=100, keep_checkpoints=1, tensorboard=False)
    train = dataclasses.replace(cfg.train, total_tokens=tokens, output=output, ema_decay=0.0)
    data = dataclasses.replace(cfg.data, cache_dir=str(data_dir))
    return dataclasses.replace(cfg, seed=seed, precision=arm.precision, train=train, data=data)


def source_of(cfg: RunConfig, name: str) -> dict[str, Any]:
    """What decides the losses of arm `name` with its configuration `cfg`; its data aside."""
    return describe_source(to_dict(cfg), arm=name, jitter=ARMS[name].jitter)


def train_arm(cfg: RunConfig, name: str, run_dir: Path, *, log: Callable[[str], None]) -> bool:
    """Trains one arm to its last step, or until SIGTERM or Ctrl-C; returns whether it got there."""
    arm = ARMS[name]
    with StopRequest() as stop, contextlib.ExitStack() as stack:
        run = stop.run(stack.enter_context, open_run(cfg, run_dir, functions=arm.functions, log=log))
        record(run_dir, source_of(cfg, name), run.data.digest())
        if arm.jitter and run.progress.step == 0:
            run.state = jittered(run.state, arm.jitter)
        metrics = stack.enter_context(contextlib.closing(RunLog(run_dir, step=run.progress.step, tensorboard=False)))
        with contextlib.suppress(Stopped):
            _train(run, metrics, stop, log)
        run.checkpoints.wait()
        if run.progress.step not in (0, *run.checkpoints.steps()):
            run.save()
        run.checkpoints.wait()
        return run.progress.tokens >= cfg.train.total_tokens


def _train(run: Run, metrics: RunLog, stop: StopRequest, log: Callable[[str], None]) -> None:
    """Takes every step that is left; raises `Stopped` between two of them."""
    tokens, watch, name = run.progress.tokens, Stopwatch(), f"{run.run_dir.parent.name}/{run.run_dir.name}"
    for progress, report, rates in steps(run, make_step(run.cfg, functions=run.functions), stop=stop):
        float(report.loss)  # waits until the step has run
        row = metrics_row(progress, report, rates, Speed((progress.tokens - tokens) / watch.lap(), float("nan")))
        check(math.isfinite(row["loss"]), f"{name}: the loss of step {row['step']} is {row['loss']}.")
        metrics.write(row)
        tokens = progress.tokens
        if progress.step % 50 == 0:
            log(f"{name}: step {row['step']}, loss {row['main_loss']:.4f}, {row['tokens_per_s']:.0f} tokens/s")
        if progress.step % run.cfg.train.output.checkpoint_every == 0:
            run.save()


def comparable(out: Path, made: Callable[..., RunConfig], log: Callable[[str], None]) -> dict[str, dict[int, Path]]:
    """The runs in `out` by arm and seed that this command would have made, on the same data; names the others.

    Args:
        made: the configuration of an arm and seed.
    """
    runs: dict[str, dict[int, Path]] = {name: {} for name in ARMS}
    data: dict[str, Any] = {}
    for seed, folder in seeds_in(out):
        for name, arm in ARMS.items():
            run_dir = folder / name
            if not (run_dir / METRICS).exists():
                continue
            reason = why_not(run_dir, source_of(made(arm, seed=seed), name), TRACES)
            if reason is None and data.setdefault("first", read_data(run_dir)) != read_data(run_dir):
                reason = "it has learned from other data"
            if reason is not None:
                log(f"{run_dir} is left out: {reason}.")
                continue
            runs[name][seed] = run_dir
    return runs


def jittered(state: TrainState, size: float) -> TrainState:
    """`state` with every weight changed by a random share of `size`."""
    leaves, treedef = jax.tree.flatten(state.params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [
        leaf * (1 + size * jax.random.normal(key, leaf.shape, leaf.dtype))
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return state._replace(params=jax.tree.unflatten(treedef, moved))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for what the user can fix."""
    dependable_output()
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.bench.precision", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add_config_arguments(parser, default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one run of each arm from each")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), help="which to train now")
    parser.add_argument("--out", type=user_path, default=Path("runs/precision"))
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    log = partial(print, file=sys.stderr, flush=True)
    keep_freed_memory()
    try:
        check(given.steps > 0, f"--steps {given.steps} must be at least 1.")
        cfg = load_config(given.config, given.set)
        made = partial(config_of, cfg, steps=given.steps, data_dir=given.out.absolute() / "data")
        for seed in given.seeds:
            for name in given.arms:
                run_dir, arm_cfg = given.out / f"seed{seed}" / name, made(ARMS[name], seed=seed)
                reason = why_not(run_dir, source_of(arm_cfg, name), TRACES)
                check(
                    reason is None,
                    f"{run_dir} was made by another command ({reason}); use another --out, or delete it to train it "
                    "again.",
                )
                if len(read_rows(run_dir / METRICS)) >= given.steps:
                    continue
                run_dir.mkdir(parents=True, exist_ok=True)
                (run_dir / "machine.json").write_text(json.dumps(describe(ARMS[name].functions.compute_dtype)))
                if not train_arm(arm_cfg, name, run_dir, log=log):
                    log(f"{run_dir}: stopped and saved; the same command continues.")
                    return 0
        runs = comparable(given.out, made, log)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        log(str(stopped))
        return stopped.exit_code
    found = read_losses(runs, steps=given.steps)
    if not found.get(BASE):
        log(f"nothing to compare with yet: {BASE} must be trained to step {given.steps}.")
        return 0
    rows = summary(found)
    labels = {name: arm.label for name, arm in ARMS.items()}
    plot(given.out / "loss_error.png", found, labels, f"{cfg.name}: {given.steps} steps from the same seeds and data")
    print(json.dumps(rows) if given.json else table(rows, labels))
    return 0


if __name__ == "__main__":
    leave(main())
