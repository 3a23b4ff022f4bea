"""The choice of an op's form."""

import pytest

from dsv3_kernels import dispatch

FORMS = {name: (lambda x, name=name: (name, x)) for name in ("reference", "xla", "pallas")}


def refuse(x):
    raise NotImplementedError(f"{x} is beyond this kernel")


def test_a_named_form_is_the_one_that_runs() -> None:
    assert dispatch.run("op", FORMS, "reference", 1) == ("reference", 1)
    assert dispatch.run("op", FORMS, "xla", 1) == ("xla", 1)


def test_xla_serves_where_no_hopper_gpu_is() -> None:
    assert (dispatch.run("op", FORMS, None, 1)[0] == "xla") == (dispatch.why_no_pallas() is not None)


def test_the_next_form_serves_what_a_kernel_refuses(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "why_no_pallas", lambda: None)
    assert dispatch.run("op", FORMS, None, 1) == ("pallas", 1)
    assert dispatch.run("op", FORMS | {"pallas": refuse}, None, 1) == ("xla", 1)
    with pytest.raises(NotImplementedError, match="beyond"):
        dispatch.run("op", FORMS | {"pallas": refuse}, "pallas", 1)


@pytest.mark.skipif(dispatch.why_no_pallas() is None, reason="a Hopper GPU is here")
def test_asking_for_the_kernel_without_its_device_says_why() -> None:
    with pytest.raises(NotImplementedError, match=r"op.*needs (a Hopper GPU|jax).*leave it None"):
        dispatch.run("op", FORMS, "pallas", 1)


def test_unknown_forms_are_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'triton' of op is unknown; use None, 'reference', 'xla', 'pallas'"):
        dispatch.run("op", FORMS, "triton", 1)
