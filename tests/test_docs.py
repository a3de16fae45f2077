"""The examples of docs/extending.md run as they stand, and are short; links and commands of the documents hold."""

import re
import subprocess
import sys

import pytest
from conftest import ROOT, assert_one_line
from PIL import Image

EXTENDING = (ROOT / "docs" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"```python\n# (\w+\.py)\n(.*?)```", EXTENDING, flags=re.S))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with the examples: `mine(script, *flags)` starts mine.py there, with the checkout on its path."""
    cwd = tmp_path_factory.mktemp("mine")
    for name, code in EXAMPLES.items():
        (cwd / name).write_text(code)

    def run(*words):
        return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, text=True, capture_output=True, timeout=200,
                              check=False, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})
    run.cwd = cwd
    return run


def test_all_additions_train_and_sample_together(mine):
    """The commands of the document. Its examples are short."""
    assert len(EXAMPLES) == 7
    assert max(code.strip().count("\n") + 1 for code in EXAMPLES.values()) <= 30
    commands = re.search(r"```bash\n(python mine.*?)```", EXTENDING, flags=re.S)[1].replace("\\\n", " ").strip().splitlines()
    assert len(commands) == 2
    for command in commands:
        words = [word.strip("'") for word in re.findall(r"'[^']*'|\S+", command)][1:]
        result = mine(*words, "--device", "cpu", *(["--num-workers", "0"] if "train" in words else []))
        assert result.returncode == 0, result.stderr
    assert Image.open(mine.cwd / "sample.png").text["sampler"] == "jump"
    reused = mine("mine.py", "sample", "--ckpt", "results/mine", "--reuse", "encoder", "--out", "x.png")
    reused.stderr = re.sub(r".*\r", "", reused.stderr)
    assert_one_line(reused, "--reuse encoder needs", "Mine lacks blocks, default_split, condition, encode, decode")
    assert not (mine.cwd / "x.png").exists()
    assert mine("mine.py", "sample", "--ckpt", "results/mine", "--compile", "--num-sampling-steps", 2).returncode == 0


def test_a_network_of_other_blocks_has_the_seam(mine):
    flags = ["--model", "Gated", "--data-path", "stripes", "--vae", "pixels", "--global-batch-size", 16, "--max-steps", 2]
    assert mine("mine.py", "train", *flags, "--run-name", "gated", "--num-workers", 0).returncode == 0
    result = mine("mine.py", "sample", "--ckpt", "results/gated", "--num-sampling-steps", 8, "--reuse", "encoder")
    assert result.returncode == 0, result.stderr


def test_the_training_loop_runs(mine):
    result = mine("my_loop.py")
    assert result.returncode == 0, result.stderr


def test_links_lead_somewhere():
    anchors = {path: set(map(slug, re.findall(r"^#+ (.*)$", path.read_text(), flags=re.M))) for path in DOCUMENTS}
    checked, broken = 0, []
    for document in DOCUMENTS:
        text = re.sub(r"```.*?```", "", document.read_text(), flags=re.S)
        for link in re.findall(r"\]\(([^)]+)\)|(?:src)=\"([^\"]+)\"", text):
            target = "".join(link).replace("\\_", "_")
            if target.startswith("http"):
                continue
            path, _, anchor = target.partition("#")
            path = (document.parent / path).resolve() if path else document
            checked += 1
            if not path.exists() or (anchor and anchor not in anchors[path]):
                broken.append((document.name, target))
    assert not broken
    assert checked > 20


def slug(heading):
    """As GitHub makes anchors of headings."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).replace(" ", "-")
