"""Where the stages of a pipeline lie: which rank holds which, and how micro-batches flow through them."""

from dataclasses import dataclass

from dsv3_jax.config.check import check


@dataclass(frozen=True)
class Placement:
    """Stages of each rank.

    A task names its stage by the rank it is in the list of and a *direction*, the index of one of that rank's modules.
    Micro-batches are numbered from 0 within a *flow*: DualPipe has two, one from each end; all others have one.
    """

    stages: tuple[tuple[int, ...], ...]
    """[rank][direction] -> stage."""
    flows: tuple[int, ...]
    """[direction] -> flow."""

    @classmethod
    def v(cls, num_ranks: int) -> "Placement":
        """A V (DualPipeV): rank r holds stage r and stage 2P-1-r; inputs and losses are on rank 0."""
        check(num_ranks >= 1, f"num_ranks={num_ranks} must be at least 1.")
        return cls(tuple((r, 2 * num_ranks - 1 - r) for r in range(num_ranks)), (0, 0))

    @classmethod
    def bidirectional(cls, num_ranks: int) -> "Placement":
        """Two opposite flows (DualPipe): rank r holds a copy of stage r for flow 0, of stage P-1-r for flow 1."""
        check(
            num_ranks >= 2 and num_ranks % 2 == 0,
            f"num_ranks={num_ranks} must be even and at least 2, so that each stage has two copies on two ranks; "
            f"use {max(2, num_ranks + 1)} ranks or Placement.v.",
        )
        return cls(tuple((r, num_ranks - 1 - r) for r in range(num_ranks)), (0, 1))

    @classmethod
    def linear(cls, num_ranks: int) -> "Placement":
        """One stage a rank (GPipe, 1F1B, zero bubble): rank r holds stage r."""
        check(num_ranks >= 1, f"num_ranks={num_ranks} must be at least 1.")
        return cls(tuple((r,) for r in range(num_ranks)), (0,))

    @property
    def num_ranks(self) -> int:
        """P."""
        return len(self.stages)

    @property
    def num_stages(self) -> int:
        """Stages that a micro-batch passes through."""
        return 1 + max(max(own) for own in self.stages)

    def home(self, flow: int, stage: int) -> tuple[int, int]:
        """(rank, direction) of a stage in a flow."""
        return next(
            (rank, direction)
            for rank, own in enumerate(self.stages)
            for direction, held in enumerate(own)
            if held == stage and self.flows[direction] == flow
        )

    def count(self, flow: int, num_microbatches: int) -> int:
        """Micro-batches of a flow: the first has one more if they do not come out even."""
        num_flows = 1 + max(self.flows)
        return (num_microbatches + num_flows - 1 - flow) // num_flows
