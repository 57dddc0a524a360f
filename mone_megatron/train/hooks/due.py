"""When something that is done every so many steps is due."""


def is_due(step: int, interval: int, last: int) -> bool:
    """Returns whether it is due at ``step``: every ``interval`` steps and at the last; 0 is never.

    Args:
        step: from 1.
        interval: in steps.
        last: the last step of the run.
    """
    return interval > 0 and (step % interval == 0 or step == last)
