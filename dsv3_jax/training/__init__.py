"""One optimizer step, the schedules around it, and what a run needs to survive and report."""
