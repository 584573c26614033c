"""``python -m gshardx.train --config FILE [--section.field VALUE ...]``, once, or once a process"""

import shlex
from pathlib import Path

from gshardx.cli import parse_config, run_command
from gshardx.models.moe import check_router_options
from gshardx.sharding import distributed, simulate_devices
from gshardx.sharding.startup import keep_memory
from gshardx.train.run_dir import RunDir

PROG = "python -m gshardx.train"
DESCRIPTION = f"""Train a Mixture-of-Experts language model, or continue the run in --run_dir. Where only CPUs are
present, the mesh's product says how many devices are simulated. Exit codes: 0 done, 2 bad input, 130 or 143 saved after
Ctrl-C or SIGTERM. {distributed.HELP}"""


def main(argv: list[str]) -> int:
    meeting, rest = distributed.take_flags(argv)
    config, file = parse_config(PROG, DESCRIPTION, rest)
    check_router_options(config.model.moe)
    if config.mesh.size == 1:
        keep_memory()
    simulate_devices(config.mesh.size, distributed.join(*meeting))
    from gshardx.train.loop import train  # after the devices are settled

    run = RunDir(Path(config.run_dir or f"runs/{file.stem if file else 'default'}"))
    return train(config, run, shlex.join(["python", "-m", "gshardx.train", *argv]))


if __name__ == "__main__":
    run_command(main)
