"""Trains a model: parse, build, loop, finish.

    python train.py --config configs/tiny.py --run-dir runs/tiny
    python train.py --config configs/tiny.py --run-dir runs/mine --set data.paths=~/code --set train.lr.peak=2e-3
    python train.py --config configs/tiny.py --simulate-devices 4 --set parallel.expert=2 --plan

The same command continues a run that was stopped, from its newest checkpoint and bit for bit.
"""

import argparse
import contextlib
import logging
import os
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import rich.console
from jax.sharding import Mesh

from dsv3_jax.config.arguments import add_config_arguments
from dsv3_jax.config.check import UserError, check
from dsv3_jax.config.load import fields_of, flatten, load_config, to_dict
from dsv3_jax.config.paths import user_path
from dsv3_jax.config.run import RunConfig
from dsv3_jax.interrupt import Stop, Stopped, StopRequest, leave
from dsv3_jax.model.functions import Functions
from dsv3_jax.output import dependable_output
from dsv3_jax.parallel.mesh import mesh_shape
from dsv3_jax.planning.fit import plan_text
from dsv3_jax.serving.generate import generate
from dsv3_jax.training import hosts
from dsv3_jax.training.checkpoint import CheckpointError
from dsv3_jax.training.devices import Trace, dump_programs, mesh_of, simulate
from dsv3_jax.training.evaluate import SumLoss, evaluate, evaluator_on, warm_up
from dsv3_jax.training.host_memory import keep_freed_memory
from dsv3_jax.training.mesh_step import step_on
from dsv3_jax.training.metrics import Progress
from dsv3_jax.training.monitor import Diverged, Monitor
from dsv3_jax.training.pipelined import PipelineStep
from dsv3_jax.training.replaced import functions_in, replaced
from dsv3_jax.training.report import finish, heldout_part
from dsv3_jax.training.run import Run, open_run, steps
from dsv3_jax.training.sample import check_sample
from dsv3_jax.training.step import Step

EXIT_USER_ERROR = 2
EXIT_DIVERGED = 3


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code (see HELP)."""
    dependable_output()
    given = parse(arguments)
    console = rich.console.Console(soft_wrap=True)
    try:
        cfg = load_config(given.config, given.set)
        if given.print_config:
            for key, value in flatten(to_dict(cfg)).items():
                console.print(f"{key} = {value!r}", markup=False, highlight=False)
            return 0
        num = given.simulate_devices
        check(num is None or num > 0, f"--simulate-devices {num} must be at least 1.")
        if given.plan:
            text = plan(given, cfg)
            console.quiet = not hosts.is_first()
            console.print(text, markup=False, highlight=False)
            hosts.leave_together()
            return 0
        mesh = join(given, cfg)
        console.quiet = not hosts.is_first()
        keep_freed_memory()
        run_dir = user_path(given.run_dir)
        keep_compiled_programs(run_dir)
        # Orbax logs a traceback for each file it cannot write; the error that reaches us says it once. Matplotlib tells
        # of its caches.
        for name in ("absl", "matplotlib"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with StopRequest() as stop, contextlib.ExitStack() as opened, hosts.leaving_alone():
            functions = functions_in(given.config, cfg)
            hosts.check_same(described(cfg, functions))
            tell = partial(console.print, markup=False, highlight=False)
            run = stop.run(opened.enter_context, open_run(cfg, run_dir, functions=functions, mesh=mesh, log=tell))
            code = train(run, stop, console, Trace(run_dir / "trace", num_steps=given.profile))
        hosts.leave_together()
        return code
    except UserError as error:
        is_diverged = isinstance(error, Diverged)
        if hosts.is_mine(error):
            print(f"{'stopped' if is_diverged else 'error'}: {error}", file=sys.stderr)
        hosts.leave_together()
        return EXIT_DIVERGED if is_diverged else EXIT_USER_ERROR
    except Stopped as stopped:
        console.print(f"{stopped} before the first step; nothing to save.", highlight=False)
        return stopped.exit_code


def join(given: argparse.Namespace, cfg: RunConfig) -> Mesh | None:
    """Finds the other processes and the devices; the mesh to train on, None: one device."""
    check(
        given.simulate_devices is None or given.processes is None,
        "--simulate-devices is for one process, not --processes; leave one of them out.",
    )
    index = hosts.initialize(given.coordinator, given.processes, given.process)
    if given.simulate_devices is not None:
        simulate(given.simulate_devices)
    if given.dump_hlo is not None and index == 0:
        dump_programs(user_path(given.dump_hlo).absolute())
    return mesh_of(cfg, simulated=given.simulate_devices)


def plan(given: argparse.Namespace, cfg: RunConfig) -> str:
    """What `--plan` prints; simulated devices are not even made."""
    if given.simulate_devices is not None:
        return plan_text(cfg, mesh_shape(cfg.parallel, given.simulate_devices))
    mesh = join(given, cfg)
    return plan_text(cfg, mesh_shape(cfg.parallel, 1 if mesh is None else mesh.size))


def described(cfg: RunConfig, functions: Functions) -> dict[str, Any]:
    """All that the processes of one run must have alike."""
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "orbax-checkpoint", "dsv3-jax")}
    return {**flatten(to_dict(cfg)), **versions, "functions": replaced(functions, cfg.precision)}


def train(run: Run, own_stop: StopRequest, console: rich.console.Console, trace: Trace) -> int:
    """The loop, and what follows it; returns the exit code.

    What takes long and changes nothing runs under `stop`, which raises `Stopped` when the user asks for it. Every
    process of a run is here and does the same.
    """
    stop = hosts.agreed(own_stop)
    check_sample(run.cfg, run.data.tokenizer)
    step = step_on(run.cfg, run.mesh, run.functions)
    sum_loss = evaluator_on(run.cfg, run.mesh, run.functions)
    monitor = Monitor(run, console)
    try:
        with contextlib.suppress(Stopped):
            loop(run, step, sum_loss, monitor, stop, trace)
        monitor.read()
        save_newest(run)
    except (Diverged, CheckpointError):
        raise
    except Exception as error:
        if hosts.count() > 1:  # the others know nothing of it, and a save needs all
            raise
        saved = rescue(run, monitor)
        if isinstance(error, UserError):
            raise UserError(f"{error} {saved}") from error
        print(saved, file=sys.stderr)
        raise
    finally:
        monitor.close()
        trace.close()
    if run.progress.tokens < run.cfg.train.total_tokens:
        if not run.progress.step:
            stop.check()
        console.print(f"saved after step {run.progress.step}; the same command continues.", highlight=False)
        return 0
    failed = results(run, stop, own_stop, sum_loss, console)
    if monitor.failure:
        print(f"error: {monitor.failure}.", file=sys.stderr)
    return EXIT_USER_ERROR if failed or monitor.failure else 0


def loop(run: Run, step: Step | PipelineStep, sum_loss: SumLoss, monitor: Monitor, stop: Stop, trace: Trace) -> None:
    """Takes steps, and scores and saves when it is time."""
    output = run.cfg.train.output
    stop.run(monitor.start)
    has_evaluated = False
    for taken in steps(run, step, stop=stop, compiling=monitor.compiling):
        monitor.add(taken)
        if trace.step(taken.report):
            monitor.tell(f"the trace is in {run.run_dir / 'trace'}")
        if output.eval_batches and is_due(run.progress, output.eval_every):
            if not has_evaluated:
                with monitor.compiling("the evaluation"):
                    stop.run(warm_up, sum_loss, run.state.variables, heldout_part(run, stop))
                has_evaluated = True
            monitor.read()
            monitor.evaluated(stop.run(evaluate, sum_loss, run.state.variables, heldout_part(run, stop)))
        if is_due(run.progress, output.checkpoint_every):
            monitor.read()
            run.save()
            monitor.saved()


def results(run: Run, stop: Stop, own_stop: StopRequest, sum_loss: SumLoss, console: rich.console.Console) -> list[str]:
    """What a finished run leaves behind; the names of what failed."""
    try:
        failed = stop.run(finish, run, stop, own_stop, sum_loss, partial(generate, functions=run.functions), console)
    except Stopped as stopped:
        console.print(f"{stopped}; training is done and saved, the same command computes the results.", highlight=False)
        failed = []
    hosts.barrier("the results are there")
    return failed


def save_newest(run: Run) -> None:
    """Has a checkpoint of the newest step on the disk before it returns."""
    run.checkpoints.wait()
    if run.progress.step not in (0, *run.checkpoints.steps()):
        run.save()
    run.checkpoints.wait()


def rescue(run: Run, monitor: Monitor) -> str:
    """Saves what was trained when the run cannot go on; returns what became of it."""
    if not monitor.all_is_finite:
        return "The newest step is not saved: its loss is not finite."
    try:
        save_newest(run)
    except UserError as error:
        return f"The checkpoint failed too: {error}"
    return f"The checkpoint of step {run.progress.step} is saved; the same command continues."


def is_due(progress: Progress, every: int) -> bool:
    """Whether something that happens `every` steps (0: never) happens after this one."""
    return every > 0 and progress.step % every == 0


def keep_compiled_programs(run_dir: Path) -> None:
    """Lets a resumed run find its compiled step in the run dir, unless the environment names another place."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(run_dir.absolute() / "compiled"))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=HELP + "\nkeys for --set:\n  " + "\n  ".join(fields_of()),
    )
    add_config_arguments(parser, "--config")
    parser.add_argument("--run-dir", default="runs/default", metavar="DIR", help="where everything of this run goes")
    parser.add_argument("--print-config", action="store_true", help="print every key and value, and stop")
    parser.add_argument(
        "--plan", action="store_true", help="print the mesh, what each axis splits and bytes a device, and stop"
    )
    parser.add_argument("--simulate-devices", type=int, metavar="N", help="let the CPU stand for N devices")
    parser.add_argument("--profile", type=int, default=0, metavar="STEPS", help="trace some steps, in DIR/trace")
    parser.add_argument("--dump-hlo", metavar="DIR", help="have XLA write the programs it compiles to DIR")
    several = parser.add_argument_group("several processes (SLURM and Open MPI tell these themselves)")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="how many there are")
    several.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")
    return parser.parse_args(arguments)


HELP = """what the run dir holds:
  config.json      the resolved configuration        metrics.jsonl   one line a step (loss, load, speed, …)
  checkpoints/     the newest few, each checked      heldout.jsonl   one line an evaluation
  tensorboard/     the same values to look at       training.png    loss, bits per byte, expert load
  tokenizer.json   the tokenizer                     hf/             for transformers, vLLM, load_pretrained
  trace/           with --profile, for Perfetto or TensorBoard

stopping: Ctrl-C, SIGTERM or a closed terminal saves and leaves, in the middle of anything; Ctrl-C or SIGTERM again
  leaves at once. kill -9 loses at most what came after the last checkpoint. Nobody reading the output stops nothing.
several processes: a signal to one stops all at one step; when one dies, the others end within a minute (not with 0).
exit codes: 0 done or saved, 2 something to fix (the message says what), 3 loss or gradient not finite,
  128 + signal (130, 143, 129) stopped before there was anything to save.
"""

if __name__ == "__main__":
    leave(main())
