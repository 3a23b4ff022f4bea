"""Programs that measure: `python -m dsv3_jax.bench.train`, `python -m dsv3_jax.bench.decode`."""
