"""Export of a training run as an official folder, with its tokenizer.

python -m dsv3_jax.interop.export RUN_DIR OUT_DIR                          # bfloat16
python -m dsv3_jax.interop.export RUN_DIR OUT_DIR --dtype float8_e4m3fn    # 128x128 blocks
python -m dsv3_jax.interop.export RUN_DIR OUT_DIR --average                # the moving average of the parameters
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import from_dict
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.save import DTYPES, save_pretrained
from dsv3_jax.interrupt import run_program
from dsv3_jax.training.checkpoint import load_variables


def export(
    run_dir: str | Path,
    out_dir: str | Path,
    dtype: str = "bfloat16",
    max_shard_size: int | str = "5GB",
    use_average: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> ModelConfig:
    """Writes the newest whole checkpoint of a run as an official folder; returns the model's configuration.

    The run's tokenizer.json goes along when there is one. The other arguments are those of `save_pretrained`.
    Raises: `UserError` when `run_dir` holds no whole checkpoint (or no average), and whatever `save_pretrained` does.
    """
    run_dir = user_path(run_dir)
    check(run_dir.is_dir(), f"{run_dir}: is not a folder; give the --run-dir of a training run.")
    config, variables = load_variables(run_dir, use_average=use_average, say=say)
    cfg = from_dict(config["model"], ModelConfig)
    tokenizer = run_dir / "tokenizer.json"
    save_pretrained(
        out_dir,
        cfg,
        variables,
        dtype,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        overwrite=overwrite,
    )
    return cfg


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.interop.export", description="Exports a training run as a Hugging Face folder."
    )
    parser.add_argument("run_dir", help="what train.py was given as --run-dir")
    parser.add_argument("out_dir", help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 500MB (default 5GB)")
    parser.add_argument("--average", action="store_true", help="the moving average instead of the last parameters")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not an earlier export")
    args = parser.parse_args(arguments)
    try:
        export(
            args.run_dir,
            args.out_dir,
            args.dtype,
            max_shard_size=args.max_shard_size,
            use_average=args.average,
            overwrite=args.overwrite,
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.out_dir} ({args.dtype})")
    return 0


if __name__ == "__main__":
    run_program(main)
