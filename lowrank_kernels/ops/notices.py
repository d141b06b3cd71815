"""Messages that a user should see once, not once a step."""

import functools
import logging

logger = logging.getLogger("lowrank_kernels")


@functools.lru_cache(maxsize=4096)
def notice_once(level: int, message: str) -> None:
    """Logs a message the first time that it is given in this process."""
    logger.log(level, message)
