"""Videos and images -> WebDataset shards with a manifest. Steps, so that each can be scaled alone and continued:

    begin   (one process)  the sources are listed                                                         work.py
    probe   (any number)   every file is decoded whole: facts, or a reason to reject it; long ones are cut  probing.py
    plan    (one process)  duplicates are rejected; records are shuffled by the seed and dealt to shards    planning.py
    write   (any number)   each shard under a temporary name, then renamed                                 writing.py
    finish  (one process)  columns, rejected.jsonl, the manifest last                                      writing.py

What is done is never done again, so a run that was killed goes on, and the finished bytes do not depend on processes,
jobs, kills or repetitions. One bad file never stops the run and is never dropped silently: it goes to rejected.jsonl.
"""

from pathlib import Path

from vjepa_scale.core.errors import UserError
from vjepa_scale.data.manifest import MANIFEST
from vjepa_scale.shards.plan import plan
from vjepa_scale.shards.probe import probe
from vjepa_scale.shards.summary import Summary, summarize
from vjepa_scale.shards.work import Part, Progress, Settings, Work, begin, tidy
from vjepa_scale.shards.write import finish, write

__all__ = ["Part", "Progress", "Settings", "Work", "begin", "finish", "make_shards", "plan", "probe", "write"]


def make_shards(videos: Path, out: Path, settings: Settings, *, workers: int, progress: Progress) -> Summary:
    """Make the data set, or finish it, or find it finished.

    videos: a folder, or a list (see sources.py)
    Raises UserError, before anything is written, where there is nothing to make it from or where ``out``
    holds something else.
    """
    work = begin(videos, out, settings)
    if work is None:
        return summarize(out, existed=True)
    everything = Part(0, 1)
    try:
        probe(work, everything, workers=workers, progress=progress)
        plan(work)
        write(work, everything, workers=workers, progress=progress)
        return finish(work)
    except (UserError, FileNotFoundError):
        if not (out / MANIFEST).exists():
            raise
        tidy(out)  # another process has finished it meanwhile, and removed the work
        return summarize(out)
