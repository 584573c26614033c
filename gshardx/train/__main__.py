"""``python -m gshardx.train --config FILE [--section.field VALUE ...]``, once, or once a process"""

import logging
import shlex
from pathlib import Path

from gshardx.cli import parse_config, run_command
from gshardx.models.decoder import check_model
from gshardx.sharding import meeting, simulate_devices
from gshardx.sharding.startup import keep_memory
from gshardx.train.run_dir import RunDir

PROG = "python -m gshardx.train"
DESCRIPTION = f"""Train a Mixture-of-Experts language model, or continue the run in --run_dir. Where only CPUs are
present, the mesh's product says how many devices are simulated. Exit codes: 0 done, 2 bad input, 3 another process was
lost or the run hung, 130 or 143 saved after Ctrl-C or SIGTERM. {meeting.HELP}"""


def main(argv: list[str]) -> int:
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Orbax's tasks tell of a failed save again, in pages
    where, rest = meeting.take_flags(argv)
    config, file = parse_config(PROG, DESCRIPTION, rest)
    check_model(config.model)
    if config.mesh.size == 1:
        keep_memory()
    with meeting.join(*where) as peers:
        simulate_devices(config.mesh.size, peers.count)
        from gshardx.train.loop import train  # after the devices are settled

        run = RunDir(Path(config.run_dir or f"runs/{file.stem if file else 'default'}"))
        return train(config, run, shlex.join(["python", "-m", "gshardx.train", *argv]), peers)


if __name__ == "__main__":
    run_command(main)
