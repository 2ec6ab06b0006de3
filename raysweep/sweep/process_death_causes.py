"""Why a trial's process died, read from the error message of Ray."""


def describe_process_loss(ray_error: str) -> str:
    """Summarize in a few words why a trial lost its process.

    Args:
        ray_error: Ray's message about the failure; empty if there is none.

    Returns:
        The end of a sentence about the trial, for its `reason` in the ledger.
    """
    if "running low on memory" in ray_error:
        return "its process was killed because the node ran out of memory"
    if "preempted" in ray_error:
        return "its node was preempted"
    return "its process or its node died"
