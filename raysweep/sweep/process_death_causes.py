"""Why a trial's process died, read from the error message of Ray."""

# Ray writes this before the traceback of an error that a worker's own code raised.
_WORKER_MARK = "ray::"


def describe_process_loss(ray_error: str) -> str:
    """Summarize in a few words why a trial lost its process.

    Args:
        ray_error: Ray's message about the failure; empty if there is none.

    Returns:
        The end of a sentence about the trial, for its `reason` in the ledger: the error of the code
        that ran in the process, if there was one.
    """
    if worker_error := _find_worker_error(ray_error):
        return worker_error
    if "running low on memory" in ray_error:
        return "its process was killed because the node ran out of memory"
    if "preempted" in ray_error:
        return "its node was preempted"
    return "its process or its node died"


def _find_worker_error(ray_error: str) -> str:
    """Return the first line of the error that the worker's code raised; "" if none did."""
    _, mark, worker_traceback = ray_error.partition(_WORKER_MARK)
    _, frame_mark, last_frame = worker_traceback.rpartition('\n  File "')
    if mark and frame_mark:
        # Below the last frame, lines of the source are indented and the error is not.
        for line in last_frame.splitlines()[1:]:
            if line and not line[0].isspace():
                return line
    return ""
