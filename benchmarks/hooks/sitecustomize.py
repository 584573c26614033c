"""Python imports this at its start when this folder is on PYTHONPATH: tells how long somebody else's program compiles.

Into the file $COMPILE_SECONDS, at the program's end: the seconds of tracing, lowering and compiling of the one function
that took longest, which in a training program is its step.
"""

import atexit
import collections
import contextlib
import os

EVENTS = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")


def listen(path: str) -> None:
    import jax

    seconds: dict[str, float] = collections.defaultdict(float)

    def heard(event: str, duration: float, **more: str) -> None:
        if event.rpartition("/")[2] in EVENTS:
            name = more.get("fun_name", "")  # "step" where it is traced, "jit(step)" where it is compiled
            seconds[name.removeprefix("jit(").removesuffix(")")] += duration

    def tell() -> None:
        if seconds:
            with open(path, "w") as file:
                file.write(str(max(seconds.values())))

    jax.monitoring.register_event_duration_secs_listener(heard)
    atexit.register(tell)


if "COMPILE_SECONDS" in os.environ:
    with contextlib.suppress(ImportError):  # programs without JAX, started beside
        listen(os.environ["COMPILE_SECONDS"])
