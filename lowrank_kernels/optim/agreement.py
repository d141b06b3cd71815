"""Ranks that change what they are about to do, in the middle of a run, ask each other by the store.

Between two refreshes some methods send nothing, and what ranks send then is the model's. A rank
that alone has changed its groups would wait in a collective of ours for ranks that wait in one of
the model's, for ever. The key-value store, by which torch's process groups were made, is apart from
all collectives, and knows deadlines.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from .collectives import first_difference

# Seconds for others to say the same: backward passes end on all ranks at about one time.
PATIENCE = 20.0

# How often the same ranks have asked about the same names.
_asked: Counter[str] = Counter()


def agree_by_store(
    lines: Sequence[str], before: Sequence[str], ranks: Sequence[int], subject: str
) -> None:
    """Waits until all ranks have made the same change.

    Args:
        lines: what this rank is about to do.
        before: what it did, and all others, too.
        ranks: all of them, as of the default group; this one among them.
        subject: what it is about, the same on all ranks.

    Raises:
        RuntimeError: others are about to do something else, or are not heard of, and the text says
            what has changed here.
    """
    here = dist.get_rank()
    store = distributed_c10d._get_default_store()
    digest = hashlib.sha256(json.dumps([subject, *map(str, ranks)]).encode()).hexdigest()[:16]
    place = f"lowrank_kernels/{digest}/{_asked[digest]}"
    _asked[digest] += 1
    store.set(f"{place}/{here}", json.dumps(list(lines)))
    deadline = timedelta(seconds=PATIENCE)
    try:
        store.wait([f"{place}/{rank}" for rank in ranks], deadline)
    except (RuntimeError, dist.DistStoreError) as error:
        change = first_difference([(here, list(lines)), (here, list(before))])
        raise RuntimeError(
            f"the ranks do not take the same step: what changed on rank {here} did not change on"
            f" others, or they are more than {PATIENCE:g} seconds behind: now and before, {change}"
        ) from error
    known = [(rank, json.loads(store.get(f"{place}/{rank}"))) for rank in ranks]
    if any(every != known[0][1] for _, every in known):
        raise RuntimeError(f"the ranks do not take the same step: {first_difference(known)}")
