"""The paged latent cache: all implementations write equal bytes, only where they may, and reading gives them back."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv3_jax.model.parts import rms_norm
from dsv3_jax.model.rope import RopeTable, apply_rope
from dsv3_kernels import cache_read, cache_write
from dsv3_kernels.latent_cache.cases import UGLY, Case, make
from dsv3_kernels.latent_cache.fp8_rows import pack_fp8_cache_rows

EPS = 1e-6


@partial(jax.jit, static_argnames=("implementation", "fp8_scale"))
def write(given, implementation: str, fp8_scale: str = "float32"):
    return cache_write(**given, eps=EPS, fp8_scale=fp8_scale, implementation=implementation)


def expected_rows(case: Case, given) -> jax.Array:
    """What the model itself caches of these tokens."""
    latent = rms_norm(jnp.asarray(given["kv_down"][..., : case.C]), jnp.asarray(given["norm_scale"]), eps=EPS)
    table = RopeTable(jnp.asarray(given["cos"]), jnp.asarray(given["sin"]))
    rope = apply_rope(jnp.asarray(given["kv_down"][..., case.C :]), table)
    return (
        pack_fp8_cache_rows(latent, rope, scale=case.fp8_scale)
        if case.fp8
        else jnp.concatenate([latent, rope], axis=-1)
    )


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", UGLY, ids=lambda case: case.name)
def test_rows_of_the_model_arrive_in_their_slots_and_nowhere_else(case: Case, dtype, implementation: str) -> None:
    given = make(case, dtype)
    counts = given["counts"] = np.arange(case.B, dtype=np.int32)[::-1] % (case.T + 1)
    expected = given["kv_pages"].copy()
    rows = np.asarray(jax.jit(partial(expected_rows, case))(given))
    for b in range(case.B):
        for t in range(counts[b]):
            column, slot = divmod(given["starts"][b] + t, 64)
            expected[given["page_table"][b, column], slot] = rows[b, t]
    written = np.asarray(write(given, implementation, case.fp8_scale))
    changed = (written != given["kv_pages"]).any(-1)
    np.testing.assert_array_equal(changed, (expected != given["kv_pages"]).any(-1))
    if case.fp8:
        assert (written != expected).mean() < 1e-4  # a last bit of the mean square may change a rounding
    elif dtype == np.float32:
        np.testing.assert_allclose(written, expected, rtol=1e-6, atol=1e-6)
    else:
        np.testing.assert_allclose(written.astype(np.float32), expected.astype(np.float32), rtol=2**-7)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", UGLY, ids=lambda case: case.name)
def test_rows_are_those_of_float64(case: Case, dtype, implementation: str) -> None:
    given = make(case, dtype, seed=1)
    written = np.asarray(write(given, implementation, case.fp8_scale))
    for b in range(case.B):
        for t in range(case.T):
            column, slot = divmod(given["starts"][b] + t, 64)
            found = written[given["page_table"][b, column], slot]
            rotation = (given["cos"] + 1j * given["sin"])[b, t]
            expected = row_in_float64(case, given["kv_down"][b, t], given["norm_scale"], rotation)
            if case.fp8:
                is_scale = np.arange(656) // 16 == 32
                assert (found != expected)[~is_scale].sum() <= 2
                found_scales, scales = (row[is_scale].copy().view(np.float32) for row in (found, expected))
                np.testing.assert_allclose(found_scales, scales, rtol=1e-6 if dtype == np.float32 else 0)
            else:
                error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
                assert (error <= np.abs(expected.astype(np.float64)) * jnp.finfo(dtype).eps + 1e-6).all()


def row_in_float64(case: Case, down: np.ndarray, norm_scale: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """One row in NumPy, with nothing of the package; `rotation` has the unit complex numbers that rotate the pairs."""
    x = down.astype(np.float64)
    latent = (x[: case.C] / np.sqrt(np.mean(x[: case.C] ** 2) + EPS) * norm_scale).astype(down.dtype)
    rope = (x[case.C :].view(np.complex128) * rotation).view(np.float64).astype(down.dtype)
    if not case.fp8:
        return np.concatenate([latent, rope])
    parts, scales = [], []
    for tile in latent.astype(np.float64).reshape(4, 128):
        scale = max(np.abs(tile).max(), 1e-4) / 448
        if case.fp8_scale == "ue8m0":
            scale = 2.0 ** np.ceil(np.log2(max(scale, 1e-4)))
        scales.append(np.asarray(scale).astype(down.dtype).astype(np.float32))
        parts.append((tile / scales[-1]).astype(np.float32).astype(jnp.float8_e4m3fn))
    parts += [np.stack(scales), rope.astype(jnp.bfloat16)]
    return np.concatenate([part.view(np.uint8) for part in parts])


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_pages_that_are_not_there_take_nothing(implementation: str) -> None:
    """Page ids out of range, rows past the table, and a start before 0."""
    case = Case("astray", B=4, T=70, before=(0, 0, 60, -5), C=12, R=4)
    given = make(case)
    given["page_table"][0, 1] = -1
    given["page_table"][1, 1] = 2147480000
    expected = np.zeros(given["kv_pages"].shape[:2], bool)
    for b, start in enumerate(case.before):
        for position in range(max(start, 0), min(start + 70, 64 * given["page_table"].shape[1])):
            page = given["page_table"][b, position // 64]
            if 0 <= page < len(expected):
                expected[page, position % 64] = True
    assert not expected[given["page_table"][3, 2]].any()
    written = np.asarray(write(given, implementation))
    np.testing.assert_array_equal((written != given["kv_pages"]).any(-1), expected)


def test_powers_of_two_as_scales() -> None:
    given = make(UGLY[3], jnp.bfloat16)
    scales = {}
    for kind in ("float32", "ue8m0"):
        pages = write(given, "xla", kind)
        page, slot = given["page_table"][0, 0], 0
        scales[kind] = np.asarray(pages)[page, slot, 512:528].view(np.float32)
    assert (np.log2(scales["ue8m0"]) % 1 == 0).all()
    assert (np.log2(scales["float32"]) % 1 != 0).any()


@pytest.mark.parametrize("case", [UGLY[2], UGLY[3]], ids=lambda case: case.name)
def test_reading_gives_rows_in_order_and_zeros_behind_them(case: Case) -> None:
    """With NaN in every slot that is not written, and page ids out of range past the end."""
    given = make(case, jnp.bfloat16)
    given["kv_pages"][...] = 255 if case.fp8 else np.nan
    lengths = given["starts"] + given["counts"]
    given["starts"], before = np.zeros_like(given["starts"]), given["starts"]
    whole = make(case._replace(T=int(lengths.max()), before=(0,)), jnp.bfloat16, seed=2)
    for name in ("kv_down", "cos", "sin"):
        given[name] = whole[name]
    given["counts"] = lengths
    table = given["page_table"]
    table[np.arange(table.shape[1])[None, :] * 64 >= lengths[:, None]] = 2147480000
    pages = write(given, "xla")
    rows = np.asarray(jax.jit(cache_read)(pages, table, lengths))
    assert rows.dtype == jnp.bfloat16
    model = np.asarray(expected_rows(case._replace(fp8=False), given)).astype(np.float32)
    for b, length in enumerate(lengths):
        np.testing.assert_array_equal(rows[b, length:], 0)
        tolerance = {"rtol": 2**-3, "atol": 0.02} if case.fp8 else {"rtol": 2**-7}
        np.testing.assert_allclose(rows[b, :length].astype(np.float32), model[b, :length], **tolerance)
    assert before.max() > 0


def test_a_donated_cache_is_written_in_place() -> None:
    given = make(Case("donated", B=2, T=1, before=(5,), C=16, R=8))
    pages = given.pop("kv_pages")
    step = jax.jit(lambda pages, given: cache_write(pages, **given, eps=EPS), donate_argnums=0)
    text = step.lower(pages, given).compile().as_text()
    assert "input_output_alias={ {}: (0" in text


def changed(**replaced):
    return {**make(UGLY[0]), **replaced}


FP8 = make(Case("fp8", B=1, T=1, before=(0,), fp8=True))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(kv_pages=np.zeros((2, 32, 24), np.float32)), "a page holds 64 tokens"),
        (changed(kv_pages=np.zeros((2, 64, 20), np.float32)), "rows of 20, kv_down of 24"),
        (changed(kv_pages=np.zeros((2, 64, 24), np.uint8)), "an FP8 row has 656 bytes"),
        (changed(kv_pages=np.zeros((2, 64, 656), np.uint8)), "FP8 rows hold 512 \\+ 64 elements"),
        (changed(kv_pages=np.zeros((2, 64, 24), np.int32)), "must be of a float type"),
        (changed(norm_scale=np.ones(24, np.float32)), "leave room for the key part"),
        (changed(cos=np.zeros((1, 1, 8), np.float32)), "cos is float32"),
        (changed(sin=np.zeros((1, 1, 4), jnp.bfloat16)), "sin is bfloat16"),
        (changed(page_table=np.zeros((2, 1), np.int32)), "pages of 1 sequences"),
        (changed(starts=np.zeros(2, np.int32)), "starts is int32"),
        (changed(counts=np.zeros(2, np.int32)), "counts is int32"),
        (changed(starts=np.array([64], np.int32)), "starts \\+ counts lie in 64..65; a page table of 1 pages"),
        (changed(starts=np.array([-1], np.int32)), "starts \\+ counts lie in -1..0"),
        (changed(fp8_scale="float16"), "fp8_scale='float16' is unknown"),
    ],
)
def test_what_does_not_fit_is_refused(given, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_write(**{name: x if isinstance(x, str) else jnp.asarray(x) for name, x in given.items()}, eps=EPS)


@pytest.mark.parametrize(
    ("pages", "seq_lens", "message"),
    [
        ((2, 64, 24), [0, 0, 0], "one integer a sequence"),
        ((2, 64, 24), [65], "seq_lens lie in 65..65; a page table of 1 pages of 64 holds"),
        ((2, 64, 24), [-1], "Give it more pages"),
        ((2, 32, 24), [1], "a page holds 64 tokens"),
    ],
)
def test_what_cannot_be_read_is_refused(pages, seq_lens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cache_read(jnp.zeros(pages), jnp.zeros((1, 1), jnp.int32), jnp.asarray(seq_lens, jnp.int32))
