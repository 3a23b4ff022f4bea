"""What a run tells while it trains: a row for each step, and a line for all else."""

import contextlib
from collections.abc import Iterator

import rich.console

from dsv3_jax.config.check import UserError
from dsv3_jax.config.mesh_rules import schedule_note
from dsv3_jax.planning.flops import train_flops_per_token
from dsv3_jax.training import hosts
from dsv3_jax.training.devices import num_shares
from dsv3_jax.training.evaluate import Evaluation
from dsv3_jax.training.log import RunLog
from dsv3_jax.training.metrics import Progress, metrics_row
from dsv3_jax.training.progress import Clock, ProgressBar
from dsv3_jax.training.report import final_evaluations
from dsv3_jax.training.run import Run, StepTaken
from dsv3_jax.training.step import StepReport
from dsv3_jax.training.throughput import measure_matmul_peak


class Diverged(hosts.AgreedError):
    """Loss or gradient is no longer finite, as every process sees; the step was not applied."""


class Monitor:
    """Logs, shows and times the steps of a run.

    The report of a step is read while the next one runs, so the device never waits for the host. Every process reads
    them; the first one writes and shows.
    """

    def __init__(self, run: Run, console: rich.console.Console) -> None:
        cfg = run.cfg.train
        self._run, self._total, self._output = run, cfg.total_tokens, cfg.output
        self._log = None
        if hosts.is_first():
            self._log = RunLog(run.run_dir, step=run.progress.step, tensorboard=cfg.output.tensorboard)
        self._bar = ProgressBar(console, total_tokens=cfg.total_tokens, done=run.progress.tokens)
        self._unread: list[StepTaken] = []
        note = schedule_note(run.cfg.parallel, cfg.batch)
        if note is not None:
            self.tell(note)

    def start(self) -> None:
        """Times the steps from now on. Measures first what the device can do, which takes a second."""
        self._clock = Clock(
            self._run.progress,
            flops_per_token=train_flops_per_token(self._run.cfg.model, self._run.cfg.train.seq_len),
            peak_flops_per_s=num_shares(self._run.mesh) * measure_matmul_peak(self._run.functions.compute_dtype),
        )

    def add(self, taken: StepTaken) -> None:
        """A step that has begun; reads those before it."""
        self.read()
        self._unread.append(taken)

    def read(self) -> None:
        """Waits for the steps that have begun, and tells of them.

        Raises: `Diverged` where loss or gradient is not finite, `LogError` where the log cannot be written.
        """
        while self._unread:
            progress, report, rates = self._unread.pop(0)
            if not report.is_finite:
                raise Diverged(_explain(self._run, progress, report))
            row = metrics_row(progress, report, rates, self._clock.lap(progress))
            if self._log is not None and progress.step % self._output.log_every == 0:
                self._log.write(row)
            self._bar.show(row, self._clock.seconds_left(self._total - progress.tokens))

    def tell(self, text: str) -> None:
        """A line for the user."""
        self._bar.log(text)

    @contextlib.contextmanager
    def compiling(self, name: str) -> Iterator[None]:
        """Around what compiles `name`: says so, and leaves its time out."""
        self.read()
        self.tell(f"compiling {name}, which takes up to a minute the first time …")
        yield
        self._clock.restart(self._run.progress)

    def evaluated(self, result: Evaluation | None) -> None:
        """The result of scoring held-out text, which ends now; None: there was nothing to score."""
        progress = self._run.progress
        if result is None:
            self.tell(f"step {progress.step}: these held-out batches score nothing")
        else:
            if self._log is not None:
                self._log.write_heldout({**progress._asdict(), **result._asdict()})
            self.tell(f"step {progress.step}: held-out {result.bits_per_byte:.4f} bits per byte")
        self._clock.pause(progress, times_after=final_evaluations(self._run))

    def saved(self) -> None:
        """A checkpoint is on its way."""
        self._clock.pause(self._run.progress)

    @property
    def all_is_finite(self) -> bool:
        """Whether steps whose reports nobody has read are good; waits for them."""
        return all(taken.report.is_finite for taken in self._unread)

    @property
    def failure(self) -> str:
        """Why TensorBoard's events are incomplete; empty when they are not."""
        return "" if self._log is None else self._log.tensorboard_failure

    def close(self) -> None:
        """Ends the bar and the log."""
        self._bar.close()
        if self._log is not None:
            self._log.close()


def _explain(run: Run, progress: Progress, report: StepReport) -> str:
    """What happened, what is safe, and what to try."""
    with contextlib.suppress(UserError):
        run.checkpoints.wait()
    steps = run.checkpoints.steps()
    good = f"The last good checkpoint is step {steps[-1]}" if steps else "There is no checkpoint yet"
    return (
        f"step {progress.step} ({progress.tokens:,} tokens): loss {float(report.loss)}, gradient norm "
        f"{float(report.grad_norm)}; this update was not applied. {good} in {run.checkpoints.folder}.\n"
        "Try, in this order, each in a new --run-dir: a lower train.lr.peak or a longer train.lr.warmup_tokens; "
        "a smaller train.optimizer.clip_norm; --set precision=float32; and look at the data of this step."
    )
