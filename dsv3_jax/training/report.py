"""What a finished run leaves behind: held-out results, a picture, a folder that other programs read, a sample."""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import rich.box
import rich.console
import rich.table

from dsv3_jax.config.check import UserError
from dsv3_jax.data.baselines import compressor_baselines
from dsv3_jax.data.batch import Batch
from dsv3_jax.data.loader import heldout_batches, num_heldout_batches
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.interrupt import Stop
from dsv3_jax.training import hosts
from dsv3_jax.training.checkpoint import load_variables
from dsv3_jax.training.evaluate import Evaluation, SumLoss, evaluate, num_rows_on
from dsv3_jax.training.log import HELDOUT, METRICS, read_rows
from dsv3_jax.training.progress import announced
from dsv3_jax.training.run import Run
from dsv3_jax.training.sample import Generate, sample_text
from dsv3_jax.typing import Variables

PLOT_NAME = "training.png"
HF_NAME = "hf"

P = ParamSpec("P")
R = TypeVar("R")


def heldout_part(run: Run, stop: Stop) -> Iterator[Batch]:
    """What is scored during training, `train.output.eval_batches` held-out batches, until a stop is requested."""
    for batch in _heldout(run, run.cfg.train.output.eval_batches):
        stop.check()
        yield batch


def final_evaluations(run: Run) -> float:
    """How many evaluations during training make as much work as those at its end."""
    most, total = run.cfg.train.output.final_eval_batches, num_heldout_batches(**_heldout_settings(run))
    num_models = 1 if run.average is None else 2
    return num_models * min(most, total) / min(run.cfg.train.output.eval_batches, total)


def finish(
    run: Run, stop: Stop, own_stop: Stop, sum_loss: SumLoss, generate: Generate, console: rich.console.Console
) -> list[str]:
    """Scores held-out text, prints the results beside compressors, and writes picture, HF folder and sample.

    A part that fails is told on standard error, and the others are done. Returns the names of those that failed.
    Several processes score together, where an error ends them; the first then does the rest.

    Args:
        run: whose last step is saved.
        stop: of all processes.
        own_stop: of this process.
        sum_loss: of `evaluator_on`.
        generate: continues the sample.
        console: takes what is to be read.

    Raises:
        Stopped: as soon as the user asks to stop; everything here can be computed again.
    """
    failed: list[str] = []

    def attempt(name: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R | None:
        own_stop.check()
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever befalls one part, the user still wants the others
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            print(f"error: {name} failed: {reason}", file=sys.stderr)
            failed.append(name)
            return None

    if hosts.count() > 1:
        results = _final_evaluations(run, stop, sum_loss, console)
    else:
        results = attempt("the final evaluation", _final_evaluations, run, stop, sum_loss, console) or {}
    if not hosts.is_first():
        return failed
    baselines = attempt("the comparison with compressors", compressor_baselines, run.data.heldout_texts()) or {}
    if results or baselines:
        console.print(results_table(results, baselines))
    attempt("the picture", _draw, run, run.run_dir / PLOT_NAME, results.get(MODEL), baselines)
    variables = functools.cache(functools.partial(_whole_variables, run))
    attempt("the HF folder", _export, run, variables, own_stop, run.run_dir / HF_NAME)
    text = attempt("the sample", _sample, run, variables, generate)
    if text is not None:
        console.rule("sample (temperature 0.7)")
        console.print(text, markup=False, highlight=False)
        console.rule()
    places = {"the picture": run.run_dir / PLOT_NAME, "the HF folder": run.run_dir / HF_NAME}
    for name, place in {**places, "checkpoint": run.checkpoints.folder}.items():
        if name not in failed:
            console.print(f"{name.removeprefix('the '):<12}{place}", markup=False, highlight=False)
    return failed


MODEL, AVERAGE = "this model", "its moving average"


def results_table(results: Mapping[str, Evaluation], baselines: Mapping[str, float]) -> rich.table.Table:
    """Bits per byte on the held-out files: ours, then the compressors'."""
    sizes = [f": {found.num_bytes / 1e6:.2f} MB, {found.num_tokens:,} tokens" for found in results.values()]
    table = rich.table.Table(title=f"held-out text{''.join(sizes[:1])}", box=rich.box.SIMPLE)
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("nats a token", justify="right")
    for name, found in results.items():
        style = "bold" if name == MODEL else None
        table.add_row(name, f"{found.bits_per_byte:.4f}", f"{found.loss:.4f}", style=style)
    for name, bits in baselines.items():
        label = name if name.endswith("joined") else f"{name}, file by file"
        table.add_row(label, f"{bits:.4f}", "")
    return table


def _final_evaluations(run: Run, stop: Stop, sum_loss: SumLoss, console: rich.console.Console) -> dict[str, Evaluation]:
    """The model and its average on held-out text, at most `train.output.final_eval_batches` batches of it."""
    most = run.cfg.train.output.final_eval_batches
    if not most:
        return {}
    total = num_heldout_batches(**_heldout_settings(run))
    num = min(most, total)
    part = "all held-out text" if num == total else f"{num:,} of {total:,} batches of held-out text, a fair sample"
    again = "" if run.average is None else ", first of the model, then of its moving average"
    console.print(f"evaluating on {part}: {num:,} batches{again} …", markup=False, highlight=False)

    def score(name: str, variables: Variables) -> Evaluation | None:
        def batches() -> Iterator[Batch]:
            for batch in announced(_heldout(run, num), total=num, name=f"evaluating {name}", console=console):
                stop.check()
                yield batch

        return evaluate(sum_loss, variables, batches())

    found = {MODEL: score(MODEL, run.state.variables)}
    if run.average is not None:
        found[AVERAGE] = score(AVERAGE, _averaged(run))
    return {name: result for name, result in found.items() if result is not None}


def _draw(run: Run, path: Path, result: Evaluation | None, baselines: Mapping[str, float]) -> None:
    # Imported here, because matplotlib looks for a folder for its caches on import and may find none.
    from dsv3_jax.training.plot import plot_run

    heldout = read_rows(run.run_dir / HELDOUT)
    title = f"{run.cfg.name}: {run.progress.tokens / 1e6:.1f}M tokens"
    if result is not None:
        heldout.append({**run.progress._asdict(), **result._asdict()})
        title += f", {result.bits_per_byte:.3f} bits per byte"
    plot_run(path, title, read_rows(run.run_dir / METRICS), heldout, baselines, run.cfg.model.mtp_depth)


def _whole_variables(run: Run) -> Variables:
    """Those of the state, or of its checkpoint where no device has all of them."""
    return run.state.variables if run.mesh is None else load_variables(run.run_dir)[1]


def _export(run: Run, variables: Callable[[], Variables], stop: Stop, folder: Path) -> None:
    save_pretrained(
        folder,
        run.cfg.model,
        variables(),
        "bfloat16",
        tokenizer=run.run_dir / "tokenizer.json",
        overwrite=True,
        check_stop=stop.check,
    )


def _sample(run: Run, variables: Callable[[], Variables], generate: Generate) -> str | None:
    return sample_text(run.cfg, run.data.tokenizer, variables(), generate, seed=run.cfg.seed)


def _heldout(run: Run, max_batches: int) -> Iterator[Batch]:
    return heldout_batches(**_heldout_settings(run), max_batches=max_batches)


def _heldout_settings(run: Run) -> dict:
    return {
        "tokenizer": run.data.tokenizer,
        "shards": run.data.heldout,
        "batch_size": num_rows_on(run.mesh, run.cfg.train.batch.micro),
        "seq_len": run.cfg.train.seq_len,
        "overlap": run.cfg.data.heldout_overlap,
    }


def _averaged(run: Run) -> Variables:
    assert run.average is not None

    def like(average: Any, param: jax.Array) -> jax.Array:
        return jax.numpy.asarray(average, param.dtype)

    params = jax.tree.map(like, run.average.average(), run.state.params)
    return {"params": params, "router_state": run.state.router_state}
