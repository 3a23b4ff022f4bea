"""What the compiled training step is said to be made of, and the step itself where it can be compiled for H100."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3_jax.planning.aot_step import Memory, gpus_needed, main, where

GIB = 2**30


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("jit(fused)/jvp()/while/body/eval_jaxpr/feed_forward/experts/dot_general", "feed_forward/experts"),
        ("jit(fused)/transpose(jvp(head))/bcd,dv->bcv/transpose", "head, backward"),
        ("jit(fused)/transpose(jvp())/while/body/checkpoint/rematted_computation/attention/mul", "attention, backward"),
        ("jit(fused)/jvp()/while", "step"),
        ("", "step"),
    ],
)
def test_an_operation_is_placed_by_the_scopes_of_the_model(source, place):
    assert where(source) == place


def test_memory_is_counted_in_gpus():
    sizes = {"parameters": 50 * GIB, "moments": 50 * GIB, "outputs": GIB}
    assert gpus_needed(Memory(**sizes, arguments=70 * GIB, temporaries=9 * GIB)) == 1
    assert gpus_needed(Memory(**sizes, arguments=100 * GIB, temporaries=60 * GIB)) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--rows=0"], "--rows 0"), (["--layers=0"], "--layers 0"), (["--precision=fp4"], "fp4")],
)
def test_errors_are_clear(arguments, said, repository: Path, capsys: pytest.CaptureFixture[str]):
    assert main([str(repository / "configs" / "tiny.py"), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bfloat16", "fp8_dsv3"])
def test_a_step_for_h100_holds_the_kernels_and_no_loop_that_waits(precision, repository: Path):
    """The very command, in the environment that `make aot-step` makes beside this one."""
    python = Path(f"{sys.prefix}-aot/bin/python")
    ready = [python, "-c", "import optax, jax_cuda13_plugin"]
    if not python.exists() or subprocess.run(ready, capture_output=True, check=False).returncode:
        pytest.skip(f"{python} cannot compile for CUDA: make aot-step")
    heads = "model.mla.nope_head_dim=128 model.mla.rope_head_dim=64 model.mla.v_head_dim=128"
    sizes = "model.model_dim=256 model.ffn_dim=1024 model.moe.expert_dim=1024 model.mtp_depth=1"
    done = subprocess.run(
        [
            *(python, "-m", "dsv3_jax.planning.aot_step", "configs/tiny.py", "--json", "--rows=2"),
            *(f"--precision={precision}", "--set", *heads.split(), *sizes.split()),
        ],
        cwd=repository,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{repository}:{repository / 'kernels'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    kernels = {kernel["name"] for kernel in found["kernels"]}
    attention = {"mla_prefill", "mla_prefill_query_gradients", "mla_prefill_key_gradients"}
    experts = {"grouped_matmul", "grouped_matmul_k"} if precision == "bfloat16" else {"grouped_fp8_gemm", "swiglu_cast"}
    assert attention | experts <= kernels
    assert all(loop["trips"] is not None for loop in found["loops"])
    assert found["memory"]["peak"] > found["memory"]["parameters"] + found["memory"]["moments"]
