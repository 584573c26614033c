"""Which step is good, read file after file: the slow twin of gshardx.checkpoint.restore."""

from gshardx.checkpoint.manifest import NAME, damage, read_manifest
from gshardx.checkpoint.store import step_folders


def newest_good_step(folder, report):
    """The newest step whose files all have their checksums; ``report`` gets a line for each bad one."""
    for step in reversed(step_folders(folder)):
        manifest = read_manifest(folder / str(step))
        bad = NAME if manifest is None else damage(folder / str(step), manifest.checksum, manifest.files)
        if bad is None:
            return step
        report(f"{step}: {bad}")
    return None
