"""One program on many devices: meshes, how arrays lie on them, what devices exchange, pipelines."""
