"""How a run is spread over devices: the axes of its mesh, and what travels along them."""

import dataclasses
from typing import Literal, get_args

from dsv3_jax.config.check import check, check_finite, divisors, one_of

Schedule = Literal["dualpipe_v", "dualpipe", "one_f_one_b"]
Gather = Literal["step", "layer"]
Overflow = Literal["rounds", "drop"]


@dataclasses.dataclass(frozen=True)
class ParallelConfig:
    """A run on one device has the defaults; what it learns does not depend on any of this, but for rounding.

    - `pipe`: ranks of the pipeline, each with a stage of layers or two (`schedule`).
    - `data`: replicas that share a batch's rows; -1 is what the other axes leave of the devices.
    - `expert`: peers over which the routed experts are split. They share the batch's rows as `data` does, so a batch
      lies on data x expert devices. `expert_nodes`: how many nodes these peers are on; a token then goes once to each
      node that has any of its experts, and from there to the peers (report section 3.2.2).
    - `tensor`: devices that share heads and the widths of feed-forwards. The report trains without.
    - `schedule`: in which order ranks of the pipeline work (`dsv3_jax/parallel/pipeline/schedule.py`).
    - `gather`: parameters are stored split over all that would have copies, and gathered once a "step" (ZeRO-1) or in
      each "layer" (FSDP): slower, and smaller.
    - `capacity`: tokens that a device may send to one peer at a time, as a factor of the mean; None is room for all.
    - `overflow`: what comes of more: "rounds" sends the rest after, "drop" leaves those choices out and counts them.
    """

    pipe: int = 1
    data: int = -1
    expert: int = 1
    expert_nodes: int = 1
    tensor: int = 1
    schedule: Schedule = "dualpipe_v"
    gather: Gather = "step"
    capacity: float | None = None
    overflow: Overflow = "rounds"

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("pipe", "expert", "expert_nodes", "tensor"):
            check(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be at least 1 (ParallelConfig.{name}).")
        check(
            self.data > 0 or self.data == -1,
            f"data={self.data} must be at least 1, or -1 for what is left of the devices (ParallelConfig.data).",
        )
        check(
            self.expert % self.expert_nodes == 0,
            f"expert={self.expert} peers cannot be shared by expert_nodes={self.expert_nodes} nodes; expert_nodes may "
            f"be {one_of(divisors(self.expert), near=self.expert_nodes)} (ParallelConfig.expert_nodes).",
        )
        for name, known in (("schedule", Schedule), ("gather", Gather), ("overflow", Overflow)):
            check(
                getattr(self, name) in get_args(known),
                f"{name}={getattr(self, name)!r} is unknown; use one of {', '.join(get_args(known))} "
                f"(ParallelConfig.{name}).",
            )
        check(
            self.capacity is None or self.capacity > 0,
            f"capacity={self.capacity} must be positive, or none for room for all (ParallelConfig.capacity).",
        )
        check(
            self.schedule != "dualpipe" or self.pipe == 1 or self.pipe % 2 == 0,
            f"schedule='dualpipe' joins ranks from both ends in pairs, but pipe={self.pipe} is odd; use pipe="
            f"{self.pipe - 1 or 2} or {self.pipe + 1}, or schedule='dualpipe_v' (ParallelConfig.schedule).",
        )
