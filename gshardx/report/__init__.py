"""One self-contained HTML page about a training run, or two side by side."""
