"""Export of a training run, or of an official folder in another dtype, with its tokenizer.

python -m dsv3_jax.interop.export RUN_DIR OUT_DIR                          # bfloat16
python -m dsv3_jax.interop.export RUN_DIR OUT_DIR --dtype float8_e4m3fn    # 128x128 blocks
python -m dsv3_jax.interop.export RUN_DIR OUT_DIR --average                # the moving average of the parameters
python -m dsv3_jax.interop.export RUN_DIR OUT_DIR --no-mtp                 # the main model alone
python -m dsv3_jax.interop.export DeepSeek-V3 OUT_DIR                      # FP8 to bfloat16
"""

import argparse
import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import from_dict
from dsv3_jax.config.model import ModelConfig
from dsv3_jax.config.paths import user_path
from dsv3_jax.interop.hf_names import ragged_tensor
from dsv3_jax.interop.load import load_pretrained
from dsv3_jax.interop.run_dir import is_run
from dsv3_jax.interop.safetensors_io import INDEX, SINGLE
from dsv3_jax.interop.save import DTYPES, save_pretrained
from dsv3_jax.interop.whole_folder import resolve
from dsv3_jax.interrupt import Stopped, StopRequest, leave
from dsv3_jax.output import dependable_output
from dsv3_jax.training.checkpoint import load_variables


def export(
    source: str | Path,
    out_dir: str | Path,
    dtype: str = "bfloat16",
    max_shard_size: int | float | str = "5GB",
    use_average: bool = False,
    overwrite: bool = False,
    with_mtp: bool = True,
    log: Callable[[str], None] = print,
    stop: StopRequest | None = None,
) -> ModelConfig:
    """Writes a model as an official folder; returns its configuration, as `load_pretrained` will read it.

    Args:
        source: a run dir, whose newest whole checkpoint is taken with its tokenizer.json; or an official folder, whose
            tokenizer, chat templates and generation_config.json go along as they are.
        use_average: of a run, the moving average of the parameters instead of the last.
        log: receives one line for whatever the user should know.
        stop: what ends the export between two pieces of a tensor; then nothing of it is left.
    The others are those of `save_pretrained`.
    Raises: `UserError` when `source` holds no whole checkpoint (or no average), or would be deleted; and whatever
        `load_pretrained` and `save_pretrained` do; `Stopped`.
    """
    source = user_path(source)
    check(source.is_dir(), f"{source}: is not a folder; give a run dir of train.py or an official folder.")
    is_official = not is_run(source) and _has_weights(source)
    out = resolve(out_dir)
    check(
        not source.resolve().is_relative_to(out) or (is_official and source.resolve() == out),
        f"{out_dir}: holds {source}, which the export would replace; choose another folder.",
    )
    call = _call if stop is None else stop.run
    if is_official:
        check(not use_average, f"{source}: is an official folder, which has no moving average; leave --average out.")
        cfg, variables = call(load_pretrained, source, dtype="bfloat16" if dtype == "bfloat16" else "float32")
        tokenizer = source
    else:
        config, variables = call(load_variables, source, use_average=use_average, log=log)
        cfg = from_dict(config["model"], ModelConfig)
        tokenizer = source / "tokenizer.json" if (source / "tokenizer.json").is_file() else None
        if tokenizer is None:
            log(f"{source}: has no tokenizer.json; the export goes without a tokenizer.")
    if with_mtp and cfg.mtp_depth:
        log("the export holds MTP modules, which transformers lists as unexpected and leaves out (--no-mtp does, too).")
    ragged = ragged_tensor(cfg) if dtype == "float8_e4m3fn" else None
    if ragged is not None:
        log(
            f"{ragged.key} {list(ragged.shape)} does not divide into blocks of 128: transformers without a GPU refuses "
            "such FP8 folders or scales them wrongly (its fault); load_pretrained reads them, vLLM may refuse them."
        )
    save_pretrained(
        out_dir,
        cfg,
        variables,
        dtype,
        max_shard_size=max_shard_size,
        tokenizer=tokenizer,
        overwrite=overwrite,
        with_mtp=with_mtp,
        check_stop=None if stop is None else stop.check,
    )
    return cfg if with_mtp else dataclasses.replace(cfg, mtp_depth=0)


def _call(function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    return function(*args, **named)


def _has_weights(folder: Path) -> bool:
    return (folder / "config.json").is_file() and ((folder / INDEX).is_file() or (folder / SINGLE).is_file())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a user error. A signal ends it, leaving nothing of the export."""
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.interop.export",
        description="Exports a training run, or an official folder in another dtype, as a Hugging Face folder.",
    )
    parser.add_argument("source", help="what train.py was given as --run-dir, or an official folder")
    parser.add_argument("out_dir", help="the folder to write")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="such as 500MB (default 5GB)")
    parser.add_argument("--average", action="store_true", help="the moving average instead of the last parameters")
    parser.add_argument("--no-mtp", action="store_true", help="the main model alone, without MTP modules")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is not an earlier export")
    args = parser.parse_args(arguments)
    try:
        with StopRequest(answer=_announce) as stop:
            export(
                args.source,
                args.out_dir,
                args.dtype,
                max_shard_size=args.max_shard_size,
                use_average=args.average,
                overwrite=args.overwrite,
                with_mtp=not args.no_mtp,
                stop=stop,
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        leave(stopped.exit_code)
    print(f"wrote {args.out_dir} ({args.dtype})")
    return 0


def _announce(number: signal.Signals) -> None:
    print(f"{number.name}: leaving as soon as the unfinished export is removed (again: leave at once).")


if __name__ == "__main__":
    dependable_output()
    sys.exit(main())
