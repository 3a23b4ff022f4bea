"""The axes of a mesh. Every mesh has all of them; those that are not used have one device."""

PIPE, DATA, NODE, EXPERT, TENSOR = "pipe", "data", "node", "expert", "tensor"

AXES = (PIPE, DATA, NODE, EXPERT, TENSOR)
"""From the outermost to the innermost: neighbours of the last are closest to each other."""

EXPERTS = (NODE, EXPERT)
"""Over these the routed experts are split."""

ROWS = (DATA, NODE, EXPERT)
"""Over these the rows of a batch are split: the experts' peers are batch ranks too."""

COPIES = (PIPE, DATA, NODE, EXPERT)
"""Over these a parameter that a rule does not split would have copies, so that its stored part is split."""
