"""What a process checks before it meets others, and does alone; several of them are in test_multihost.py."""

import jax
import pytest

from dsv3_jax.config.check import UserError
from dsv3_jax.config.parallel import ParallelConfig
from dsv3_jax.interrupt import Stop, StopRequest
from dsv3_jax.parallel.mesh import make_mesh
from dsv3_jax.training import hosts
from dsv3_jax.training.devices import WARM_UP, Trace, mesh_of, num_shares


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "node1:9876"}, "--processes, --process missing"),
        ({"processes": 2, "process": 0}, "--coordinator missing"),
        ({"coordinator": "node1", "processes": 2, "process": 0}, "node1 is no HOST:PORT"),
        ({"coordinator": "node1:x", "processes": 2, "process": 0}, "node1:x is no HOST:PORT"),
        ({"coordinator": "node1:9876", "processes": 2, "process": 2}, "--process 2 is none of --processes 2"),
    ],
)
def test_half_an_introduction_is_refused(given: dict, message: str):
    with pytest.raises(UserError, match=message):
        hosts.initialize(**given)
    assert not jax.distributed.is_initialized()


def test_a_process_alone_asks_nobody(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    assert hosts.initialize() == 0
    assert not jax.distributed.is_initialized()
    assert hosts.lead(lambda: 7) == hosts.of_first(7) == 7
    hosts.check_same({"a": object()})
    hosts.barrier("alone")
    hosts.leave_together()
    with StopRequest() as stop:
        assert hosts.agreed(stop) is stop
        assert isinstance(stop, Stop)
    with pytest.raises(KeyError), hosts.leaving_alone():
        raise KeyError


def test_an_agreed_stop_comes_at_the_call_after(monkeypatch: pytest.MonkeyPatch):
    """One process that holds all devices agrees with itself."""
    with StopRequest() as own:
        stop = hosts.AgreedStop(own)
        assert stop.run(divmod, 7, 2) == (3, 1)
        monkeypatch.setattr(own, "_number", 15)
        stop.check()
        with pytest.raises(BaseException, match="stopped by SIGTERM"):
            stop.check()


def test_one_cpu_is_a_mesh_only_where_it_stands_for_several(small):
    assert mesh_of(small) is None
    mesh = mesh_of(small, simulated=4)
    assert mesh == make_mesh(ParallelConfig(data=4), jax.devices()[:4])
    assert num_shares(mesh) == 1
    with pytest.raises(UserError, match=r"micro=4 sequences cannot be shared by data 3"):
        mesh_of(small, simulated=3)
    with pytest.raises(UserError, match="this process began with 8 devices"):
        mesh_of(small, simulated=9)


def test_a_trace_has_the_steps_after_the_warm_up(tmp_path):
    trace = Trace(tmp_path, num_steps=2)
    ends = [trace.step(jax.numpy.zeros(1)) for _ in range(WARM_UP + 4)]
    assert [number for number, is_end in enumerate(ends, start=1) if is_end] == [WARM_UP + 2]
    assert list(tmp_path.rglob("*.xplane.pb"))
    none = Trace(tmp_path / "none", num_steps=0)
    assert not any(none.step(None) for _ in range(WARM_UP + 4))
    none.close()
    assert not (tmp_path / "none").exists()
