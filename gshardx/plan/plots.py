"""Memory and time of a plan as two stacked bars; needs matplotlib (the ``plan`` extra)."""

import importlib.util
from pathlib import Path

from gshardx.errors import BadInput
from gshardx.plan.memory import KINDS
from gshardx.plan.report import Plan

_SUFFIXES = (".png", ".svg", ".pdf")


def check_plot(path: Path) -> None:
    """Whether a plot can be drawn to ``path``, before minutes are spent on what it shows.

    Raises:
        BadInput: matplotlib is missing, the suffix names no format, or the folder isn't there.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise BadInput("--plot needs matplotlib; run: pip install 'gshardx[plan]'")
    if path.suffix not in _SUFFIXES:
        raise BadInput(f"--plot {path}: no format of that suffix; use {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    if not path.parent.is_dir():
        raise BadInput(f"--plot {path}: no folder {path.parent}; make it, or write elsewhere")


def plot(plan: Plan, path: Path) -> None:
    """Draw ``plan`` to a file; its suffix says how.

    Raises:
        BadInput: as :func:`check_plot`, or the file can't be written.
    """
    check_plot(path)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    parts = _parts(plan)
    figure, axes = plt.subplots(1, len(parts), figsize=(4.5 * len(parts), 5), squeeze=False)
    for axis, (title, values) in zip(axes[0], parts.items(), strict=True):
        bottom = 0.0
        for name, value in values.items():
            if value:
                axis.bar([0], [value], bottom=bottom, label=name, width=0.5)
                bottom += value
        axis.set(title=title, xticks=[], xlim=(-0.5, 1.4))
        axis.legend(loc="center right", fontsize="small")
    axes[0][0].axhline(plan.hbm_bytes / 2**30, color="black", linestyle="--", linewidth=1)
    figure.suptitle(f"{plan.step} on {plan.topology}, {' x '.join(f'{k} {v}' for k, v in plan.mesh.items())}")
    figure.tight_layout()
    try:
        figure.savefig(path)
    except OSError as error:
        raise BadInput(f"--plot {path}: can't be written ({error.strerror})") from error
    finally:
        plt.close(figure)


def _parts(plan: Plan) -> dict[str, dict[str, float]]:
    """Title of each bar, and what it is stacked from."""
    parts = {"memory, GiB": {kind: (plan.memory[kind] or 0) / 2**30 for kind in KINDS}}
    if plan.roofline:
        line = plan.roofline
        waiting = max(line.device - line.compute, 0.0)
        seconds = {"matrix products": line.compute, "waiting for memory": waiting, "sending": line.interconnect}
        parts["predicted step, ms"] = {name: value * 1e3 for name, value in seconds.items()}
    return parts
