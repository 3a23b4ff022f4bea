import shutil
import subprocess

import pytest

from dsv3_jax.data.baselines import compressor_baselines


def test_sizes_are_those_of_the_tools(tmp_path):
    if not shutil.which("gzip") or not shutil.which("xz"):
        pytest.skip("gzip or xz is not installed")
    texts = [b"def f(x):\n    return x\n" * n for n in (1, 50, 400)]
    sizes = {"gzip -9": 0, "xz -9": 0}
    for text in texts:
        for name, command in (("gzip -9", ["gzip", "-n", "-9", "-c"]), ("xz -9", ["xz", "-9", "-T1", "-c"])):
            sizes[name] += len(subprocess.run(command, input=text, capture_output=True, check=True).stdout)
    joined = subprocess.run(["xz", "-9", "-T1", "-c"], input=b"".join(texts), capture_output=True, check=True).stdout
    num_bytes = sum(map(len, texts))
    found = compressor_baselines(texts)
    assert found["gzip -9"] == pytest.approx(8 * sizes["gzip -9"] / num_bytes, rel=0.01)
    assert found["xz -9"] == pytest.approx(8 * sizes["xz -9"] / num_bytes, rel=1e-9)
    assert found["xz -9 joined"] == pytest.approx(8 * len(joined) / num_bytes, rel=0.01)


def test_of_many_documents_a_fixed_sample_is_compressed():
    texts = [f"a short text, number {i} of many".encode() for i in range(6_000)]
    found = compressor_baselines(texts)
    assert list(found) == [
        "gzip -9, 2,000 of 6,000 documents",
        "xz -9, 2,000 of 6,000 documents",
        "xz -9, 2,000 of 6,000 documents joined",
    ]
    assert found == compressor_baselines(texts)
    large = [bytes(2**21)] * 9
    assert "gzip -9, 4 of 9 documents" in compressor_baselines(large)
    assert "gzip -9" in compressor_baselines([bytes(2**24)])


def test_nothing_to_compress_is_refused():
    with pytest.raises(ValueError, match="no bytes"):
        compressor_baselines([b""])
