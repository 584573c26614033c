"""What README shows works as it stands there."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.children import users_environment
from tests.infer.server.test_serve import Process
from tests.train.processes import finish, start_anew

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_layer_in_somebodys_own_model_runs(tmp_path):
    (program,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    shape, loss, dropped = re.fullmatch(r"(\(.*?\)) (\S+) (\S+)\n", done.stdout).groups()
    assert shape == "(16, 32, 64)"
    assert 1.0 < float(loss) < 1.1
    assert 0.0 < float(dropped) < 0.2


def test_every_file_and_key_that_readme_names_exists():
    for path in re.findall(r"\]\(([\w/.]+)\)", README):
        assert (ROOT / path).exists(), path
    help_text, _ = finish(start_anew(ROOT, "--help"))
    for key in re.findall(r"--([a-z_]+\.[a-z_]+)", README):
        assert f"--{key} " in help_text, key


@pytest.mark.sweep
def test_the_quickstart_reaches_what_it_promises(tmp_path):
    """2.2 bits per byte or better on held-out Shakespeare; the printed commands work."""
    run = tmp_path / "runs" / "quickstart"
    arguments = ("--config", "configs/quickstart.yaml", "--run_dir", str(run))
    out, _ = finish(start_anew(ROOT, *arguments, env=users_environment()), limit=1500)
    bits = float(re.search(r"validation +([\d.]+) bits per byte", out).group(1))
    xz = float(re.search(r"([\d.]+) for xz -9e", out).group(1))
    assert bits <= 2.2
    assert 2.4 < xz < 2.7
    command = re.search(r"generate +python -m gshardx.infer (.*)", out).group(1)
    assert '--prompt "To be"' in command
    text, _ = finish(start_anew(ROOT, "generate", "--run", str(run), "--prompt", "To be", module="gshardx.infer"))
    assert text.startswith("To be")
    assert len(text) > 100

    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert {line.split()[-1] for line in done.stdout.splitlines()} >= {"None", "length"}
    (lines,) = re.findall(r"^printf (.*) > in.jsonl$", README, re.MULTILINE)
    subprocess.run(f"printf {lines} > in.jsonl", shell=True, cwd=tmp_path, check=True)
    command = ("batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--run", str(run))
    said, _ = finish(start_anew(ROOT, *command, "--max_new_tokens", "40", module="gshardx.infer"))
    assert "2 answers, 0 of them errors" in said

    for line in re.findall(r"^python (-m gshardx.checkpoint .*)$", README, re.MULTILINE):
        subprocess.run([sys.executable, *line.split()], cwd=tmp_path, capture_output=True, check=True)
    command = ("generate", "--run", str(tmp_path / "runs" / "weights"), "--prompt", "To be")
    assert finish(start_anew(ROOT, *command, module="gshardx.infer"))[0].startswith("To be")

    command = [sys.executable, "-m", "gshardx.infer", "serve", "--run", str(run), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as served:
        try:
            server = Process(served)
            (curl,) = re.findall(r"^curl .*?'$", README, re.DOTALL | re.MULTILINE)
            curl = curl.replace("http://127.0.0.1:8000", server.url)
            done = subprocess.run(curl, shell=True, capture_output=True, text=True, check=True)
            assert done.stdout.endswith("data: [DONE]\n\n")
            (client,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.DOTALL)
            client = client.replace("http://127.0.0.1:8000", server.url)
            subprocess.run([sys.executable, "-c", client], capture_output=True, check=True)
            served.send_signal(signal.SIGTERM)
            assert served.wait(20) == 0
        finally:
            served.kill()
