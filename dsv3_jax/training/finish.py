"""What a finished run leaves behind: held-out results, a picture, a sample, a folder that other programs read."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np
import rich.box
import rich.console
import rich.table

from dsv3_jax.data.baselines import compressor_baselines
from dsv3_jax.data.loader import Batch, heldout_batches
from dsv3_jax.data.prepare import PreparedData
from dsv3_jax.interop.save import save_pretrained
from dsv3_jax.interrupt import StopRequest
from dsv3_jax.training.build import Run
from dsv3_jax.training.evaluate import Evaluation, SumLoss, evaluate
from dsv3_jax.training.log import HELDOUT, METRICS, read_rows
from dsv3_jax.training.plot import plot_run
from dsv3_jax.typing import Variables

PLOT_NAME = "training.png"
HF_NAME = "hf"

Generate = Callable[..., np.ndarray]
"""`dsv3_jax.serving.generate.generate`, or anything with its signature."""


def evaluate_part(run: Run, stop: StopRequest, sum_loss: SumLoss) -> Evaluation:
    """The evaluation during training: the first `train.output.eval_batches` held-out batches."""
    batches = _heldout(run, run.cfg.train.output.eval_batches)
    return evaluate(sum_loss, run.state.variables, _until(stop, batches))


def finish(run: Run, stop: StopRequest, sum_loss: SumLoss, generate: Generate, console: rich.console.Console) -> None:
    """Evaluates on all held-out text, prints the results beside compressors, and writes picture, sample, HF folder.

    Raises:
        Stopped: as soon as the user asks to stop; everything here can be computed again.
    """
    console.print("evaluating on all held-out text …")
    result = evaluate(sum_loss, run.state.variables, _until(stop, _heldout(run, None)))
    averaged = None
    if run.average is not None:
        averaged = evaluate(sum_loss, _averaged(run), _until(stop, _heldout(run, None)))
    baselines = compressor_baselines(run.data.heldout_texts())
    console.print(results_table(result, averaged, baselines))

    heldout = read_rows(run.run_dir / HELDOUT)
    heldout.append({"step": run.progress.step, "tokens": run.progress.tokens, **result._asdict()})
    picture = run.run_dir / PLOT_NAME
    title = f"{run.cfg.name}: {result.bits_per_byte:.3f} bits per byte after {run.progress.tokens / 1e6:.1f}M tokens"
    plot_run(picture, title, read_rows(run.run_dir / METRICS), heldout, baselines, run.cfg.model.mtp_depth)

    folder = run.run_dir / HF_NAME
    tokenizer = run.run_dir / "tokenizer.json"
    save_pretrained(folder, run.cfg.model, run.state.variables, "bfloat16", tokenizer=tokenizer, overwrite=True)
    text = sample_text(run, generate)
    if text is not None:
        console.rule("sample (temperature 0.7)")
        console.print(text, markup=False, highlight=False)
        console.rule()
    console.print(f"picture     {picture}\nHF folder   {folder}\ncheckpoint  {run.checkpoints.folder}", highlight=False)


def results_table(result: Evaluation, averaged: Evaluation | None, baselines: Mapping[str, float]) -> rich.table.Table:
    """Bits per byte on the held-out files: ours, then the compressors'."""
    table = rich.table.Table(
        title=f"held-out text: {result.num_bytes / 1e6:.2f} MB, {result.num_tokens:,} tokens", box=rich.box.SIMPLE
    )
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    table.add_column("nats a token", justify="right")
    table.add_row("this model", f"{result.bits_per_byte:.4f}", f"{result.loss:.4f}", style="bold")
    if averaged is not None:
        table.add_row("its moving average", f"{averaged.bits_per_byte:.4f}", f"{averaged.loss:.4f}")
    for name, bits in baselines.items():
        label = name if name.endswith("joined") else f"{name}, file by file"
        table.add_row(label, f"{bits:.4f}", "")
    return table


def sample_text(run: Run, generate: Generate) -> str | None:
    """`train.output.sample_prompt` continued by `sample_tokens` tokens; None when that is 0."""
    output, tokenizer = run.cfg.train.output, run.data.tokenizer
    if not output.sample_tokens:
        return None
    prompt = tokenizer.prompt(output.sample_prompt)
    seed = int(np.asarray(run.state.key)[-1] & 0x7FFFFFFF)
    room = run.cfg.model.max_position - len(prompt)
    ids = generate(
        run.cfg.model,
        run.state.variables,
        [prompt],
        min(output.sample_tokens, room),
        temperature=0.7,
        top_p=0.95,
        seed=seed,
        eos_id=tokenizer.eos_id,
    )
    new = list(itertools.takewhile(lambda i: i != tokenizer.eos_id, (int(i) for i in ids[0])))
    return output.sample_prompt + tokenizer.decode(new)


def _heldout(run: Run, max_batches: int | None) -> Iterator[Batch]:
    data: PreparedData = run.data
    return heldout_batches(
        data.tokenizer,
        data.heldout,
        batch_size=run.cfg.train.batch.micro,
        seq_len=run.cfg.train.seq_len,
        overlap=run.cfg.data.heldout_overlap,
        max_batches=max_batches,
    )


def _until(stop: StopRequest, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches`, until a stop is requested."""
    for batch in batches:
        stop.check()
        yield batch


def _averaged(run: Run) -> Variables:
    assert run.average is not None

    def like(average: np.ndarray, param: jax.Array) -> jax.Array:
        return jax.numpy.asarray(average, param.dtype)

    params = jax.tree.map(like, run.average.average(), run.state.params)
    return {"params": params, "router_state": run.state.router_state}
