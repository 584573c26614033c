"""``python -m gshardx.data tokenize --path TEXTS --out FOLDER``"""

# Worker processes import this file again: nothing here may import JAX.
if __name__ == "__main__":
    from gshardx.cli import run_command
    from gshardx.data.command import main

    run_command(main)
